"""The rotary positions that a config.json says, in the forms of transformers 4 and 5. Needs no torch."""

from collections.abc import Collection
from math import log, sqrt
from typing import Any

Keys = dict[str, Any]  # model.* keys as plain values, or those of a config.json
ROPES = ("linear", "llama3", "yarn", "longrope")
_OF_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def read_rope(theirs: Keys, kinds: Collection[str], theta: float, local_theta: float | None) -> Keys:
    """Returns the model.rope_* keys. `kinds`: the stretches that the family has; `theta`, and `local_theta` of layers with a window:
    the bases where the file does not say. Raises ValueError for what our decoder does not have."""
    # transformers 5 writes rope_parameters, and goes by rope_scaling where an older folder has it.
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    local: Keys = {}
    if "full_attention" in rope:
        rope, local = rope["full_attention"] or {}, rope.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"the RoPE of layers with a window is {local}, possible is the rope_type default")
    if local_theta is not None:
        local_theta = local.get("rope_theta", theirs.get("rope_local_base_freq", local_theta))
    return {
        "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", theta)),
        "rope_local_theta": local_theta,
        "rope_share": rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor")) or 1.0,
        "rope_scaling": _our_scaling(rope, theirs, kinds),
    }


def _our_scaling(rope: Keys, theirs: Keys, kinds: Collection[str]) -> Keys | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("su", "yarn") and "short_factor" in rope:  # as the first folders of Phi-3 call it
        kind = "longrope"
    if kind == "default":
        return None
    if kind not in kinds:
        raise ValueError(f"the RoPE is {rope}, possible are the rope_type default, {', '.join(kinds)}")
    if kind == "linear":
        return {"kind": kind, "factor": rope["factor"]}
    length = theirs.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if kind == "llama3":
        return {key: rope[key] for key in _OF_LLAMA3} | {"original_length": length, "kind": kind}
    length = length or theirs["max_position_embeddings"]
    factor = rope.get("factor") or theirs["max_position_embeddings"] / length
    if kind == "longrope":
        amplitude = rope.get("attention_factor") or (sqrt(1 + log(factor) / log(length)) if factor > 1 else 1.0)
        factors = {f"{name}s": list(rope[name]) for name in ("short_factor", "long_factor")}
        return {"kind": kind, **factors, "original_length": length, "factor": factor, "attention_factor": amplitude}
    if rope.get("truncate", True) is not True:
        raise ValueError(f"the RoPE is {rope}, possible is a yarn with truncate true")
    fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    said = {"kind": kind, "factor": factor, "original_length": length, "beta_fast": fast, "beta_slow": slow}
    return said | {"attention_factor": rope.get("attention_factor") or _yarn_amplitude(rope, factor)}


def _yarn_amplitude(rope: Keys, factor: float) -> float:
    def amplitude(share: float) -> float:
        return 0.1 * share * log(factor) + 1 if factor > 1 else 1.0

    own, every = rope.get("mscale"), rope.get("mscale_all_dim")
    return amplitude(own) / amplitude(every) if own and every else amplitude(1)


def write_rope(keys: Keys) -> Keys:
    """Returns the keys of a config.json that say model.rope_* keys, in the form that transformers 4 and 5 both read."""
    said: Keys = {"rope_theta": keys["rope_theta"], "rope_scaling": _their_scaling(keys["rope_scaling"])}
    if keys["rope_local_theta"] is not None:
        said["rope_local_base_freq"] = keys["rope_local_theta"]
    if keys["rope_share"] != 1:
        said["partial_rotary_factor"] = keys["rope_share"]
    if (keys["rope_scaling"] or {}).get("kind") == "longrope":
        said["original_max_position_embeddings"] = keys["rope_scaling"]["original_length"]
    return said


def _their_scaling(scaling: Keys | None) -> Keys | None:
    if scaling is None:
        return None
    names = {
        "kind": "rope_type", "original_length": "original_max_position_embeddings", "short_factors": "short_factor",
        "long_factors": "long_factor",
    }  # fmt: skip
    said = {names.get(key, key): value for key, value in scaling.items()}
    return {"rope_type": said.pop("rope_type"), **said}
