"""Where tensors live and how they move."""
