"""From the config.json of a family to the model.* keys, and back: by the table. Needs no torch."""

from collections.abc import Iterable
from math import isclose
from typing import Any

from rowwise.trainer.models.families.rope import Keys, read_rope, write_rope
from rowwise.trainer.models.families.table import COMMON, FAMILIES, PLAIN, REQUIRED, WHOLES, Family

# Of the keys of any family those that are whole numbers, and those that are numbers.
WHOLE = (
    *(key.theirs for key in COMMON),
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "max_position_embeddings",
)
NUMBERS = ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar")


def read_keys(theirs: Keys) -> Keys:
    """Returns the model.* keys that a config.json says, as plain values, `family` among them. Raises ValueError for what our decoder
    does not have, and KeyError for a key that it must say."""
    kind = theirs.get("model_type")
    if whole := WHOLES.get(str(kind)):
        outer = {key: theirs[key] for key in ("tie_word_embeddings", "quantization_config") if key in theirs}
        if not isinstance(theirs[whole.config], dict):
            raise ValueError(f"{whole.config} is {theirs[whole.config]!r}, possible is the config of the model of text")
        kind, theirs = whole.family, outer | theirs[whole.config]
    if kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}, possible are {', '.join((*FAMILIES, *WHOLES))}")
    family = FAMILIES[kind]
    theirs = {**family.sizes, **theirs}
    _refuse_no_numbers(theirs)
    _refuse_others(theirs, family)
    keys = PLAIN | {"family": kind}
    for key in (*COMMON, *family.keys):
        value = theirs[key.theirs] if key.default is REQUIRED else theirs.get(key.theirs, key.default)
        keys |= dict.fromkeys(key.ours, None if value is None else key.read(value))
    heads = keys["heads"]
    keys |= {
        "kv_heads": theirs.get("num_key_value_heads") or heads,
        "head_dim": theirs.get("head_dim") or family.head_dim or keys["dim"] // heads,
        "tie_embeddings": theirs.get("tie_word_embeddings", family.tie),
        "norm_eps": theirs.get("rms_norm_eps", family.eps),
    }
    keys |= {name: value(keys) if callable(value) else value for name, value in family.fixed.items()}
    keys |= read_rope(theirs, family.ropes, family.theta, family.local_theta) | _windows(theirs, family)
    if keys["window"] is None:
        keys["rope_local_theta"] = None
    if keys["rope_share"] != 1 and not family.rope_share:
        raise ValueError(f"partial_rotary_factor is {keys['rope_share']}, possible is 1.0")
    if family.rope_layers is not None:
        keys["rope_layers"] = _cycle([family.rope_layers(theirs, layer) for layer in range(keys["layers"])])
    if keys["attention_scale"] == keys["head_dim"] ** -0.5:
        keys["attention_scale"] = None
    return keys


def _refuse_no_numbers(theirs: Keys) -> None:
    """Before anything is computed with what is none."""
    given = {key: theirs[key] for key in (*WHOLE, *NUMBERS) if theirs.get(key) is not None}
    given |= {key.theirs: None for key in COMMON if key.theirs in theirs and theirs[key.theirs] is None}
    for key, value in given.items():
        whole = key in WHOLE
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{key} is {value!r}, possible is a {'whole ' if whole else ''}number")


def _refuse_others(theirs: Keys, family: Family) -> None:
    own = {key.theirs for key in family.keys}
    possible = {"attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (None,), **family.theirs}
    if family.windows is None or not family.windows.switch:
        possible["use_sliding_window"] = (False,)
    for key, values in possible.items():
        if key not in own and theirs.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {theirs[key]!r}, possible is {values[0]!r}")


def _windows(theirs: Keys, family: Family) -> Keys:
    """The keys of windows."""
    none = {"window": None, "window_layers": [True]}
    kinds = theirs.get("layer_types") or []
    if others := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types has {', '.join(sorted(others))}, possible are full_attention and sliding_attention"
        )
    has = family.windows
    window = theirs.get("sliding_window", has.default) if has is not None else None
    if has is None or window is None or (has.switch and not theirs.get("use_sliding_window", False)):
        if "sliding_attention" in kinds and (has is None or window is None):
            raise ValueError("layer_types has sliding_attention, and no window is said that this family has")
        return none
    if has.layers is None:
        if "full_attention" in kinds:
            raise ValueError("layer_types has full_attention, possible are layers that all have the window")
        return {"window": window, "window_layers": [True]}
    which = [kind == "sliding_attention" for kind in kinds]
    which = which or [has.layers(theirs, layer) for layer in range(theirs["num_hidden_layers"])]
    return {"window": window, "window_layers": _cycle(which)} if any(which) else none


def _cycle(layers: list[bool]) -> list[bool]:
    """The shortest list that, going round, says the same of all layers."""
    lengths = (n for n in range(1, len(layers) + 1) if all(one == layers[i % n] for i, one in enumerate(layers)))
    return layers[: next(lengths, 0)]


def write_keys(keys: Keys, kind: str) -> Keys:
    """Returns the part of a config.json that says the shape of a model, as far as the family has words for it."""
    family, layers = FAMILIES[kind], range(keys["layers"])
    size = keys["head_dim"] or keys["dim"] // keys["heads"]
    said = keys | {"attention_scale": keys["attention_scale"] or size**-0.5}
    theirs: Keys = {"architectures": [family.architecture], "model_type": kind}
    for key in (*COMMON, *family.keys):
        value = said[key.ours[0]]
        theirs[key.theirs] = None if value is None else key.write(value)
    theirs |= {
        "num_key_value_heads": keys["kv_heads"],
        "head_dim": size,
        "tie_word_embeddings": keys["tie_embeddings"],
        "rms_norm_eps": keys["norm_eps"],
        **write_rope(keys),
    }
    if family.rope_layers is not None:
        theirs["no_rope_layers"] = [int(one) for one in _each(keys["rope_layers"], layers)]
    if (has := family.windows) is not None:
        theirs["sliding_window"] = keys["window"]
        if has.switch:
            theirs["use_sliding_window"] = keys["window"] is not None
        if has.layers is not None:
            which = _each(keys["window_layers"], layers) if keys["window"] is not None else [False] * len(layers)
            theirs["layer_types"] = ["sliding_attention" if one else "full_attention" for one in which]
    return theirs


def _each(cycle: list[bool], layers: Iterable[int]) -> list[bool]:
    return [cycle[layer % len(cycle)] for layer in layers]


def lacking(keys: Keys, kind: str) -> list[str]:
    """Names the model.* keys in which a model is not of a family, with what the family has there; empty: it is of it."""
    try:
        back = read_keys(write_keys(keys, kind))
    except ValueError as error:
        return [str(error)]
    ours = normal(keys) | {"family": kind}
    return [f"model.{key}={back[key]} and not {ours[key]}" for key in back if not _alike(back[key], ours[key])]


def normal(keys: Keys) -> Keys:
    """Returns model.* keys as `read_keys` says them: of what says the same, one form."""
    layers, size = range(keys["layers"]), keys["head_dim"] or keys["dim"] // keys["heads"]
    return {
        **keys,
        "head_dim": size,
        "attention_scale": None if keys["attention_scale"] == size**-0.5 else keys["attention_scale"],
        "rope_layers": _cycle(_each(keys["rope_layers"], layers)),
        "window_layers": [True] if keys["window"] is None else _cycle(_each(keys["window_layers"], layers)),
    }


def _alike(there: Any, here: Any) -> bool:
    """Whether two values are the same, numbers but for rounding."""
    if isinstance(there, float) and isinstance(here, int | float):
        return isclose(there, here, rel_tol=1e-12)
    return bool(there == here)


def family_of(keys: Keys) -> str:
    """Names the family that a model is of: the one it says, else the first that has its shape. Raises ValueError where there is none,
    with what the nearest lacks."""
    known = {kind: lacking(keys, kind) for kind in ([keys["family"]] if keys["family"] else FAMILIES)}
    nearest = min(known, key=lambda kind: len(known[kind]))
    if known[nearest]:
        raise ValueError(
            f"no family of Hugging Face has this shape: {nearest}, the nearest, has {', '.join(known[nearest])}"
        )
    return nearest
