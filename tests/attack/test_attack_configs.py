"""Configurations of a stranger: what is accepted is found in the configuration as it was given, what is refused is refused in
one line, and nothing else happens. (Law 5.)"""

import contextlib
import io
import math
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from rowwise.launch import agent, cli
from rowwise.launch.choices import GROUPS
from rowwise.launch.compose import compose_tree
from rowwise.launch.outcome import Outcome
from rowwise.launch.overrides import quoted
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree, tree_of
from rowwise.trainer.keys import flat

pytestmark = pytest.mark.long

PARTS = 20  # tests among which the cases are shared, so that a fault names its share
COMPOSED, COMMANDS = 2_000, 100
SECONDS = 20  # of one case, at most
DEFAULTS = ("data=stdlib", "model=tiny")
CHOICES = {
    "optim": ("adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "muon", "galore", "fira", "apollo", "dct"),
    "schedule": ("constant", "cosine", "wsd", "infinite", "one_cycle", "linear", "lr_range"),
    "precision": ("fp64", "fp32", "bf16", "fp16"),
    "sparsity": ("none", "set", "rigl", "srigl", "nm", "static", "st3", "pdp", "gradual"),
    "data": ("stdlib", "text", "tokens", "hf"),
    "tracker": ("none", "wandb", "tensorboard"),
}
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 10**6, 2**31, 2**63, -(2**63), 10**30, 0.0, 0.5, 1.0, -0.5, 1e-30, 1e30, 1e308]
STRINGS = ["", "a", " ", "none", "null", "true", "0", "../x", "/nowhere", "~", "~nobody/x", "a/b", "ü", "日本", "a=b", "[", "{a}",
           "${steps}", "${nowhere}", "${oc.env:HOME}", "x" * 300, "'", '"', "\\", "a,b", "*", "%", "#", "inf", "1e3",
           ".", ".."]  # fmt: skip
TREES = [[], [1], ["a", "b"], [[]], {}, {"a": 1}, {"name": "x"}, [None], [0.9, 0.95], [math.inf]]


class TooLong(Exception):
    """A case did not end."""


@contextlib.contextmanager
def ending(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def written(value: Any) -> str:
    """As the value of an override that means `value`."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
    return repr(value)


def some_value(chance: random.Random) -> Any:
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice([None, True, False, math.inf, -math.inf, math.nan])
    if kind == 1:
        return chance.choice(TREES)
    if kind == 2:
        return chance.choice(STRINGS)
    if kind == 3:
        return chance.choice([chance.randrange(-4, 300), chance.uniform(-1, 3)])
    return chance.choice(NUMBERS)


def some_case(chance: random.Random, schema: list[tuple[list[str], list[str]]]) -> tuple[list[str], dict[str, Any]]:
    """Choices of groups, and values for a few keys that are there with them."""
    choices, keys = chance.choice(schema)
    given = {key: some_value(chance) for key in chance.sample(keys, chance.choice([1, 1, 1, 2, 3]))}
    return choices, given


@pytest.fixture(scope="module")
def schema() -> list[tuple[list[str], list[str]]]:
    """Every choice of a group in turn, with the keys of the whole configuration that it makes."""
    assert set(CHOICES) < set(GROUPS)
    made = []
    for group, names in CHOICES.items():
        for name in names:
            choices = [word for word in DEFAULTS if not word.startswith(f"{group}=")] + [f"{group}={name}"]
            made.append((choices, sorted(flat(compose_tree(choices)))))
    return made


def same(given: Any, found: Any) -> bool:
    """Whether a value of the configuration is the one that was given; a whole number may stand for a fraction."""
    if isinstance(given, bool) or isinstance(found, bool) or given is None or found is None:
        return given is found
    if isinstance(given, int | float) and isinstance(found, int | float):
        return float(given) == float(found)
    if isinstance(given, list) and isinstance(found, list):
        return len(given) == len(found) and all(map(same, given, found))
    if isinstance(given, dict) and isinstance(found, dict):
        return given.keys() <= found.keys() and all(same(value, found[key]) for key, value in given.items())
    return type(given) is type(found) and given == found


def at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("part", range(PARTS))
def test_random_configurations(schema, part, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    accepted = 0
    for number in range(part, COMPOSED, PARTS):
        chance = random.Random(number)
        choices, given = some_case(chance, schema)
        words = [*choices, *(f"{key}={written(value)}" for key, value in given.items())]
        try:
            with ending(SECONDS):
                config = check(config_from_tree(compose_tree(words)), chance.choice([1, 2, 4]))
        except ValueError as refusal:
            assert str(refusal).strip() and "\n" not in str(refusal), (number, words, str(refusal))
            continue
        except BaseException as error:
            raise AssertionError(f"{number}: {words}: {type(error).__name__}: {error}") from error
        accepted += 1
        for key, value in given.items():
            found = at(tree_of(config), key)
            if key in ("parallel.shard", "parallel.replicate") and value == -1:
                continue  # what is left
            if key == "run_dir" and str(value).startswith("~"):
                continue  # the home folder
            if key == "optim.lr" and value is None:
                continue  # as the model's size asks for
            assert same(value, found), (number, words, found)
    assert accepted, "one of a hundred is sound"
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_random_command_lines(schema, monkeypatch, tmp_path):
    """Through `rowwise train`, up to where workers would be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agent, "run_workers", lambda job, warm=None, relay=False: Outcome("complete", None, job.steps))
    codes = []
    for number in range(COMMANDS):
        choices, given = some_case(random.Random(f"command {number}"), schema)
        words = [*choices, *(f"{key}={written(value)}" for key, value in given.items())]
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                with ending(SECONDS):
                    codes.append(cli.main(["train", *words]))
            except BaseException as error:
                raise AssertionError(f"{number}: {words}: {type(error).__name__}: {error}") from error
        said = err.getvalue()
        assert not out.getvalue()
        assert codes[-1] in (0, 2), (words, said)
        if codes[-1] == 2:
            assert said.startswith("refused: ") and said.count("\n") == 1, (words, said)
    assert {0, 2} == set(codes)
