"""DeepSpeed by itself, ZeRO stage 1.    torchrun --nproc-per-node 2 deepspeed_zero1.py MODEL TOKENS OUT"""

import sys

import deepspeed
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaForCausalLM

source, tokens, out = sys.argv[1:]
rows = torch.from_numpy(np.fromfile(tokens, np.uint16).astype(np.int64)).view(-1, 257)
samples = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in rows]

deepspeed.init_distributed("gloo")
model = LlamaForCausalLM.from_pretrained(source)
matrices = [p for p in model.parameters() if p.ndim > 1]
norms = [p for p in model.parameters() if p.ndim == 1]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
config = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000_000, "allgather_bucket_size": 10_000_000},
}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
for step, batch in enumerate(DataLoader(samples, 8, sampler=DistributedSampler(samples, shuffle=False)), 1):
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    deepspeed.comm.all_reduce(mean, deepspeed.comm.ReduceOp.AVG)
    if engine.global_rank == 0:
        print(f"step {step} loss {mean.item()}", flush=True)
    if step % 8 == 0:
        engine.save_checkpoint(out, tag=f"step-{step}")
torch.distributed.destroy_process_group()
