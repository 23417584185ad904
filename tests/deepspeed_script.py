"""A team's own script of DeepSpeed, as `test_trainer_convert_deepspeed` starts it: one rank of it, on the CPU.

    python tests/deepspeed_script.py SETTINGS.json RANK

It knows nothing of checkpoints of ours. Of ours it has the data and the decoder, or transformers' model of the same shape.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.data.batches import Share, step_batches
from rowwise.trainer.data.open import open_data
from rowwise.trainer.models.config_json import their_config
from rowwise.trainer.models.decoder import Decoder


def model_of(config: TrainConfig, names: str) -> nn.Module:
    torch.manual_seed(3)
    if names == "rowwise":
        model: nn.Module = Decoder(config.model, fused_loss=False)
        for p in model.parameters():
            nn.init.normal_(p, std=0.2) if p.ndim == 2 else nn.init.ones_(p)
        return model
    import transformers

    shape = their_config(config.model, torch.float32, 128, None)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | {"initializer_range": 0.2}))


def logits_of(engine: Any, inputs: torch.Tensor, names: str) -> torch.Tensor:
    if names == "rowwise":
        return engine(inputs, torch.arange(inputs.size(1)).expand_as(inputs))
    return engine(input_ids=inputs).logits


def optimizer_of(model: nn.Module, config: TrainConfig, adam: str) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    kind: Any = {"torch": torch.optim.AdamW, "deepspeed": DeepSpeedCPUAdam}[adam]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return kind(groups, lr=config.optim.lr, betas=(0.9, 0.95), eps=1e-8)


def engine_settings(config: TrainConfig, told: dict[str, Any], world: int) -> dict[str, Any]:
    batch = config.batch
    return {
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.global_size // batch.micro_size // world,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {
            "stage": told["stage"],
            "stage3_param_persistence_threshold": 40,
            "sub_group_size": 2000,
            "round_robin_gradients": told.get("round_robin", False),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": told.get("load") is not None},
        "bf16": {"enabled": told.get("bf16", False)},
    }


def states_of(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Every parameter and its moments, whole, as DeepSpeed itself puts them together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_round_robin_gradients():  # of which DeepSpeed itself finds others than it is asked for
        return {name: {"fp32": p.detach().clone()} for name, p in engine.module.named_parameters()}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Done once, after the first group's first step, when the others have no states yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, p in engine.module.named_parameters():
        states = {key: safe_get_full_optimizer_state(p, key).clone() for key in ("exp_avg", "exp_avg_sq")}
        found[name] = {"fp32": safe_get_full_fp32_param(p).clone(), **states}
    return found


def main() -> None:
    told, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    folder, world = Path(told["folder"]), told["world"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # messages of its own, a minute to compile
    config = config_from_tree(compose_tree(told["overrides"]))
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    model = model_of(config, told["names"])
    optimizer = optimizer_of(model, config, told["adam"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=engine_settings(config, told, world)
    )
    if told.get("load") is not None:
        place, _ = engine.load_checkpoint(told["load"])
        assert place is not None
        torch.save(states_of(engine), folder / "loaded.pt") if rank == 0 else states_of(engine)
    steps = step_batches(data.train, config.batch, config.seed, engine.global_samples, Share(rank, world), pin=False)
    losses, norms = [], []
    for _ in range(told["steps"]):
        batches = next(steps)
        count = torch.tensor(sum(int((b.labels >= 0).sum()) for b in batches))
        dist.all_reduce(count)
        total = torch.zeros(())
        for batch in batches:
            logits = logits_of(engine, batch.inputs, told["names"]).float()
            loss = (
                F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
                / count
            )
            engine.backward(loss * world * len(batches))  # DeepSpeed takes the mean over both
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
        norms.append(float(engine.get_global_grad_norm()))
        if engine.global_steps == told.get("save_at"):
            engine.save_checkpoint(str(folder / "saved"))
            torch.save(states_of(engine), folder / "states.pt") if rank == 0 else states_of(engine)
    if rank == 0:
        answer = {"losses": losses, "norms": norms, "step": engine.global_steps, "samples": engine.global_samples}
        (folder / "answer.json").write_text(json.dumps(answer))
    dist.barrier()


if __name__ == "__main__":
    main()
