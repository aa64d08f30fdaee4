"""Learning the head: one algorithm a file, pure functions that return new weights."""
