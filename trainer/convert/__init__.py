"""Checkpoints of DeepSpeed, to and from ours. Reads and writes by the form of their files: DeepSpeed itself is not imported."""
