"""What a run on 2 workers refuses before it starts: name -> (overrides, what the message must hold)."""

TWO = ["parallel.pipeline=2"]
REFUSED = {
    "unknown key": (
        ["optim.learning_rate=1"],
        r"unknown key optim.learning_rate: write optim.lr=1 \(",
    ),
    "misspelt key": (["batch.micro_sise=1"], r"unknown key batch.micro_sise: .*did you mean batch.micro_size\?"),
    "added key": (["+model.depth=3"], r"unknown key model.depth: write model.layers=3"),
    "key of another choice": (["data=text", "data.separator=0"], r"unknown key data.separator: data has .*tokenizer"),
    "wrong type": (["batch.seq_len=long"], r"batch.seq_len=long: give a whole number"),
    "fraction for a whole number": (["steps=2.5"], r"steps=2.5: give a whole number"),
    "wrong type in a choice": (
        ["schedule=wsd", "schedule.warmup_steps=a"],
        r"schedule.warmup_steps='a': give a whole number",
    ),
    "unknown choice": (
        ["optim=sgd"],
        r"optim=sgd: possible are adafactor, adamw, .*muon; there is no plain SGD; lion and muon keep one momentum",
    ),
    "unknown name": (
        ["precision.name=fp8"],
        r"precision=fp8: possible are bf16, fp16, fp32, fp64; 8-bit products are not built",
    ),
    "not an override": (["steps"], r"steps"),
    "below a number": (["optim.lr.x=3"], r"unknown key optim.lr.x"),
    "no number": (["clip_norm=nan"], r"clip_norm=nan: give a finite number"),
    "a name of two lines": (
        ['name="a\nb"'],
        r"name='\"a\\nb\"' holds a control character \(U\+000A\); give a string of one",
    ),
    "a key of two lines": (["name\n=a"], r"a key of the configuration='name\\n' holds a control character"),
    "a word for the terminal": (
        ["model.name=\x1b[2J"],
        r"model.name='\\x1b\[2J' holds a control character \(U\+001B\)",
    ),
    "a long name": ([f"name={'a' * 300}"], r"name='a{57}\.\.\.' has 300 bytes: a run name has at most 200"),
    "no name": (["name=.."], r"name='..': a run name is the name of a folder"),
    "endless loss scale": (["precision=fp16", "precision.initial_scale=1e999"], r"finite"),
    "a stretch of no kind": (
        ["model.rope_scaling={kind: ntk, factor: 2.0}"],
        r"model.rope_scaling.kind='ntk': possible are 'llama3'",
    ),
    "a stretch that is none": (["model.rope_scaling=8"], r"model.rope_scaling=8: give a table, such as {kind: linear"),
    "rope": (["model.rope_theta=0"], r"model.rope_theta=0.0: it is above 0"),
    "no steps": (["steps=0"], r"steps=0: a run has at least 1 step"),
    "how long, twice": (
        ["tokens=2e6", "steps=100"],
        r"steps=100 tokens=2000000.0: each says how long the run is; give one of steps, tokens, epochs",
    ),
    "the batch, twice": (
        ["batch.global_size=16", "batch.global_tokens=4096"],
        r"batch.global_size=16 batch.global_tokens=4096: each says how large a step is; give one of batch.global_size",
    ),
    "fewer tokens than a step": (
        ["tokens=4000"],
        r"tokens=4000: less than a step, which is batch.global_size=16 x batch.seq_len=256 = 4,096 tokens; give at least",
    ),
    "tokens of no batch": (["tokens=2e6", "batch.seq_len=0"], r"batch.seq_len=0: it is at least 1"),
    "a batch of no sequence": (["batch.global_tokens=4096", "batch.seq_len=0"], r"batch.seq_len=0: it is at least 1"),
    "half a token": (["tokens=0.5"], r"tokens=0.5: give a whole number of tokens, such as 2000000, 2e6 or 2M"),
    "no epochs": (["epochs=0"], r"epochs=0: how often the run reads the data, above 0"),
    "too little of an epoch": (
        ["epochs=1e-6"],
        r"epochs=1e-06: less than a step: the data has .* samples and a step takes",
    ),
    "half a sequence": (
        ["batch.global_tokens=5000"],
        r"batch.global_tokens=5000 is no whole number of sequences of batch.seq_len=256 tokens; the nearest that are "
        r"\[4864, 5120\]",
    ),
    "tokens that ranks cannot share": (
        ["batch.global_tokens=5120"],
        r"batch.global_tokens=5120 does not divide into 2 data-parallel ranks x batch.micro_size=8 sequences; the nearest that "
        r"do are \[4096, 8192\]",
    ),
    "no length": (
        ["eval.every=often"],
        r"eval.every=often: give steps \(100\), a share of the run \(0.1 or 10%\), tokens",
    ),
    "an interval below 0": (["checkpoint.every=-1"], r"checkpoint.every=-1: give steps"),
    "an interval of less than a step": (
        ["eval.every=100 tokens"],
        r"eval.every=100 tokens: less than a step, of 4,096 tokens; give at least that",
    ),
    "lines by time": (["log_every=10s"], r"log_every=10s: it cannot be said in time; give steps \(100\), a share"),
    "masks by a clock": (
        ["sparsity=rigl", "sparsity.update_every=10min"],
        r"sparsity.update_every=10min: it cannot be said in time; give steps \(100\), a share of the run .* or tokens",
    ),
    "a warm-up by a clock": (
        ["schedule=cosine", "schedule.warmup_steps=1h"],
        r"schedule.warmup_steps=1h: it cannot be said in time; give steps \(100\) or tokens",
    ),
    "a share for steps": (
        ["schedule=cosine", "schedule.warmup_steps=0.1"],
        r"schedule.warmup_steps=0.1: a number of steps; for a share of the run give schedule.warmup=0.1",
    ),
    "tokens for a share": (
        ["sparsity=rigl", "sparsity.stop=2M tokens"],
        r"sparsity.stop=2M tokens: a share of the run, from 0 to 1; for steps or tokens give sparsity.stop_at=2M tokens",
    ),
    "a warm-up of less than a step": (
        ["schedule=cosine", "schedule.warmup_steps=4k tokens"],
        r"schedule.warmup_steps=4k tokens: less than a step, of 4,096 tokens",
    ),
    "no lines": (["log_every=0"], r"log_every=0: it is at least 1 step"),
    "heads": (
        ["model.heads=3"],
        r"model.dim=256 is not divisible by model.heads=3; give a multiple of 3, or model.head_dim",
    ),
    "key/value heads": (["model.kv_heads=3"], r"model.kv_heads=3; possible for kv_heads are \[1, 2, 4\]"),
    "8 bits for a stable embedding": (
        ["model.stable_embedding=true", "optim=adamw8bit", "optim.assign=[{match: embed.weight, rule: adamw8bit}]"],
        r"keeps the embedding's states in 32 bits, and optim.assign gives it adamw8bit; give it adamw or own, or",
    ),
    "odd head dim": (["model.head_dim=31"], r"head dim is 31: .*must be even"),
    "batch": (
        ["batch.global_size=20"],
        r"batch.global_size=20 does not divide into 2 .*batch.micro_size=8; .*\[16, 32\]",
    ),
    "degrees": (["parallel.shard=3"], r"replicate=1 x parallel.shard=3 = 3 workers, but the world size is 2"),
    "replicate": (
        ["parallel.replicate=3"],
        r"parallel.replicate=3 does not divide the world size 2; possible are \[1, 2\]",
    ),
    "pipeline degree": (
        ["parallel.pipeline=3"],
        r"pipeline=3 x parallel.replicate=1 does not divide the world size 2; possible",
    ),
    "pipeline and shard": (
        ["parallel.pipeline=2", "parallel.shard=2"],
        r"= 4 workers, but the world size is 2; start 4 workers",
    ),
    "stages without layers": (
        [*TWO, "parallel.virtual_stages=3", "parallel.pipeline_schedule=gpipe"],
        r"6 pipeline stages .*model.layers=4: a stage has at least one layer; give at most 4 stages",
    ),
    "virtual stages": (
        [*TWO, "parallel.virtual_stages=2"],
        r"pipeline_schedule=1f1b with parallel.virtual_stages=2: possible is 1",
    ),
    "too few virtual stages": (
        [*TWO, "parallel.pipeline_schedule=zb_v"],
        r"zb_v with parallel.virtual_stages=1: possible is 2;",
    ),
    "micro-batches": (
        [*TWO, "parallel.pipeline_schedule=zb_h2"],
        r"zb_h2 on 2 ranks needs at least 3 micro-batches a step and there are 2; .*or one of gpipe, 1f1b",
    ),
    "one micro-batch": (
        [*TWO, "batch.global_size=8"],
        r"1f1b on 2 ranks needs at least 2 micro-batches a step and there are 1",
    ),
    "unit": (
        [*TWO, "parallel.pipeline_schedule=blockwise", "parallel.pipeline_unit=3"],
        r"parallel.pipeline_unit=3: a unit of blockwise has from 2 \(the ranks\) to 2",
    ),
    "unit of another": ([*TWO, "parallel.pipeline_unit=2"], r"pipeline_unit=2 with 1f1b: only blockwise has units"),
    "unknown schedule": (
        [*TWO, "parallel.pipeline_schedule=2f2b"],
        r"pipeline_schedule=2f2b: possible are gpipe, .*auto",
    ),
    "missing schedule": ([*TWO, "parallel.pipeline_schedule=no.csv"], r"pipeline_schedule=no.csv: .*No such file"),
    "a schedule with a cycle": (
        [*TWO, "parallel.pipeline_schedule={folder}/cycle.csv"],
        r"wait for each other in a circle: .*cycle.csv, line 1 stops at 0B0, .*cycle.csv, line 2 stops at 1F1",
    ),
    "a schedule of another step": (
        [*TWO, "parallel.pipeline_schedule={folder}/short.csv"],
        r"short.csv, line 1: 0F1 is missing",
    ),
    "gathering below stage 3": (
        [*TWO, "parallel.pipeline_gather=run"],
        r"gather=run with parallel.zero=1, .*give parallel.zero=3",
    ),
    "tracing beyond the end": (
        [*TWO, "parallel.pipeline_trace=201"],
        r"pipeline_trace=201: a step of the 200, counted from 1",
    ),
    "memory of another": (
        [*TWO, "parallel.pipeline_memory=2"],
        r"pipeline_memory=2.0 with 1f1b: only auto looks at it",
    ),
    "too little memory": (
        [*TWO, "parallel.pipeline_schedule=auto", "parallel.pipeline_memory=0.1"],
        r"pipeline_memory=0.1: 1 is what 1f1b holds, 2",
    ),
    "costs": (
        [*TWO, "parallel.pipeline_schedule=auto", "parallel.pipeline_costs=/no.json"],
        r"costs=/no.json: .*leave it null",
    ),
    "a schedule without a pipeline": (
        ["parallel.pipeline_schedule=zb_h1"],
        r"pipeline_schedule=zb_h1 with parallel.pipeline=1: there is no pipeline",
    ),
    "compiled halves": (
        [*TWO, "compile=true", "parallel.pipeline_schedule=zb_h1"],
        r"compile=true with .*zb_h1: .*or gpipe, 1f1b or interleaved",
    ),
    "stages in the backward": (
        [*TWO, "optim.in_backward=true", "clip_norm=0"],
        r"in_backward with parallel.pipeline=2",
    ),
    "a step that cannot be taken back": (
        [*TWO, "parallel.post_validation=true", "optim=muon"],
        r"post_validation with optim=muon: .*possible are adamw, adamw8bit",
    ),
    "a norm that cannot be taken back": (
        [*TWO, "parallel.post_validation=true", "optim=lion", "optim.kappa=l2"],
        r"post_validation with optim=lion optim.kappa=l2: .*lion with optim.kappa=l1, rows or huber",
    ),
    "huber without its size": (
        ["optim=lion", "optim.kappa=huber"],
        r"optim.delta=None with optim.kappa=huber: it belongs to huber, which needs it",
    ),
    "a size without huber": (
        ["optim=lion", "optim.delta=0.1"],
        r"optim.delta=0.1 with optim.kappa=l1: .*leave it null",
    ),
    "a size below zero": (["optim=lion", "optim.kappa=huber", "optim.delta=-1"], r"optim.delta=-1.0: it is above 0"),
    "an unknown norm": (["optim=lion", "optim.kappa=l3"], r"optim.kappa='l3': possible are 'l1', 'l2', 'rows'"),
    "heads that do not divide": (
        ["parallel.ulysses=2", "model.heads=5", "model.kv_heads=5", "model.head_dim=4"],
        r"parallel.ulysses=2 with model.heads=5: .*possible are \[1, 5\], and parallel.ring",
    ),
    "an order without a ring": (
        ["parallel.ring_order=striped"],
        r"ring_order=striped with parallel.ring=1: there is no ring",
    ),
    "unknown order": (
        ["parallel.ring=2", "parallel.ring_order=random"],
        r"ring_order='random': possible are 'contiguous', 'zig",
    ),
    "no ranks to share": (["parallel.ring=0"], r"parallel.ring=0: degrees are at least 1"),
    "too many to share": (
        ["parallel.ring=2", "parallel.ulysses=2"],
        r"replicate=1 x parallel.ring=2 x parallel.ulysses=2 does not divide .* size 2",
    ),
    "ranks that are not there": (
        ["parallel.ring=2", "parallel.shard=2"],
        r"parallel.ring=2 x parallel.shard=2 = 4 workers, but the world size is 2",
    ),
    "backend": (["parallel.backend=megatron"], r"parallel.backend='megatron': possible are .*'torch'"),
    "codes of what DeepSpeed wraps": (
        ["parallel.backend=accelerate", "parallel.zero=3", "memory.compress=int8"],
        r"memory.compress=int8 with parallel.backend=accelerate parallel.zero=3: .*; give memory.compress=none",
    ),
    "a peak of nothing": (["peak_flops=0"], r"peak_flops=0.0: FLOP/s of one device"),
    "zero": (["parallel.zero=4"], r"parallel.zero=4: possible are 0, 1, 2 and 3"),
    "learning rate": (["optim.lr=0"], r"optim.lr=0.*above 0"),
    "a rate by size that a rule does not have": (
        ["optim=galore", "optim.lr=null"],
        r"optim.lr=null with optim=galore: its rate does not follow from the model's size; give a number",
    ),
    "betas": (["optim.betas=[0.9]"], r"optim.betas=\[0.9\]: two numbers"),
    "unknown rule": (
        ["optim=shampoo"],
        r"optim=shampoo: possible are adafactor, .*; there is no Shampoo; muon is nearest",
    ),
    "rank above the narrow side": (
        ["optim=galore", "optim.rank=129"],
        r"optim.rank=129 is above the narrow side of blocks.0.attention.wk.weight, \(128, 256\); give at most 128, null for",
    ),
    "rank": (["optim=fira", "optim.rank=0"], r"optim.rank=0: it is at least 1"),
    "growth": (["optim=fira", "optim.growth=0.5"], r"optim.growth=0.5: .*at least 1; null is no limit"),
    "growth of a rule without a limiter": (["optim=galore", "+optim.growth=1.01"], r"unknown key optim.growth"),
    "form": (["optim=fira", "optim.form=mine"], r"optim.form='mine': possible are 'code' or 'paper'"),
    "side": (["optim=dct", "optim.side=left"], r"optim.side='left': possible are 'right' or 'short'"),
    "state bits": (["optim=galore", "optim.state_bits=4"], r"optim.state_bits=4: possible are 8 or 32"),
    "momentum": (["optim=muon", "optim.momentum=1"], r"optim.momentum=1"),
    "adafactor": (["optim=adafactor", "optim.clip_threshold=0"], r"clip_threshold is above 0"),
    "an 8-bit rule on a vector": (
        ["optim.assign=[{match: '*norm*', rule: adamw8bit}]"],
        r"adamw8bit is for matrices, and blocks.0.attention_norm.weight",
    ),
    "a pattern without a parameter": (
        ["optim.assign=[{match: 'layers.*', rule: adamw}]"],
        r"no parameter matches 'layers.\*'; there are blocks.\*.attention",
    ),
    "a pattern that an earlier one hides": (
        ["optim.assign=[{match: '*', rule: adamw}, {match: 'embed.*', rule: lion}]"],
        r"no parameter matches 'embed.\*' that no earlier pattern takes",
    ),
    "unknown key in a list": (
        ["optim.assign=[{match: '*', rule: adamw, lr: 1e-5}]"],
        r"unknown key optim.assign\[0\].lr: optim.assign\[0\] has match, rule",
    ),
    "a rule that cannot be assigned": (
        ["optim.assign=[{match: '*', rule: sgd}]"],
        r"optim.assign.*rule='sgd': possible are",
    ),
    "clipping in the backward": (
        ["optim.in_backward=true"],
        r"optim.in_backward with clip_norm=1.0: .*give clip_norm=0",
    ),
    "accumulation in the backward": (
        ["optim.in_backward=true", "clip_norm=0", "batch.micro_size=4"],
        r"with 2 micro-batches a step: .*give batch.micro_size=8 or batch.global_size=8",
    ),
    "fp16 in the backward": (
        ["optim.in_backward=true", "clip_norm=0", "precision=fp16"],
        r"in_backward with precision=fp16",
    ),
    "replicas in the backward": (
        ["optim.in_backward=true", "clip_norm=0", "parallel.zero=0", "precision=bf16"],
        r"in_backward with parallel.replicate=1 parallel.zero=0: .*give parallel.replicate=1 and parallel.zero=1 to 3",
    ),
    "split gradients in bf16": (
        ["optim.param_dtype=bf16", "precision=bf16", "parallel.zero=2", "batch.micro_size=4"],
        r"parallel.zero=2 and 2 micro-batches a step: .*give parallel.zero=1, or batch.micro_size=8",
    ),
    "8-bit moments of rank 1": (["optim=apollo_mini", "+optim.state_bits=8"], r"unknown key optim.state_bits"),
    "bf16 parameters": (
        ["optim.param_dtype=bf16"],
        r"optim.param_dtype=bf16 with precision=fp32: .*give precision=bf16",
    ),
    "schedule too long": (["schedule=wsd", "schedule.decay_steps=500"], r"take 504 steps and the run has 200"),
    "two lengths of one phase": (
        ["schedule=cosine", "schedule.warmup=0.1", "schedule.warmup_steps=5"],
        r"schedule.warmup=0.1 schedule.warmup_steps=5: a share of the run or a number of steps; give one of the two",
    ),
    "a cycle of a momentum that is not there": (
        ["optim=muon", "schedule.momentum=[0.95,0.85]"],
        r"schedule.momentum=\[0.95, 0.85\] with optim=muon: .*possible are adamw, .*or schedule.momentum=null",
    ),
    "a cycle of one number": (
        ["schedule.momentum=[0.95]"],
        r"schedule.momentum=\[0.95\]: two numbers .*the high one first",
    ),
    "a range test whose next step has begun": (
        [*TWO, "parallel.post_validation=true", "schedule=lr_range"],
        r"schedule=lr_range with parallel.post_validation: .*give parallel.post_validation=false",
    ),
    "annealing": (["schedule=infinite", "schedule.anneal_steps=5"], r"without schedule.anneal_at"),
    "held-out share": (["data.holdout=1"], r"data.holdout=1.*share from 0 to below 1"),
    "a mixture of nothing": (["data=mixture"], r"data.sources is empty; give a list of sources"),
    "a mixture with a wrong source": (
        ["data=mixture", "data.sources=[{name: stdlib, weight: 1}, {name: text, files: /nowhere, weight: 2}]"],
        r"data.sources, text: data.files: /nowhere names no file",
    ),
    "more than a mixture has": (
        ["data=mixture", "data.sources=[{name: stdlib, weight: 1}]", "data.when_short=stop", "steps=1e9"],
        r"data.when_short=stop: the sources have [\d,]+ samples in all, and the run reads 16,000,000,000; give fewer steps",
    ),
    "nothing held out": (["data.holdout=0"], r"eval.every is on and data.holdout=0"),
    "no files": (["data=text"], r"data.files is empty; give a path, a folder or a glob"),
    "missing file": (["data=text", "data.files=/nowhere/*.txt"], r"/nowhere/\*.txt names no file"),
    "missing tokenizer": (
        ["data=text", "data.files={folder}", "data.tokenizer=/no.json"],
        r"tokenizer=/no.json: no such file",
    ),
    "no tokenizer file": (
        ["data=text", "data.files={folder}", "data.tokenizer={folder}/0.txt"],
        r"not a tokenizer.json",
    ),
    "vocabulary": (
        ["model.vocab_size=100"],
        r"go up to 255, but model.vocab_size=100; give model.vocab_size=256 or more",
    ),
    "tokens beyond the vocabulary": (
        ["data=tokens", "data.files={folder}/tokens.bin", "model.vocab_size=50", "sample.tokens=0"],
        r"go up to 60, but model.vocab_size=50",
    ),
    "too little data": (
        ["data=text", "data.files={folder}/0.txt", "batch.seq_len=9999", "data.holdout=0", "eval.every=0"],
        r"one sample takes batch.seq_len \+ 1 = 10000",
    ),
    "column": (
        ["data=hf", "data.files={folder}/rows.jsonl", "data.column=body"],
        r"no text in column 'body'; its columns are text",
    ),
    "sampling tokens": (
        ["data=tokens", "data.files={folder}/tokens.bin", "sample.tokens=5"],
        r"has no tokenizer to write with; give sample.tokens=0",
    ),
    "empty prompt": (["sample.prompt=''"], r"sample.prompt='' has no token to go on from"),
    "resume": (["resume=/nowhere"], r"resume=/nowhere: no checkpoint there; give auto, never, or the path"),
    "no run directory": (["run_dir="], r"run_dir is empty: give the folder of the run, such as runs/NAME"),
    "a home that is none": (["run_dir='~nobody-at-all/x'"], r"run_dir=~nobody-at-all/x: there is no such user's home"),
    "run directory": (["run_dir=/dev/null/run"], r"run_dir=/dev/null/run cannot be written .*give another run_dir"),
    "init_from": (
        ["model.init_from=/nowhere"],
        r"model.init_from=/nowhere: .*No such file.*give a Hugging Face folder",
    ),
    "a shape that the folder contradicts": (
        ["model.init_from={folder}/source", "model.layers=3"],
        r"model.init_from=.*source: it is another model, model.layers=4 there and 3 here; .*leave out model= and the model.\*",
    ),
    "a preset that the folder contradicts": (
        ["model.init_from={folder}/source", "model=llama_60m"],
        r"model.init_from=.*source: it is another model, model.layers=4 there and 8 here, model.dim=256 there and 512 here",
    ),
    "a folder without weights": (
        ["model.init_from={folder}/source"],
        r"source: no .*index.json and no model.safetensors",
    ),
    "keep": (["checkpoint.keep=-1"], r"checkpoint.keep=-1"),
    "clip": (["clip_norm=-1"], r"clip_norm=-1"),
    "name": (["name=a/b"], r"name='a/b'"),
    "more than all activations": (["memory.recompute=1.5"], r"memory.recompute=1.5: .* may stay, from 0 to 1"),
    "less than no activation": (["memory.recompute=-0.1"], r"memory.recompute=-0.1: .* may stay, from 0 to 1"),
    "codes of compiled blocks": (
        ["memory.compress=int8", "compile=true"],
        r"memory.compress=int8 with compile=true: what a compiled block keeps is the compiler's choice",
    ),
    "codes of what others make again": (
        ["memory.compress=int8", "memory.recompute=full", "parallel.ulysses=2"],
        r"memory.compress=int8 with memory.recompute=full parallel.ulysses=2 parallel.ring=1: ranks that share sequences keep",
    ),
    "ranges of no codes": (
        ["memory.ranges=running"],
        r"memory.ranges=running with memory.compress=none: there are no codes .*give memory.compress=int8, or memory.ranges=token",
    ),
    "ranges of what may be undone": (
        [
            "memory.compress=int8",
            "memory.ranges=running",
            "parallel.pipeline=2",
            "parallel.post_validation=true",
        ],
        r"memory.ranges=running with parallel.post_validation=true: .* depend on the layout; give memory.ranges=token, or",
    ),
    "a share of nothing that leaves": (
        ["memory.offload_share=0.5"],
        r"memory.offload_share=0.5 with memory.offload_activations=none: nothing leaves the device; give memory.offload_activations=",
    ),
    "more than everything leaves": (
        ["memory.offload_activations=cpu", "memory.offload_share=1.5"],
        r"memory.offload_share=1.5: all, auto, or the share of what layers keep that leaves the device, from 0 to 1",
    ),
    "nothing to keep in fewer bits": (
        ["model.frozen_dtype=nf4"],
        r"model.frozen_dtype=nf4: nothing is frozen; give an adapter, such as adapter=lora, or freeze matrices with optim.assign",
    ),
    "a block wider than a matrix": (
        ["adapter=bone", "adapter.rank=300"],
        r"adapter.rank=300: it is at least 1, and at most the columns of blocks.0.attention.wq.weight, \(256, 256\); give 1 to 256",
    ),
    "bytes that are rounded": (
        ["model.frozen_dtype=nf4", "adapter=lora", "parallel.quantize_gather=int8"],
        r"model.frozen_dtype=nf4 with parallel.quantize_gather=int8: .*give parallel.quantize_gather=none, or model.frozen_dtype",
    ),
    "16 bits, twice": (
        ["model.frozen_dtype=bf16", "adapter=lora", "optim.param_dtype=bf16", "precision=bf16"],
        r"model.frozen_dtype=bf16 with optim.param_dtype=bf16: every parameter is in 16 bits; give model.frozen_dtype=null",
    ),
    "other bits of what is frozen": (
        ["model.frozen_dtype=nf3", "adapter=lora"],
        r"model.frozen_dtype='nf3': .*'bf16', 'int8' or 'nf4'",
    ),
    "other bits to gather": (["parallel.quantize_gather=int4"], r"quantize_gather='int4': .*'none' or 'int8'"),
    "masks of rounded weights": (
        ["parallel.quantize_gather=int8", "sparsity=nm"],
        r"parallel.quantize_gather=int8 with sparsity=nm: .*give parallel.quantize_gather=none, or another sparsity",
    ),
    "rounded on their way to one rank": (
        [
            "parallel.quantize_gather=int8",
            "memory.offload_params=cpu",
            "memory.offload_states=cpu",
            "parallel.zero=3",
            "parallel.shard=1",
            "parallel.replicate=2",
        ],
        r"parallel.quantize_gather=int8 with memory.offload_params=cpu on one rank: .*quantize_gather=none, or parallel.shard above 1",
    ),
    "gradients in other bits": (
        ["parallel.quantize_reduce=int2"],
        r"quantize_reduce='int2': .*'none', 'int8' or 'int4'",
    ),
    "gradients that are not split": (
        ["parallel.quantize_reduce=int4", "parallel.zero=0"],
        r"parallel.quantize_reduce=int4 with parallel.zero=0 over shard x ring x ulysses = 2: .*quantize_reduce=none",
    ),
    "gradients of one owner": (
        ["parallel.quantize_reduce=int4", "parallel.shard=1", "parallel.replicate=2"],
        r"parallel.quantize_reduce=int4 with parallel.zero=1 over shard x ring x ulysses = 1: .*over more ranks, or",
    ),
    "gradients rounded in 64 bits": (
        ["parallel.quantize_reduce=int8", "precision=fp64"],
        r"parallel.quantize_reduce=int8 with precision=fp64: .*give parallel.quantize_reduce=none, or precision=fp32, bf16 or fp16",
    ),
    "gradients rounded on DeepSpeed": (
        ["parallel.quantize_reduce=int8", "parallel.backend=accelerate"],
        r"parallel.quantize_reduce=int8 with parallel.backend=accelerate: .*give parallel.quantize_reduce=none, or",
    ),
    "rounded on DeepSpeed": (
        ["parallel.quantize_gather=int8", "parallel.backend=accelerate"],
        r"parallel.quantize_gather=int8 with parallel.backend=accelerate: .*give parallel.quantize_gather=none, or parallel.backend",
    ),
    "copies on DeepSpeed": (
        ["parallel.inner_shard=1", "parallel.backend=accelerate", "parallel.zero=3"],
        r"parallel.inner_shard=1 with parallel.backend=accelerate: .*give parallel.inner_shard=0, or parallel.backend=torch",
    ),
    "copies that serve nothing": (
        ["parallel.inner_shard=1", "parallel.zero=2"],
        r"parallel.inner_shard=1 with parallel.zero=2: .*give parallel.zero=3, or parallel.inner_shard=0",
    ),
    "copies among all": (
        ["parallel.inner_shard=2", "parallel.zero=3"],
        r"parallel.inner_shard=2, of shard x ring x ulysses = 2 ranks that split states: possible are \[1\], such as",
    ),
    "copies among fewer than none": (
        ["parallel.inner_shard=-1", "parallel.zero=3"],
        r"parallel.inner_shard=-1, of shard x ring x ulysses = 2 ranks .*possible are \[1\]",
    ),
    "rounded in the backward over replicas": (
        ["optim.in_backward=true", "clip_norm=0", "parallel.zero=0", "parallel.quantize_gather=int8"],
        r"in_backward with parallel.replicate=1 parallel.zero=0: .*give parallel.replicate=1 and parallel.zero=1 to 3",
    ),
    "states away that may be taken back": (
        ["memory.offload_states=cpu", *TWO, "parallel.post_validation=true"],
        r"memory.offload_states=cpu with parallel.post_validation: .*give parallel.post_validation=false, or memory.offload_states=n",
    ),
    "states away of an engine": (
        ["memory.offload_states=cpu", "parallel.backend=accelerate"],
        r"memory.offload_states=cpu with parallel.backend=accelerate: .*parallel.deepspeed.offload_optimizer.*; give memory.offload",
    ),
    "states in no folder": (
        ["memory.offload_states=nvme"],
        r"memory.offload_states=nvme: there is no such folder; possible are none, cpu, or the path of a folder, which you make",
    ),
    "parameters away, states here": (
        ["memory.offload_params=cpu", "parallel.zero=3"],
        r"memory.offload_params=cpu with memory.offload_states=none: .*give memory.offload_states=cpu or a folder",
    ),
    "parameters away that stay gathered": (
        ["memory.offload_params=cpu", "memory.offload_states=cpu", "parallel.zero=2"],
        r"memory.offload_params=cpu with parallel.zero=2: .*give parallel.zero=3, whose layers come one by one, on one rank too",
    ),
    "gradients away, parameters here": (
        ["memory.offload_gradients=cpu"],
        r"memory.offload_gradients=cpu with memory.offload_params=none: .*give memory.offload_params=cpu or a folder",
    ),
    "gradients away that do not wait": (
        [
            "memory.offload_params=cpu",
            "memory.offload_states=cpu",
            "memory.offload_gradients=cpu",
            "parallel.zero=3",
            "optim.in_backward=true",
            "clip_norm=0",
        ],
        r"memory.offload_gradients=cpu with optim.in_backward: .*give memory.offload_gradients=none, or optim.in_backward=false",
    ),
    "rows in no folder": (
        ["memory.offload_params=nvme", "memory.offload_states=cpu", "parallel.zero=3"],
        r"memory.offload_params=nvme: there is no such folder; possible are none, cpu, or the path of a folder",
    ),
    "rows away of an engine that keeps them": (
        ["parallel.backend=accelerate", "parallel.zero=3", "memory.offload_params=cpu", "memory.offload_states=cpu"],
        r"memory.offload_params=cpu with parallel.backend=accelerate: .*give memory.offload_params=none, or parallel.backend=torch",
    ),
    "another number of bits": (["memory.compress=int4"], r"memory.compress='int4': .*'none' or 'int8'"),
    "activations in no folder": (
        ["memory.offload_activations=nvme"],
        r"memory.offload_activations=nvme: there is no such folder; possible are none, cpu, or the path of a folder",
    ),
    "another way to recompute": (
        ["memory.recompute=half"],
        r"memory.recompute='half': .*'none', 'selective' or 'full', or a number",
    ),
    "norms of gradients that are gone": (
        ["log.norms_every=10", "optim.in_backward=true", "clip_norm=0", "batch.micro_size=8"],
        r"log.norms_every=10 with optim.in_backward: .*give log.norms_every=0, or optim.in_backward=false",
    ),
    "one step to profile": (["profile.steps=[20]"], r"profile.steps=\[20\]: give the first step and the last"),
    "steps backwards": (["profile.steps=[5,3]"], r"profile.steps=\[5, 3\]: give the first step and the last"),
    "too long a profile": (["profile.steps=[1,200]"], r"profile.steps=\[1, 200\]: .*at most 100"),
    "a profile beyond the end": (["profile.steps=[199,201]"], r"profile.steps=\[199, 201\]: the run has 200 steps"),
    "less than no memory": (["memory.limit=-1"], r"memory.limit=-1.0: the bytes of a device .* 70e9 say; null: all"),
    "a step that is not made": (["profile.memory_step=900"], r"profile.memory_step=900: give one of the \d+ steps"),
    "a rank that there is not": (["profile.ranks=[2]"], r"profile.ranks=\[2\]: give some of 0 to 1, or null"),
    "nobody to profile": (["profile.ranks=[]"], r"profile.ranks=\[\]: give some of 0 to 1, or null"),
    "an average that never moves": (
        ["average.ema=1"],
        r"average.ema=1.0: how much of the average a move keeps, between 0 and 1",
    ),
    "an average after no update": (
        ["average.ema=0.9", "average.every=0"],
        r"average.every=0: updates from one move .* at least 1",
    ),
    "no average on the host": (
        ["average.offload=cpu"],
        r"average.offload=cpu with average.ema=null, which keeps no average; give average.ema=0.999, or leave it out",
    ),
    "an average of moving masks": (
        ["average.ema=0.9", "sparsity=rigl"],
        r"average.ema=0.9 with sparsity=rigl: its masks move.*possible are sparsity=none, sparsity=static, sparsity=nm, or",
    ),
    "an average of flat pieces": (
        ["average.ema=0.9", "parallel.backend=accelerate", "parallel.zero=3"],
        r"average.ema=0.9 with parallel.backend=accelerate: DeepSpeed has the weights in flat pieces",
    ),
    "norms by the clock": (["log.norms_every=20min"], r"log.norms_every=20min: .*give steps"),
    "a skip in the backward": (
        ["on_spike=skip", "optim.in_backward=true", "clip_norm=0"],
        r"on_spike=skip with optim.in_backward: .*give on_spike=rollback, .*or on_spike=record",
    ),
    "nothing to go back to": (
        ["on_spike=rollback", "checkpoint.every=0"],
        r"on_spike=rollback with checkpoint.every=0: .*give checkpoint.every=10%, say, or on_spike=skip",
    ),
    "nothing to go back to before the end": (
        ["on_spike=rollback", "steps=100"],
        r"on_spike=rollback with checkpoint.every=100: there is nothing to go back to before the end .* steps=100; give",
    ),
    "a clock that says where to go back to": (
        ["on_spike=rollback", "checkpoint.every=20min"],
        r"on_spike=rollback with checkpoint.every=20min: a clock .*give checkpoint.every=10%",
    ),
    "a rollback past the end of a source": (
        ["on_spike=rollback", "data=mixture", "data.sources=[{name: stdlib, weight: 1}]", "data.when_short=stop"],
        r"on_spike=rollback with data.when_short=stop: .*give on_spike=skip, or data.when_short=repeat",
    ),
    "a test that skips what it looks for": (
        ["on_spike=skip", "schedule=lr_range"],
        r"on_spike=skip with schedule=lr_range: .*give on_spike=record",
    ),
    "a window of spikes": (["spike.window=19"], r"spike.window=19: .*20 to 1,000"),
    "no spread": (["spike.threshold=0"], r"spike.threshold=0.0 spike.most=10: .*above 0"),
    "another answer to spikes": (["on_spike=ignore"], r"on_spike='ignore': .*'record', 'skip' or 'rollback'"),
    "tracker": (["tracker=wandb", "tracker.mode=on"], r"tracker.mode=.*'online' or 'offline'"),
    # of sparsity
    "density 0": (["sparsity=rigl", "sparsity.density=0"], r"sparsity.density=0.0: .* above 0 and at most 1"),
    "density above 1": (["sparsity=st3", "sparsity.density=1.5"], r"sparsity.density=1.5: .* above 0 and at most 1"),
    "density of nothing": (
        ["sparsity=set", "sparsity.density=1e-7"],
        r"leaves blocks.0.attention.wq.weight, \(256, 256\), no weight; give a larger density",
    ),
    "less than a weight a row": (
        ["sparsity=srigl", "sparsity.density=0.003", "sparsity.distribution=uniform"],
        r"less than one weight for each of its 256 rows; give a larger density, or leave it out of sparsity.layers",
    ),
    "groups that columns do not have": (
        ["sparsity=nm", "sparsity.m=5"],
        r"sparsity.m=5 does not divide the 256 columns of blocks.0.attention.wq.weight; give another m, or leave",
    ),
    "groups that rows do not have": (
        ["sparsity=nm", "model.ffn_dim=706", "sparsity.layers=[*.w1.weight]"],
        r"sparsity.m=4 does not divide the 706 rows of blocks.0.feed_forward.w1.weight, .*sparsity.backward=row",
    ),
    "n above m": (["sparsity=nm", "sparsity.n=5"], r"sparsity.n=5 sparsity.m=4: n of every m weights are kept"),
    "stop beyond the run": (
        ["sparsity=rigl", "sparsity.stop_at=900"],
        r"sparsity.stop_at=900 is beyond the run of 200 steps; give at most steps=200",
    ),
    "start after the stop": (
        ["sparsity=gradual", "sparsity.start_at=160"],
        r"first change is at step 160 \(start_at=160\) and the last at 150 \(stop=0.75 of the run\) of 200; give a start",
    ),
    "a stop before the first step": (["sparsity=pdp", "sparsity.stop_at=0"], r"sparsity.stop_at=0: .* at least 1"),
    "a start that is said twice": (
        ["sparsity=st3", "sparsity.start=0.1", "sparsity.start_at=20"],
        r"sparsity.start=0.1 sparsity.start_at=20: a share of the run or a step; give one",
    ),
    "a share of the run above 1": (
        ["sparsity=pdp", "sparsity.stop=150"],
        r"sparsity.stop=150.0: a share of the run, from 0 to 1; for a step give sparsity.stop_at",
    ),
    "groups that keep everything": (
        ["sparsity=pdp_nm", "sparsity.n=4"],
        r"pdp_nm with 4:4 keeps everything; give n below m",
    ),
    "groups that columns do not have, softly": (
        ["sparsity=pdp_nm", "sparsity.m=5"],
        r"sparsity.m=5 does not divide the 256 columns of blocks.0.attention.wq.weight; give another m, or leave",
    ),
    "no row is kept": (
        ["sparsity=pdp_rows", "sparsity.density=0.001"],
        r"sparsity.density=0.001 leaves .*, no row; give a larger density",
    ),
    "pdp's groups with a density": (
        ["sparsity=pdp_nm", "sparsity.density=0.3"],
        r"unknown key sparsity.density: sparsity has .* n, ",
    ),
    "masks that would never change": (
        ["sparsity=rigl", "steps=100"],
        r"sparsity.update_every=100: no mask would ever change between step 0 and step 75, .*give at most 74, .*static",
    ),
    "2:4 without the hardware": (
        ["sparsity=nm", "sparsity.semi_structured=true", "precision=bf16"],
        r"sparsity.semi_structured: .*; give sparsity.semi_structured=false",
    ),
    "masks that change once": (
        ["sparsity=gradual", "sparsity.update_every=100%"],
        r"sparsity.update_every=100%: masks would not change within the run; give a share below it \(10%\) or steps",
    ),
    "no updates": (["sparsity=set", "sparsity.update_every=0"], r"sparsity.update_every=0: it is at least 1"),
    "everything replaced": (["sparsity=set", "sparsity.replace=1.0"], r"sparsity.replace=1.0: .* above 0 and below 1"),
    "no such layer": (
        ["sparsity=set", "sparsity.layers=[*.w4.weight]"],
        r"sparsity.layers: no hidden matrix matches '\*.w4.weight'; there are blocks.\*.attention.wk.weight, .*w3",
    ),
    "a layer that stays dense": (
        ["sparsity=set", "sparsity.layers=[blocks.*,head.weight]"],
        r"sparsity.layers: no hidden matrix matches 'head.weight'",
    ),
    "no layers": (["sparsity=set", "sparsity.layers=[]"], r"sparsity.layers is empty; give patterns"),
    "rows of equal numbers that others compete for": (
        ["sparsity=srigl", "sparsity.redistribute=true"],
        r"unknown key sparsity.redistribute: sparsity has ablate_below, density, .*update_every",
    ),
    "groups with a density": (
        ["sparsity=nm", "sparsity.density=0.3"],
        r"unknown key sparsity.density: sparsity has .* n, ",
    ),
    "a random mask over what was learned": (
        ["sparsity=rigl", "model.init_from={folder}/source"],
        r"sparsity=rigl with model.init_from=.*source: a random mask .*give sparsity.start_at=1 or later",
    ),
    "masks in the backward": (
        ["sparsity=rigl", "optim.in_backward=true", "clip_norm=0", "batch.micro_size=8"],
        r"optim.in_backward with sparsity=rigl: .*give optim.in_backward=false",
    ),
    "masks taken back": (
        ["sparsity=rigl", *TWO, "parallel.post_validation=true"],
        r"parallel.post_validation with sparsity=rigl: .*parallel.post_validation=false",
    ),
    "2:4 in 32 bits": (
        ["sparsity=nm", "sparsity.semi_structured=true"],
        r"sparsity.semi_structured with precision=fp32: .*give precision=bf16 or fp16",
    ),
    "another pattern than the hardware's": (
        ["sparsity=nm", "sparsity.m=8", "sparsity.semi_structured=true", "precision=bf16"],
        r"sparsity.semi_structured with 2:8: hardware knows 2:4 alone",
    ),
    "an adapter of no layer": (
        ["adapter=lora", "adapter.layers=[*.wz.*]"],
        r"adapter.layers: no hidden matrix matches '\*.wz.\*'; there are blocks.\*.attention.wk.weight, ",
    ),
    "an adapter of none": (["adapter=dora", "adapter.layers=[]"], r"adapter.layers is empty; give patterns such as"),
    "an adapter that is no smaller": (
        ["adapter=lora", "adapter.rank=999"],
        r"adapter.rank=999: it is at least 1, and at most the narrow side of blocks.0.attention.wq.weight, .*give 1 to ",
    ),
    "an adapter of nothing": (
        ["adapter=lora", "adapter.alpha=0"],
        r"adapter.alpha=0.0: it is above 0 \(alpha=rank multiplies by 1\)",
    ),
    "dropout of all": (
        ["adapter=lora", "adapter.dropout=1"],
        r"adapter.dropout=1.0: the share that is dropped, at least 0 and",
    ),
    "trained twice": (
        ["adapter=lora", "adapter.train=[*.w2.*]"],
        r"adapter.train: blocks.0.feed_forward.w2.weight has the adapter beside it, and learns by that alone; leave it out",
    ),
    "trained beside nothing": (
        ["adapter=lora", "adapter.train=[wz]"],
        r"adapter.train: no parameter matches 'wz'; there are ",
    ),
    "an adapter from nowhere": (
        ["adapter=lora", "adapter.init_from=/nowhere"],
        r"adapter.init_from=/nowhere: .*No such file.*; give a folder that PEFT or `rowwise export adapter_only=true` wrote",
    ),
    "an adapter of DeepSpeed's": (
        ["adapter=lora", "parallel.backend=accelerate", "parallel.zero=1"],
        r"adapter=lora with parallel.backend=accelerate: its engine knows no adapters; give parallel.backend=torch, or",
    ),
    "two things to begin as": (
        ["adapter=lora", "adapter.init=pissa", "adapter.init_from=/nowhere"],
        r"adapter.init=pissa with adapter.init_from=/nowhere: the folder says what A and B begin as; give adapter.init=kaiming, or",
    ),
    "batches of a beginning without data": (
        ["adapter=lora", "adapter.init_batches=4"],
        r"adapter.init_batches=4 with adapter.init=kaiming, which looks at no data; give adapter.init=eva or corda, or leave",
    ),
    "no batches to begin with": (
        ["adapter=lora", "adapter.init=eva", "adapter.init_batches=0"],
        r"adapter.init_batches=0: global batches that are looked at, at least 1",
    ),
    "batches of codes without data": (
        ["adapter=lq_lora", "adapter.init_batches=4"],
        r"adapter.init_batches=4 with adapter.fisher=false, which looks at no data; give adapter.fisher=true, or leave adapter.init_",
    ),
    "no batches of gradients": (
        ["adapter=lq_lora", "adapter.fisher=true", "adapter.init_batches=0"],
        r"adapter.init_batches=0: global batches that are looked at, at least 1",
    ),
    "a part of another beginning": (
        ["adapter=lora", "adapter.init=eva", "adapter.corda_mode=knowledge"],
        r"adapter.corda_mode=knowledge with adapter.init=eva; give adapter.init=corda, or leave adapter.corda_mode out",
    ),
    "ranks shared out by another beginning": (
        ["adapter=lora", "adapter.init=pissa", "adapter.eva_rho=1.5"],
        r"adapter.eva_rho=1.5 with adapter.init=pissa; give adapter.init=eva, or leave adapter.eva_rho out",
    ),
    "less than a rank to share out": (
        ["adapter=lora", "adapter.init=eva", "adapter.eva_rho=0.5"],
        r"adapter.eva_rho=0.5: a matrix has at most so many times adapter.rank, at least 1, which shares nothing out",
    ),
    "ranks of what goes out of matrices": (
        [
            "adapter=lora",
            "adapter.init=corda",
            "adapter.layers=[*.0.*.wq.*]",
            "adapter.ranks={blocks.0.attention.wq.weight: 3}",
        ],
        r"adapter.ranks with adapter.init=corda, which gives each matrix as much; give adapter.init=eva or kaiming, or",
    ),
    "ranks of some matrices": (
        ["adapter=lora", "adapter.layers=[*.wq.*]", "adapter.ranks={blocks.0.attention.wq.weight: 3}"],
        r"adapter.ranks and adapter.layers say otherwise of blocks.1.attention.wq.weight; give each matrix of adapter.layers a rank",
    ),
    "ranks that eva did not share out": (
        [
            "adapter=lora",
            "adapter.init=eva",
            "adapter.rank=2",
            "adapter.layers=[*.0.*.wq.*]",
            "adapter.ranks={blocks.0.attention.wq.weight: 3}",
        ],
        r"adapter.ranks has 3 directions in all, and eva shares out adapter.rank=2 for each of 1 matrices; give adapter.ranks=null",
    ),
    "another beginning": (["adapter=lora", "adapter.init=olora"], r"adapter.init='olora': .*'kaiming'.* or "),
    "the beginning of another adapter": (["adapter=dora", "adapter.init=pissa"], r"adapter.init.*"),
    "fewer bits than there are": (
        ["adapter=lq_lora", "adapter.bits=2"],
        r"adapter.bits=2.0: the forms of fewest bits take 2\.\d+ a number of these matrices, scales among them; give as many or more",
    ),
    "bits said twice": (
        ["adapter=lq_lora", "model.frozen_dtype=nf4"],
        r"adapter=lq_lora with model.frozen_dtype=nf4: its matrices are kept in the bits that adapter.bits asks for; give model",
    ),
    "codes that are rounded": (
        ["adapter=lq_lora", "parallel.quantize_gather=int8"],
        r"adapter=lq_lora with parallel.quantize_gather=int8: .* no numbers to round; give parallel.quantize_gather=none, or adapter",
    ),
    "a form that is none": (
        ["adapter=lq_lora", "adapter.forms={blocks.0.attention.wq.weight: 5/64/8}"],
        r"adapter.forms: '5/64/8' is no form; possible are 2/16/4, ",
    ),
    "a form of some": (
        ["adapter=lq_lora", "adapter.forms={blocks.0.attention.wq.weight: 4/64/8}"],
        r"adapter.forms and adapter.layers say otherwise of blocks.0.attention.wk.weight; give each matrix of adapter.layers a form",
    ),
    "more triplets in the end": (
        ["adapter=adalora", "adapter.target_rank=13"],
        r"adapter.target_rank=13: triplets of a matrix that are left, at least 1 and at most adapter.rank=12",
    ),
    "triplets that go after they stay": (
        ["adapter=adalora", "adapter.start=0.9", "steps=10"],
        r"adapter.start=0.9 adapter.stop=0.7 with steps=10: triplets go after step 9 and stay from step 7 on; give steps or shares of",
    ),
    "triplets of gradients that are gone": (
        ["adapter=adalora", "optim.in_backward=true", "clip_norm=0", "batch.micro_size=8"],
        r"adapter=adalora with optim.in_backward: importance needs gradients .*; give optim.in_backward=false, or adapter=lora",
    ),
    "triplets of rows that are away": (
        ["adapter=adalora", "memory.offload_params=cpu", "memory.offload_states=cpu", "parallel.zero=3"],
        r"adapter=adalora with memory.offload_params=cpu: .*; give memory.offload_params=none, or adapter=lora",
    ),
    "triplets chosen never": (
        ["adapter=adalora", "adapter.every=0"],
        r"adapter.every=0: steps between two choices of trip",
    ),
    "a rule of what is frozen": (
        ["adapter=lora", "optim=galore"],
        r"optim=galore is a rule of hidden matrices, and an adapter or optim.assign freezes all of them; possible are adamw",
    ),
    "a rule for what is frozen": (
        ["adapter=lora", "optim.assign=[{match: 'embed.*', rule: lion}]"],
        r"optim.assign: what 'embed.\*' matches is frozen already, by an adapter or before it, and follows no rule such as lion",
    ),
    "all frozen": (
        ["optim.assign=[{match: '*', rule: frozen}]"],
        r"optim.assign: every parameter is frozen; leave some",
    ),
    "masks of what is frozen": (
        ["sparsity=set", "optim.assign=[{match: '*.w2.*', rule: frozen}]"],
        r"sparsity.layers: blocks.0.feed_forward.w2.weight is frozen by an adapter or optim.assign, and masks are",
    ),
}
