"""Numbers about a model on a split."""
