"""Pages that render the numbers of a run and compute none."""
