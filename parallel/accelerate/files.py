"""Files that others wrote for their own starts: a DeepSpeed configuration (JSON), or what `accelerate config` writes (YAML).

Read as data, held against the run: what contradicts it is refused by name, what nothing here would read too.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rowwise.parallel.accelerate.config import by_deepspeed
from rowwise.parallel.accelerate.deepspeed_json import Json, deepspeed_json, merged

# What says how workers are started and meet: torchrun's part here, and nothing that a run computes.
STARTING = (
    "compute_environment", "machine_rank", "main_process_ip", "main_process_port", "main_training_function", "rdzv_backend",
    "same_network", "enable_cpu_affinity", "debug", "gpu_ids", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu",
)  # fmt: skip
OFF: tuple[Any, ...] = ("no", "NO", "none", "", None, False, {}, "False", "false")


def settings_of(run: Any) -> Json:
    """Returns what DeepSpeed is given for a run: what the run says, and what its own file adds. Raises ValueError."""
    ours, named = deepspeed_json(run), run.parallel.accelerate_config
    if named is None:
        return ours
    theirs = _deepspeed_part(read(named), run, named)
    return merged(ours, theirs, f"parallel.accelerate_config={named}")


def check_file(run: Any) -> None:
    """Refuses a file that does not fit the run. Raises ValueError."""
    if run.parallel.accelerate_config is None:
        return
    if by_deepspeed(run):
        settings_of(run)
    else:
        _check_fsdp(read(run.parallel.accelerate_config), run)


def read(named: str) -> Mapping[str, Any]:
    """Reads a JSON or YAML file, as data. Raises ValueError."""
    path = Path(named).expanduser()
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(
            f"parallel.accelerate_config={named} cannot be read ({why}); give a DeepSpeed configuration (.json), or what "
            "`accelerate config` wrote (.yaml)"
        ) from None
    if not isinstance(found, Mapping):
        raise ValueError(
            f"parallel.accelerate_config={named}: it holds no keys; give a DeepSpeed or an accelerate configuration"
        )
    return found


def _is_accelerate(found: Mapping[str, Any]) -> bool:
    return "distributed_type" in found or "compute_environment" in found


def _deepspeed_part(found: Mapping[str, Any], run: Any, named: str) -> Json:
    """The DeepSpeed configuration that a file amounts to."""
    if not _is_accelerate(found):
        return dict(found)
    part = dict(found.get("deepspeed_config") or {})
    _check_start(found, run, named, "DEEPSPEED", "deepspeed_config")
    if (inner := part.pop("deepspeed_config_file", None)) is not None:
        return _inner(inner, part, named)
    return _of_accelerate(part, named)


def _inner(inner: str, part: Json, named: str) -> Json:
    left = [key for key in part if key not in ("zero3_init_flag", "deepspeed_multinode_launcher", "deepspeed_hostfile")]
    if left:
        raise ValueError(
            f"parallel.accelerate_config={named}: {', '.join(left)} beside deepspeed_config_file={inner}; each says it; give one"
        )
    path = Path(inner).expanduser()
    return dict(read(str(path if path.is_absolute() else Path(named).expanduser().parent / path)))


def _check_start(found: Mapping[str, Any], run: Any, named: str, kind: str, group: str) -> None:
    """Refuses what an accelerate configuration says of the start, of the engine and of the precision, and the run does not."""
    file = f"parallel.accelerate_config={named}"
    said = found.get("distributed_type", kind)
    if said != kind:
        raise ValueError(
            f"{file}: distributed_type={said}, and parallel.accelerate={run.parallel.accelerate} is {kind}; give another file, or "
            f"parallel.accelerate={'fsdp2' if said == 'FSDP' else 'deepspeed'}"
        )
    workers = run.parallel.world_size
    if found.get("num_processes", workers) != workers:
        raise ValueError(
            f"{file}: num_processes={found['num_processes']}, and the run has {workers} workers; start as many, or change the file"
        )
    precision = {"no": "fp32"}.get(str(found.get("mixed_precision", run.precision.name)), found.get("mixed_precision"))
    if precision not in (run.precision.name, None, False):
        raise ValueError(
            f"{file}: mixed_precision={found['mixed_precision']}, and the run has precision={run.precision.name}; change one of them"
        )
    known = (*STARTING, "distributed_type", "num_processes", "num_machines", "mixed_precision", "downcast_bf16", group)
    for key, value in found.items():
        if key not in known and value not in OFF:
            raise ValueError(f"{file}: {key}={value} would not be read; leave it out of the file")
    if found.get("downcast_bf16") not in (*OFF, "no"):
        raise ValueError(f"{file}: downcast_bf16={found['downcast_bf16']} is for TPUs; give no")


def _of_accelerate(part: Json, named: str) -> Json:
    """DeepSpeed's own words for those of an accelerate configuration."""
    result: Json = {"zero_optimization": {}}
    for key, value in part.items():
        if key in ("deepspeed_multinode_launcher", "deepspeed_hostfile", "zero3_init_flag", "zero3_save_16bit_model"):
            continue  # how others start it, build their model and save it
        if key not in OF_ACCELERATE:
            raise ValueError(
                f"parallel.accelerate_config={named}: deepspeed_config.{key}={value} would not be read; possible are "
                f"{', '.join(OF_ACCELERATE)}"
            )
        OF_ACCELERATE[key](result, value)
    return result


def _top(key: str) -> Callable[[Json, Any], None]:
    return lambda result, value: result.update({key: value})


def _zero(key: str, inner: str | None = None) -> Callable[[Json, Any], None]:
    def put(result: Json, value: Any) -> None:
        group = result["zero_optimization"]
        if inner is None:
            group[key] = value
        else:
            group.setdefault(key, {})[inner] = value

    return put


OF_ACCELERATE: dict[str, Callable[[Json, Any], None]] = {
    "zero_stage": _zero("stage"),
    "gradient_accumulation_steps": _top("gradient_accumulation_steps"),
    "gradient_clipping": _top("gradient_clipping"),
    "offload_optimizer_device": _zero("offload_optimizer", "device"),
    "offload_optimizer_nvme_path": _zero("offload_optimizer", "nvme_path"),
    "offload_param_device": _zero("offload_param", "device"),
    "offload_param_nvme_path": _zero("offload_param", "nvme_path"),
}


def _check_fsdp(found: Mapping[str, Any], run: Any) -> None:
    """Refuses what the FSDP part of an accelerate configuration says otherwise than the run does."""
    named = run.parallel.accelerate_config
    file = f"parallel.accelerate_config={named}"
    if not _is_accelerate(found):
        raise ValueError(f"{file}: it is no accelerate configuration; give one with distributed_type: FSDP")
    _check_start(found, run, named, "FSDP", "fsdp_config")
    says: dict[str, tuple[Any, ...]] = {
        "fsdp_version": (2, "2"),
        "fsdp_reshard_after_forward": (run.parallel.zero == 3, str(run.parallel.zero == 3).lower()),
        "fsdp_offload_params": (False, "false"),
        "fsdp_activation_checkpointing": (False, "false"),
        "fsdp_cpu_ram_efficient_loading": (True, False, "true", "false"),
        "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
        "fsdp_transformer_layer_cls_to_wrap": ("Block",),
        "fsdp_state_dict_type": ("SHARDED_STATE_DICT",),
    }
    for key, value in (found.get("fsdp_config") or {}).items():
        if key not in says:
            raise ValueError(f"{file}: fsdp_config.{key}={value} would not be read; possible are {', '.join(says)}")
        if value not in says[key]:
            raise ValueError(
                f"{file}: fsdp_config.{key}={value} contradicts the run, which has {says[key][0]}; change the file, or the run"
            )
