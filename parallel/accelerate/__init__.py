"""DeepSpeed and FSDP2 through Accelerate: what of a run they are told, and what they hold of it."""
