"""Dynamic sparse training with masks that are split as their weights are: which weights live is decided exactly, over all
ranks, and is the same on every layout."""
