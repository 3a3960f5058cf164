"""Numbers from probabilities and labels."""
