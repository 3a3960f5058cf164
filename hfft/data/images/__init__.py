"""Bytes to pixels to batches."""
