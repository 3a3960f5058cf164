"""Processes, files, signals, progress and the machine; knows nothing of images."""
