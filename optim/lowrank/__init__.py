"""Low-rank optimizers on the logical matrix: gradients projected on the right, so that what is kept is split by rows."""
