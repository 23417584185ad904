"""Names under which people of other frameworks know a key, and what answers them: data, which needs nothing to be read.

Taken from the options of Hugging Face (TrainingArguments, a model's config.json, accelerate, TRL), torchtitan, DeepSpeed's
JSON, axolotl, Megatron-LM, Lightning, nanoGPT and torchrun, beside short forms of them that people type. What is written
instead may hold {value}, what was given, and the numbers of this configuration that `answers.numbers` works out.
"""
