"""Training behind the split point from activations that were computed once."""
