"""`rowwise generate chat=true`: a conversation on a terminal, by the template of a run on conversations; and such a run's export."""

import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_trainer_data_chat import messages
from test_trainer_data_chat_runs import chat, conversations, rows_of

from chat_templates import CHATML
from parity import small_config, with_layout
from rowwise.launch.export import main as export
from rowwise.launch.generate import main
from rowwise.launch.runs import open_run
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.sample import Sampling
from rowwise.trainer.starts import read_sample
from runs import named, run_said, run_train
from terminals import Terminal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the tests' own saving


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory) -> TrainConfig:
    """Two steps on conversations."""
    folder = tmp_path_factory.mktemp("talk")
    words = (
        "model.vocab_size=300",
        "precision=fp32",
        "steps=2",
        "checkpoint.every=1",
        "batch.global_size=8",
        "batch.seq_len=150",
        "sample.tokens=12",
        "sample.temperature=0",
        "sample.prompt=What is it?",
    )
    config = replace(small_config(folder, *words), data=chat(folder, rows_of(conversations())))
    config = with_layout(config, 1)
    ranks.run(run_train, 1, config)
    return config


def test_the_sample_at_the_end_is_an_answer(ranks, run, tmp_path):
    """Of a user who says the prompt; the same where ranks share weights and sequences; and no more than the template allows."""
    sample = read_sample(Path(run.run_dir))
    assert (
        sample.prompt == "What is it?" and sample.text == f"What is it?\n{answer(run, ('user', 'What is it?')).strip()}"
    )
    shared = with_layout(named(run, tmp_path, "shared"), 2, zero=3, ring=2, ring_order="zigzag")
    said = "".join(ranks.run(run_said, 2, shared))
    assert read_sample(Path(shared.run_dir)).text == sample.text and sample.text in said
    refusing = Path(run.data.tokenizer, "refusing.jinja")
    refusing.write_text(
        CHATML.source + "{% if messages[0].content == 'What is it?' %}{{ raise_exception('ask more') }}{% endif %}"
    )
    config = named(replace(run, data=replace(run.data, template=str(refusing))), tmp_path, "refused")
    assert "the model writes nothing after sample.prompt: the template fails" in ranks.run(run_said, 1, config)[0]


def answer(config: TrainConfig, *turns: tuple[str, str], most: int = 12) -> str:
    """What the likeliest tokens say after the text of these turns, up to the end of its own."""
    writer = open_run(config.run_dir).writer(device="cpu")
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"
    (end,) = writer.tokenizer.encode_prompt("<|im_end|>")
    return "".join(replace(writer, end_token=end).write(text, most, Sampling(temperature=0)))


def test_every_message_is_answered_after_all_before_it(run, capsys, monkeypatch):
    first = answer(run, ("system", "Be brief."), ("user", "What is it?"))
    turns = (("system", "Be brief."), ("user", "What is it?"), ("assistant", first), ("user", "And Spain?"))
    expected = f"{first}\n{answer(run, *turns)}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is it?\n\nAnd Spain?\n")))
    common = [f"run={run.run_dir}", "chat=true", "temperature=0", "max_tokens=12", "device=cpu"]
    assert main([*common, "system=Be brief."]) == 0
    assert capsys.readouterr().out == expected
    assert main([*common, "system=Be brief.", "prompt=What is it?"]) == 0
    assert capsys.readouterr().out == f"{first}\n"
    assert main(["system=a", f"run={run.run_dir}", "prompt=a"]) == 2
    assert "give chat=true too" in capsys.readouterr().err


def test_an_answer_ends_with_the_turn(run):
    """At the token that the template has behind what an assistant says, whatever else ends a text."""
    from rowwise.trainer.data.chat.renderer import Renderer

    tokenizer = open_run(run.run_dir).writer(device="cpu", chat=True).tokenizer
    with Renderer(tokenizer.template) as renderer:
        assert [tokenizer.end_of_turn(renderer)] == tokenizer.encode_prompt("<|im_end|>")
        source = "{% for m in messages %}{{ m.content }};{% endfor %}"
        with Renderer(replace(tokenizer.template, source=source)) as bare:
            assert tokenizer.end_of_turn(bare) == tokenizer.end[0], "of all text, where a turn has no token of its own"


@pytest.mark.full
def test_a_terminal_talks_and_ctrl_c_ends_an_answer_alone(run):
    """The answer is kept as far as it came, the conversation goes on, and Ctrl-D ends it."""
    with Terminal(100) as terminal:
        words = [f"run={run.run_dir}", "chat=true", "temperature=1", "max_tokens=9999999", "device=cpu"]
        program = terminal.start("-P", "-m", "rowwise.launch.generate", *words, folder=run.run_dir)
        terminal.until(lambda lines: lines[-1] == ">", [program])
        for message in (b"What is it?\n", b"And Spain?\n"):
            before = len(terminal.lines)

            os.write(terminal.master, message)
            terminal.until(lambda lines, before=before: len("".join(lines[before:])) > 200, [program])
            assert program.poll() is None, terminal.lines
            program.send_signal(2)
            terminal.until(lambda lines: lines[-1] == ">", [program])
        os.write(terminal.master, b"half a line")
        time.sleep(0.1)
        program.send_signal(2)
        time.sleep(0.1)
        os.write(terminal.master, b"\x04")
        terminal.wait(program)
    assert program.returncode == 0 and "Traceback" not in terminal.raw.decode(errors="replace")


def test_a_run_on_text_talks_by_the_template_that_is_named_or_is_refused(run, capsys):
    assert main([f"run={run.run_dir}", "prompt=a", "chat=true", "tokenizer=bytes"]) == 2
    assert "conversations need the folder of a tokenizer" in capsys.readouterr().err
    assert main([f"run={run.run_dir}", "prompt=a", "chat=true", f"tokenizer={run.data.tokenizer}", "max_tokens=1"]) == 0


@pytest.mark.full
def test_an_export_talks_in_transformers(run, tmp_path, capsys):
    """With the run's template: the same tokens of a conversation, and the same answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert export([f"run={run.run_dir}", f"to={tmp_path / 'to'}"]) == 0
    assert json.loads((tmp_path / "to" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "to")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    given = tokenizer.apply_chat_template(
        messages(("user", "What is it?")), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    wrote = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].size(1) :]
    assert tokenizer.decode(wrote, skip_special_tokens=True) == answer(run, ("user", "What is it?"))
