"""Adapters: a few numbers that learn beside matrices that do not."""
