"""A run through Accelerate: DeepSpeed's engine, or FSDP2 as Accelerate sets it up, in the place of `trainer.parallelize`."""
