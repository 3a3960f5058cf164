"""Images in: sources, splits, pixels and batches."""
