"""Phases: planned, run one after the other, each with a Trainer of its own."""
