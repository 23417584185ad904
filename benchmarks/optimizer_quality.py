"""Validation loss after the same number of tokens, for every optimizer, each at its own best learning rate.

    python benchmarks/optimizer_quality.py                       about 35 minutes on 2 cores; interrupt it and go on later
    python benchmarks/optimizer_quality.py --rules adamw muon --steps 400 --model model.layers=4 model.dim=256
    python benchmarks/optimizer_quality.py --gpu                 llama_60m in bf16, 105 million tokens a run

Every run is the product's own: `trainer.prepare`, then `trainer.train`, on the `stdlib` corpus, with the settings of
conf/optim but for the learning rate (and the rank, which a small model cannot have as it is). First each rule runs, with
seed 0, at the learning rates FACTORS x its own; while the best one is the lowest or the highest, the next one beyond is
tried too, at most `--beyond` times. Then the best one runs with the other seeds. A seed is that of the initial
weights, the order of the data and the random projections. The held-out text is the same for all.

Finished runs are kept in results/optimizer_quality.jsonl, with the exact settings and a digest of the code that made
them; runs that are there with both are not made again. The picture needs matplotlib (`pip install rowwise[bench]`).
"""


from record import RESULTS

RULES = ("adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "muon", "galore", "dct", "fira", "apollo", "apollo_mini")
RANKED = ("galore", "dct", "fira", "apollo")
REFRESHED = (*RANKED, "apollo_mini")
FACTORS = (0.5, 1.0, 2.0, 4.0)  # of the rate in conf/optim
SEEDS = (0, 1, 2)
KEPT = RESULTS / "optimizer_quality.jsonl"
ALWAYS = ["resume=never", "checkpoint.every=0", "sample.tokens=0", "data=stdlib"]
CPU = [
    "model=tiny", "model.layers=2", "model.dim=128", "model.ffn_dim=352", "batch.seq_len=128", "batch.global_size=16",
    "batch.micro_size=16", "eval.batches=32",
]  # fmt: skip
GPU = [
    "model=llama_60m", "model.vocab_size=256", "precision=bf16", "batch.seq_len=512", "batch.global_size=512",
    "batch.micro_size=64", "eval.batches=8",
]  # fmt: skip
