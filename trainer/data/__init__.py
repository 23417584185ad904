"""Token batches; the position in the data is one integer, and it is the state."""
