"""Accelerate over FSDP2.    torchrun --nproc-per-node 2 accelerate_fsdp2.py MODEL TOKENS OUT"""

import sys

import numpy as np
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

source, tokens, out = sys.argv[1:]
rows = torch.from_numpy(np.fromfile(tokens, np.uint16).astype(np.int64)).view(-1, 257)
samples = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in rows]

plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    state_dict_type="SHARDED_STATE_DICT",
)
accelerator = Accelerator(fsdp_plugin=plugin)
model = LlamaForCausalLM.from_pretrained(source)
matrices = [p for p in model.parameters() if p.ndim > 1]
norms = [p for p in model.parameters() if p.ndim == 1]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(samples, batch_size=8))
for step, batch in enumerate(batches, 1):
    loss = model(**batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.print(f"step {step} loss {mean}", flush=True)
    if step % 8 == 0:
        accelerator.save_state(f"{out}/step-{step}")
accelerator.end_training()
