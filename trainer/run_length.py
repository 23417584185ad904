"""How long a run is and how often things come in it, as they were said -> as the loop counts them, on plain trees.

`steps`, or `tokens` or `epochs` in its place: as many whole steps as read no more than that. An epoch is every sample of
the data once, as `data.order` deals them out: every whole window of `batch.seq_len` tokens of every packed stream (a stream's
last tokens, fewer than a window, are in none), so that `epochs=1` reads no sample twice; a run
that goes back from a spike passes over what it read, and reads as many at the end anew. `batch.global_tokens` in the place
of `batch.global_size`: the tokens of a step. What was asked stays in the configuration beside what it came to. Needs no torch.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rowwise.optim.lengths import Length, RunLength, Unit, parse_length, plain, read_count, read_length

MOST_STEPS = 10**15  # and what a run of so many epochs has until the data is opened
ALTERNATIVES = {
    "how long the run is": ("steps", "tokens", "epochs"),
    "how large a step is": ("batch.global_size", "batch.global_tokens"),
}
# Keys that take a length, and in which units. Time decides nothing that the weights depend on.
BY_STEPS: tuple[Unit, ...] = ("steps", "share", "tokens")
INTERVALS: dict[str, tuple[Unit, ...]] = {
    "eval.every": (*BY_STEPS, "time"),
    "checkpoint.every": (*BY_STEPS, "time"),
    "log_every": BY_STEPS,
    "log.norms_every": BY_STEPS,
    "log.ranks_every": BY_STEPS,
    "sparsity.update_every": BY_STEPS,
}
# Keys of a number of steps, and where the same is said as a share of the run. Tokens given for them become steps, which stay
# as they are when the run is made longer.
NUMBERS: dict[str, str | None] = {
    "schedule.warmup_steps": "schedule.warmup",
    "schedule.decay_steps": "schedule.decay_share",
    "schedule.cooldown_steps": "schedule.cooldown_share",
    "schedule.anneal_steps": None,
    "schedule.anneal_at": None,
    "schedule.rewarm_at": None,
    "sparsity.start_at": "sparsity.start",
    "sparsity.stop_at": "sparsity.stop",
    "sparsity.account_every": None,
    "optim.refresh_every": None,
}

Tree = dict[str, Any]


def choose(tree: Tree, given: Sequence[str]) -> Tree:
    """Chooses, of keys that say one thing, the one that is among those `given` on the command line; what files say by another gives
    way. Raises ValueError where two were given, or files say two and neither is."""
    for what, keys in ALTERNATIVES.items():
        said = [key for key in keys if key in given and _get(tree, key) is not None]
        if not said:
            said = [key for key in keys[1:] if _get(tree, key) is not None]
        if len(said) > 1:
            told = " ".join(f"{key}={_get(tree, key)}" for key in said)
            raise ValueError(f"{told}: each says {what}; give one of {', '.join(keys)}")
        for key in keys if said else ():
            if key not in said:
                tree = _put(tree, key, None)
    return tree


def settle(tree: Tree) -> Tree:
    """Returns the tree with `steps` and `batch.global_size` as numbers, and every interval written in the one way. Of epochs whose
    data is not opened yet: MOST_STEPS. What is of a wrong type stays, for the configuration's types to refuse. Raises ValueError for
    what is no length, no whole step, or does not divide."""
    tree = _with_global_size(tree)
    if (tokens := tree.get("tokens")) is not None:
        tokens = read_count("tokens", tokens, "tokens")
        step = _step_tokens(tree)
        # Where the batch is none, that is what will be refused.
        tree = {**tree, "tokens": tokens, "steps": steps_of_tokens(tokens, *step) if step else MOST_STEPS}
    elif isinstance(epochs := tree.get("epochs"), int | float) and not 0 < epochs < math.inf:
        raise ValueError(f"epochs={epochs}: how often the run reads the data, above 0 (1, or 0.5)")
    elif epochs is not None and tree.get("steps") is None:
        tree = {**tree, "steps": MOST_STEPS}
    elif isinstance(steps := tree.get("steps"), float) and steps.is_integer():
        tree = {**tree, "steps": int(steps)}
    for key, units in INTERVALS.items():
        if (value := _get(tree, key)) is not None and isinstance(value, bool | int | float | str):
            tree = _put(tree, key, plain(_interval(tree, key, value, units), value))
    return _with_sources(_with_numbers(tree))


def steps_of_tokens(tokens: int, global_size: int, seq_len: int) -> int:
    """Returns the whole steps in so many tokens. Raises ValueError where there is none."""
    if tokens < global_size * seq_len:
        raise ValueError(
            f"tokens={tokens}: less than a step, which is batch.global_size={global_size} x batch.seq_len={seq_len} = "
            f"{global_size * seq_len:,} tokens; give at least that, or a smaller batch"
        )
    return tokens // (global_size * seq_len)


def steps_of_epochs(epochs: float, samples: int, global_size: int) -> int:
    """Returns the whole steps in so many times all `samples`, of a decimal as it was written. Raises ValueError where there is
    none."""
    if not (steps := int(Fraction(repr(epochs)) * samples) // global_size):
        raise ValueError(
            f"epochs={epochs:g}: less than a step: the data has {samples:,} samples and a step takes batch.global_size="
            f"{global_size}; give epochs={math.ceil(1000 * global_size / samples) / 1000:g} or more, or a smaller batch"
        )
    return steps


def _with_global_size(tree: Tree) -> Tree:
    """With the sequences of `batch.global_tokens`."""
    if (tokens := _get(tree, "batch.global_tokens")) is None:
        return tree
    tokens, length = read_count("batch.global_tokens", tokens, "tokens"), tree["batch"].get("seq_len")
    if not _is_number(length):  # which is what will be refused
        return _put(_put(tree, "batch.global_size", 1), "batch.global_tokens", tokens)
    if tokens % length:
        near = sorted({max(1, tokens // length) * length, -(-tokens // length) * length})
        raise ValueError(
            f"batch.global_tokens={tokens} is no whole number of sequences of batch.seq_len={length} tokens; the nearest "
            f"that are {near}"
        )
    tree = _put(tree, "batch.global_size", tokens // length)
    return _put(tree, "batch.global_tokens", tokens)


def _with_numbers(tree: Tree) -> Tree:
    """With steps where tokens stand in the place of a number of steps, and shares of percentages."""
    for key, share_key in NUMBERS.items():
        value = _get(tree, key)
        if isinstance(value, float | str) and (length := parse_length(value)) is not None:
            if length.unit == "share" and share_key is not None:
                raise ValueError(f"{key}={value}: a number of steps; for a share of the run give {share_key}={value}")
            if (steps := _in_steps(tree, _interval(tree, key, value, ("steps", "tokens")))) is not None:
                tree = _put(tree, key, steps)
        said = None if share_key is None else _get(tree, share_key)
        if share_key is not None and isinstance(said, str) and (length := parse_length(said)) is not None:
            if length.unit != "share":
                raise ValueError(
                    f"{share_key}={said}: a share of the run, from 0 to 1; for steps or tokens give {key}={said}"
                )
            tree = _put(tree, share_key, float(length.amount))
    key = "sparsity.update_every"
    if isinstance(value := _get(tree, key), str):
        length = read_length(key, value)
        if length.unit == "share":  # those below stand there as numbers
            raise ValueError(
                f"{key}={value}: masks would not change within the run; give a share below it (10%) or steps"
            )
        if (steps := _in_steps(tree, length)) is not None:
            tree = _put(tree, key, steps)
    return tree


def _with_sources(tree: Tree) -> Tree:
    """With the sources of a mixture apart from what they are in it, and its changes at tokens, which stay as they are when the run is
    made longer."""
    sources, changes = _get(tree, "data.sources"), _get(tree, "data.changes")
    if isinstance(sources, list):
        tree = _put(tree, "data.sources", [_apart(one) if isinstance(one, dict) else one for one in sources])
    if isinstance(changes, list):
        tree = _put(tree, "data.changes", [_at_tokens(tree, one) if isinstance(one, dict) else one for one in changes])
    return tree


def _apart(source: Tree) -> Tree:
    """{name: text, files: wiki, weight: 3} -> {data: {name: text, files: wiki}, weight: 3}."""
    if "data" in source:
        return source
    keys = source.keys() & {"weight", "label"}
    return {"data": {key: source[key] for key in source if key not in keys}} | {key: source[key] for key in keys}


def _at_tokens(tree: Tree, change: Tree) -> Tree:
    found = dict(change)
    for key in ("at", "over"):
        if isinstance(value := change.get(key), int | float | str) and value != 0:
            length, step = _interval(tree, f"data.changes.{key}", value, BY_STEPS), _step_tokens(tree)
            if length.unit == "share" and tree.get("steps") == MOST_STEPS:
                raise ValueError(
                    f"data.changes.{key}={value} with epochs: a share of a run of steps or tokens; give tokens"
                )
            if step is not None and length.unit != "tokens" and _is_number(tree.get("steps")):
                steps = RunLength(tree["steps"], step[0] * step[1]).in_steps(length)
                found[key] = f"{steps * step[0] * step[1]} tokens"
    return found


def _in_steps(tree: Tree, length: Length) -> int | None:
    """Of steps or tokens; None where the tokens of a step are no number."""
    if length.unit == "steps":
        return int(length.amount)
    step = _step_tokens(tree)
    return None if step is None or length.unit != "tokens" else RunLength(0, step[0] * step[1]).in_steps(length)


def _interval(tree: Tree, key: str, value: Any, units: tuple[Unit, ...]) -> Length:
    length = read_length(key, value, units)
    if length.unit == "tokens" and (step := _step_tokens(tree)) and length.amount < step[0] * step[1]:
        raise ValueError(f"{key}={value}: less than a step, of {step[0] * step[1]:,} tokens; give at least that")
    return length


def _step_tokens(tree: Tree) -> tuple[int, int] | None:
    """(sequences of a step, tokens of a sequence), where they are numbers."""
    size, length = _get(tree, "batch.global_size"), _get(tree, "batch.seq_len")
    return (size, length) if _is_number(size) and _is_number(length) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _get(tree: Tree, key: str) -> Any:
    group, _, name = key.rpartition(".")
    node = tree.get(group) if group else tree
    return node.get(name) if isinstance(node, dict) else None


def _put(tree: Tree, key: str, value: Any) -> Tree:
    """A copy with another value."""
    group, _, name = key.rpartition(".")
    return {**tree, group: {**tree[group], name: value}} if group else {**tree, name: value}
