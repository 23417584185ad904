"""The transformers Trainer.    torchrun --nproc-per-node 2 transformers_trainer.py MODEL TOKENS OUT"""

import sys

import numpy as np
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

source, tokens, out = sys.argv[1:]
rows = torch.from_numpy(np.fromfile(tokens, np.uint16).astype(np.int64)).view(-1, 257)
samples = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in rows]

arguments = TrainingArguments(
    output_dir=out,
    num_train_epochs=1,
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    adam_beta1=0.9,
    adam_beta2=0.95,
    weight_decay=0.1,
    max_grad_norm=1.0,
    lr_scheduler_type="constant",
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_steps=8,
    use_cpu=True,
    ddp_backend="gloo",
    ddp_find_unused_parameters=False,
    remove_unused_columns=False,
    report_to=[],
)
Trainer(LlamaForCausalLM.from_pretrained(source), arguments, train_dataset=samples).train()
torch.distributed.destroy_process_group()
