"""Refusals as data: what they say of a run, and that none which a room states is forgotten where they are gathered. (Law 5.)"""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_house import FILES, in_a_process

import rowwise.trainer.check as gathered
from rowwise.conf.option import options_of
from rowwise.conf.refusal import Refusal, Refused, refuse
from rowwise.trainer.config import TrainConfig

NOT_BOTH = Refusal(
    ("a.one", "two"), lambda run: run.a.one and run.two, "a.one={a.one} with two={two:,}: not both; give two=0"
)
ALWAYS = Refusal(("two",), lambda run: True, lambda run: f"two={run.two + 1}")


def test_the_first_that_holds_is_said():
    run = SimpleNamespace(a=SimpleNamespace(one=True), two=1000)
    with pytest.raises(Refused, match=r"^a.one=True with two=1,000: not both; give two=0$") as refused:
        refuse(run, (NOT_BOTH, ALWAYS))
    assert refused.value.options == ("a.one", "two") and isinstance(refused.value, ValueError)
    with pytest.raises(Refused, match=r"^two=1$"):
        refuse(SimpleNamespace(a=SimpleNamespace(one=True), two=0), (NOT_BOTH, ALWAYS))
    refuse(run, (Refusal(("two",), lambda run: False, "{no.such}"),))


def stated() -> dict[str, str]:
    """Every name that is declared to be `Refusals`, and its file."""
    found = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, ast.AnnAssign)
                and ast.unparse(node.annotation) == "Refusals"
                and node.value is not None
            ):
                found[ast.unparse(node.target)] = path.name
    return found


def test_every_refusal_that_a_room_states_is_asked():
    nodes = ast.walk(ast.parse(Path(gathered.__file__).read_text()))
    asked = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert len(stated()) > 15 and not stated().keys() - asked


def test_refusals_name_options_that_there_are():
    known = {key for key, _ in options_of(TrainConfig)}
    for name, file in stated().items():
        for refusal in getattr(gathered, name):
            assert set(refusal.options) <= known, f"{name} of {file}: {set(refusal.options) - known}"


def test_refusals_need_no_torch():
    program = "import rowwise.conf.refusal, rowwise.conf.option, sys; print('torch' in sys.modules)"
    assert in_a_process(program).strip() == "False"
