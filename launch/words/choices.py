"""Names of choices elsewhere, such as `optim=adamw_torch`, and what answers them."""

from collections.abc import Mapping

# Names of choices elsewhere -> ours, and why where it is another.
CHOICES: Mapping[str, Mapping[str, str]] = {
    "optim": {
        "adam": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_apex_fused": "adamw",
        "fusedadam": "adamw", "torch_adam": "adamw", "adam_w": "adamw", "adamw_anyprecision": "adamw", "optimi_adamw": "adamw",
        "torch.optim.adamw": "adamw", "adamw_8bit": "adamw8bit", "adamw_bnb_8bit": "adamw8bit", "adam8bit": "adamw8bit",
        "paged_adamw_8bit": "adamw8bit", "adamw_torch_8bit": "adamw8bit", "ao_adamw_8bit": "adamw8bit", "adam_8bit": "adamw8bit",
        "paged_adamw_32bit": "adamw", "adamw_torch_4bit": "adamw8bit", "lion_32bit": "lion", "lion_8bit": "lion8bit",
        "lion_pytorch": "lion", "paged_lion_8bit": "lion8bit", "paged_lion_32bit": "lion", "galore_adamw": "galore",
        "galore_adamw_8bit": "galore", "galore_adamw_layerwise": "galore", "galore_adafactor": "galore",
        "q_galore_adamw8bit": "galore", "apollo_adamw": "apollo", "apollo_adamw_layerwise": "apollo", "apollo-mini": "apollo_mini",
        "adafactor_hf": "adafactor", "dist_muon": "muon", "onebitadam": "adamw", "zerooneadam": "adamw",
    },
    "schedule": {
        "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine",
        "warmup_stable_decay": "wsd", "warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine",
        "onecycle": "one_cycle", "1cycle": "one_cycle", "lrrangetest": "lr_range", "cosine_annealing": "cosine",
        "linear_with_warmup": "linear", "cosine_with_warmup": "cosine", "polynomial": "linear", "trapezoidal": "wsd",
        "inverse-square-root": "infinite", "cosineannealinglr": "cosine", "rex": "linear", "none": "constant",
    },
    "precision": {
        "bfloat16": "bf16", "bf16-mixed": "bf16", "bf16-true": "bf16", "float16": "fp16", "16-mixed": "fp16", "16": "fp16",
        "half": "fp16", "float32": "fp32", "32": "fp32", "32-true": "fp32", "no": "fp32", "tf32": "fp32", "float64": "fp64",
        "64-true": "fp64", "double": "fp64", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32",
    },
    "tracker": {
        "weights_and_biases": "wandb", "wandblogger": "wandb", "tensorboardlogger": "tensorboard", "tb": "tensorboard",
        "false": "none", "null": "none", "all": "wandb", "true": "wandb",
    },
    "model": {
        "debugmodel": "tiny", "8b": "llama3_8b", "70b": "llama3_70b", "llama3": "llama3_8b", "llama": "llama_130m",
        "llama_3_8b": "llama3_8b", "llama_3_1_8b": "llama3_8b", "meta_llama_3_8b": "llama3_8b", "meta_llama_3_1_8b": "llama3_8b",
        "llama_3_70b": "llama3_70b", "meta_llama_3_70b": "llama3_70b", "llama_7b": "llama3_8b", "llama_2_7b": "llama3_8b",
        "llama2_7b": "llama3_8b", "gpt2": "llama_130m", "gpt2_medium": "llama_350m", "gpt2_xl": "llama_1b",
        "llama_3_2_1b": "llama3_2_1b", "llama_3_2_3b": "llama3_2_3b", "llama3_2": "llama3_2_3b", "llama3_1_8b": "llama3_8b",
        "llama3_1_70b": "llama3_70b", "llama3_3_70b": "llama3_70b", "mistral": "mistral_7b", "mistral_7b_v0_3": "mistral_7b",
        "qwen2_5": "qwen2_5_7b", "qwen2": "qwen2_5_7b", "qwen2_7b": "qwen2_5_7b", "qwen2_0_5b": "qwen2_5_0_5b",
        "qwen3": "qwen3_0_6b", "gemma": "gemma3_1b", "gemma2": "gemma2_2b", "gemma3": "gemma3_1b", "gemma_2_2b": "gemma2_2b",
        "gemma_3_1b": "gemma3_1b", "phi3": "phi3_mini", "phi4": "phi4_mini", "phi_3_mini_4k_instruct": "phi3_mini",
        "phi_4_mini_instruct": "phi4_mini", "olmo2": "olmo2_1b", "olmo_2_1b": "olmo2_1b", "smollm2": "smollm2_135m",
        "smollm": "smollm2_135m", "smollm3": "smollm3_3b", "granite": "granite3_3_2b", "granite_3_3_2b": "granite3_3_2b",
    },
    "data": {
        "shakespeare": "text", "openwebtext": "hf", "c4": "hf", "huggingface": "hf", "parquet": "hf", "json": "hf",
        "jsonl": "hf", "arrow": "hf", "bin": "tokens", "npy": "tokens", "memmap": "tokens", "txt": "text", "mock": "stdlib",
    },
    "sparsity": {"2:4": "nm", "n:m": "nm", "magnitude": "gradual", "gmp": "gradual", "dense": "none", "null": "none"},
}  # fmt: skip

# Choices that people look for and that are not here -> what comes nearest.
MISSING: Mapping[str, Mapping[str, str]] = {
    "optim": {
        "sgd": "there is no plain SGD; lion and muon keep one momentum",
        "lamb": "there is no LAMB; adamw with clip_norm is what large batches of language models use",
        "fusedlamb": "there is no LAMB; adamw with clip_norm is what large batches of language models use",
        "adagrad": "there is no Adagrad; adafactor keeps the least state of those with a rate of its own",
        "rmsprop": "there is no RMSprop; adamw with optim.betas=[0,0.99] is nearest",
        "sophia": "there is no Sophia; adamw or muon is nearest",
        "shampoo": "there is no Shampoo; muon is nearest",
        "soap": "there is no SOAP; muon is nearest",
        "schedule_free_adamw": "no rule is schedule-free; adamw with schedule=wsd can end at any step",
        "ademamix": "there is no AdEMAMix; adamw is nearest",
        "adam_mini": "there is no Adam-mini; apollo_mini keeps as little",
        "came_pytorch": "there is no CAME; adafactor is nearest",
        "lomo": "there is no LOMO; optim.in_backward=true frees each gradient as soon as it is used",
        "dion": "there is no Dion; muon is nearest",
        "prodigy": "no rule finds its own rate; optim.lr=null follows from the model's size",
    },
    "schedule": {
        "cosine_with_restarts": "nothing restarts; cosine, or schedule.rewarm_at for one second warm-up",
        "reduce_lr_on_plateau": "no schedule depends on the loss; wsd holds the rate, and decays at the end",
        "inverse_sqrt": "infinite falls to a constant and can be annealed at any step",
        "warmupdecay": "linear falls to 0",
    },
    "precision": {"fp8": "8-bit products are not built; bf16 is nearest", "int8": "8-bit products are not built; bf16 is nearest"},
    "tracker": {
        "comet_ml": "metrics.jsonl is always written",
        "neptune": "metrics.jsonl is always written",
        "clearml": "metrics.jsonl is always written",
        "dvclive": "metrics.jsonl is always written",
        "swanlab": "metrics.jsonl is always written",
    },
    "parallel": {
        "ddp": "give parallel.zero=0", "fsdp": "give parallel.zero=3", "fsdp2": "give parallel.zero=3",
        "full_shard": "give parallel.zero=3", "hsdp": "give parallel.zero=3 parallel.replicate=MACHINES",
        "deepspeed": "give parallel.zero=1, 2 or 3", "zero1": "give parallel.zero=1", "zero2": "give parallel.zero=2",
        "zero3": "give parallel.zero=3", "tp": "there is no tensor parallelism; parallel.ulysses shares the tokens",
        "pp": "give parallel.pipeline=N", "cp": "give parallel.ring=N", "sp": "give parallel.ulysses=N",
    },
}  # fmt: skip
