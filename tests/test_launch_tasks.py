"""`rowwise evaluate tasks=...`: lm-evaluation-harness itself, on tasks of local files, asks a run's model; what it is told is what the
model says one request at a time."""

import json
import math
import re

import pytest
import torch
from test_launch_export_forms import random_weights, saved_run

from rowwise.launch import evaluate as command
from rowwise.launch.evaluate import EvaluateConfig, evaluate_tasks, main
from rowwise.launch.runs import open_run
from rowwise.trainer.models.decoder import ModelConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the harness's own, and torch's of saving alone
]

BYTES = ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, ffn_dim=24, vocab_size=300, init_std=0.5)
QUESTIONS = [
    {"question": "def f(", "choices": ["x):", "rows):", "é"], "answer": 0, "text": "a row is a row; " * 9},
    {"question": "return ", "choices": ["a + b", "行"], "answer": 1, "text": "split by rows"},
    {"question": "import torch\nfrom torch import", "choices": [" nn", " Tensor, nn", " x"], "answer": 2, "text": "é"},
]
SHARED = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
"""
TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
    "doc_to_choice: '{{choices}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n",
    "predict": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
    "write": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{text}}'\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: rowwise_{name}\n{SHARED.format(folder=folder)}{text}")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return saved_run(folder, BYTES, random_weights(BYTES))  # that read tokens, 13 a sample


def log_probabilities(model, tokens):
    """Of each token after the first, as a textbook has it, in float64."""
    logits = model(torch.tensor([tokens[:-1]]), torch.arange(len(tokens) - 1)[None])[0].double()
    return logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]


def test_the_harness_finds_what_the_model_says(folder, run, monkeypatch, tmp_path, capsys):
    config = EvaluateConfig(
        run=str(run), tasks="rowwise_choose,rowwise_predict,rowwise_write", tasks_folder=str(folder), micro_size=2,
        device="cpu", tokenizer="bytes", to=str(tmp_path / "found.json"),
    )  # fmt: skip
    found = {score.task: score for _, score in evaluate_tasks(config)}
    writer = open_run(run).writer(tokenizer="bytes", device="cpu")
    encode, model, end = writer.tokenizer.encode_prompt, writer.model, writer.end_token
    right, nats, size = 0, 0.0, 0
    for one in QUESTIONS:
        before = encode(one["question"])
        said = []
        for choice in one["choices"]:
            tokens = encode(one["question"] + choice)
            asked = len(tokens) - len(before)
            said.append(float(log_probabilities(model, tokens[-writer.context - 1 :])[-asked:].sum()))
        right += said.index(max(said)) == one["answer"]
        tokens = encode(one["text"])
        assert len(tokens) <= writer.context or one is QUESTIONS[0], "one text is longer than a window"
        for first in range(0, len(tokens), writer.context):
            last = min(first + writer.context, len(tokens))
            begins = max(0, last - writer.context)  # the last window is as long as the others
            window = [end, *tokens[:last]] if begins == 0 else tokens[begins - 1 : last]
            nats -= float(log_probabilities(model, window)[-(last - first) :].sum())
        size += len(one["text"].encode())
    assert found["rowwise_choose"].value == pytest.approx(right / len(QUESTIONS))
    assert found["rowwise_choose"].samples == len(QUESTIONS)
    assert found["rowwise_predict"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["rowwise_write"].value == 0.0
    told = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert {one["task"]: one["value"] for one in told} == {name: score.value for name, score in found.items()}
    assert "rowwise_predict  bits_per_byte" in capsys.readouterr().out


def test_what_is_written_ends_where_the_task_says(run):
    from rowwise.launch.tasks import RunModel
    from rowwise.trainer.sample import Sampling

    writer = open_run(run).writer(tokenizer="bytes", device="cpu")
    model = RunModel(writer, 2)
    whole = "".join(writer.write("def f(", 12, Sampling(temperature=0)))
    assert model.written("def f(", {"max_gen_toks": 12}) == whole
    end = whole[4:6]
    assert model.written("def f(", {"until": ["never", end], "max_gen_toks": 12}) == whole[: whole.find(end)]


def test_whether_it_would_be_written_is_said(run):
    from rowwise.launch.tasks import RunModel
    from rowwise.trainer.sample import Sampling

    writer = open_run(run).writer(tokenizer="bytes", device="cpu")
    before = writer.encode("def f(")
    likeliest = list(writer.tokens(before, 3, Sampling(temperature=0)))
    other = [*likeliest[:2], (likeliest[2] + 1) % 256]
    pairs = [(before, likeliest), (before, other), ([*before, *before], likeliest[:1])]
    (one, yes), (two, no), _ = RunModel(writer, 3).likelihoods(pairs)
    assert yes and not no and one > two
    for pair, (found, _) in zip(pairs, RunModel(writer, 1).likelihoods(pairs), strict=True):
        expected = log_probabilities(writer.model, [*pair[0], *pair[1]])[-len(pair[1]) :].sum()
        assert found == pytest.approx(float(expected), rel=1e-5)


REFUSED = {
    "no such task": (["tasks=nothing_like_it"], r"there is no task nothing_like_it; .*tasks_folder=DIR"),
    "a text too": (
        ["tasks=rowwise_choose", "data=text"],
        r"data=text with tasks=rowwise_choose: a task has its own questions",
    ),
    "batches too": (["tasks=rowwise_choose", "batches=2"], r"batches=2 with tasks=rowwise_choose"),
    "shots of no task": (["shots=2"], r"shots=2: it is for tasks; give tasks=NAME, or leave it out"),
}


@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.slow if "such" in n else []) for n in REFUSED])
def test_refusals(folder, run, capsys, case):
    words, said = REFUSED[case]
    more = ["tokenizer=bytes", f"tasks_folder={folder}"] if any("tasks=" in word for word in words) else []
    assert main([f"run={run}", *words, *more]) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert refused.startswith("refused: ") and re.search(said, refused), refused


def test_without_the_harness_it_is_told_how_to_get_it(run, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main([f"run={run}", "tasks=arc_easy"]) == 2
    assert "pip install 'rowwise[tasks]'" in capsys.readouterr().err
