"""Lightning over DistributedDataParallel.    torchrun --nproc-per-node 2 lightning_ddp.py MODEL TOKENS OUT"""

import sys

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaForCausalLM

source, tokens, out = sys.argv[1:]
rows = torch.from_numpy(np.fromfile(tokens, np.uint16).astype(np.int64)).view(-1, 257)
samples = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in rows]


class Llama(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = LlamaForCausalLM.from_pretrained(source)

    def training_step(self, batch):
        loss = self.model(**batch).loss
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim > 1]
        norms = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def train_dataloader(self):
        return DataLoader(samples, batch_size=8, sampler=DistributedSampler(samples, shuffle=False))


trainer = lightning.Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    max_epochs=1,
    gradient_clip_val=1.0,
    logger=CSVLogger(out),
    log_every_n_steps=1,
    callbacks=[ModelCheckpoint(f"{out}/checkpoints", every_n_train_steps=8, save_top_k=-1)],
    enable_progress_bar=False,
)
trainer.fit(Llama())
