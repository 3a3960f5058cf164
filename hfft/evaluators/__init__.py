"""What measures a run and does not train it."""
