"""Tasks of lm-evaluation-harness (Gao et al.) on a run's model: `rowwise evaluate run=... tasks=...`. Imports it, so only those who
asked for tasks import this.

A request is (context, continuation): how likely the continuation is, and whether the model would write it by itself; a whole text,
each token once, in windows of the model's length; or a text to be written. Requests of many lengths are padded on the right, where a
causal model does not look.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rowwise.kernels.products import float32_products
from rowwise.trainer.generate import Writer, pieces
from rowwise.trainer.sample import Sampling

MOST_TOKENS = 256  # of a text to be written, where a task says nothing
Pair = tuple[list[int], list[int]]  # tokens before, and those whose probability is asked for


@dataclass(frozen=True)
class Tasks:
    """The `names` of tasks, their own or the harness's; `folder`: of YAML files of one's own; `shots`: examples before each question;
    `limit`: of the questions of a task, the first. None: as the task says; all."""

    names: Sequence[str]
    folder: str | None = None
    shots: int | None = None
    limit: int | None = None
    micro_size: int = 8


@dataclass(frozen=True)
class Score:
    """What a task found: a metric, with the filter of answers that it is of, and its standard error (None: not known)."""

    task: str
    metric: str
    value: float
    error: float | None
    samples: int | None = None


def run_tasks(writer: Writer, tasks: Tasks) -> list[Score]:
    """Evaluates a whole model. Raises ValueError for a task that there is not, and for one whose data is not there."""
    manager = _manager(frozenset(tasks.names), tasks.folder)
    if unknown := [name for name in tasks.names if name not in manager.all_tasks]:
        raise ValueError(
            f"tasks={','.join(tasks.names)}: there is no task {', '.join(unknown)}; `lm-eval ls tasks` lists the harness's, and "
            "tasks_folder=DIR adds the YAML files of a folder"
        )
    found = simple_evaluate(
        RunModel(writer, tasks.micro_size),
        tasks=list(tasks.names),
        num_fewshot=tasks.shots,
        limit=tasks.limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert found is not None
    return list(scores(found))


@functools.lru_cache(maxsize=1)  # the checkpoints of a run are asked the same
def _manager(names: frozenset[str], folder: str | None) -> TaskManager:
    """Knows the tasks of one's own folder, and only where others are asked for the harness's thousands, which it reads for seconds."""
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if names <= set(own.all_tasks):
            return own
    return TaskManager(include_path=folder)


def scores(found: Any) -> Iterable[Score]:
    """Reads what the harness returns: task -> `metric,filter` -> number, and `metric_stderr,filter`."""
    for task, metrics in found["results"].items():
        counted = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if not which or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{which}")
            known = isinstance(error, int | float) and math.isfinite(error)
            name = metric if which == "none" else f"{metric} ({which})"
            yield Score(task, name, float(value), float(error) if known else None, counted)


@dataclass(eq=False)
class RunModel(TemplateLM):
    """A run's model as the harness asks for it. `micro_size`: requests of a forward."""

    writer: Writer
    micro_size: int
    known: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, which stands before what has nothing before it. Raises ValueError where there is none."""
        if self.writer.end_token is None:
            raise ValueError(
                "the run has no token that ends a document, to stand before a text that nothing stands before; give another task, "
                "or a run with data.end_of_text"
            )
        return self.writer.end_token

    @property
    def max_length(self) -> int:
        """Tokens that the model looks back."""
        return self.writer.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.writer.tokenizer.encode_prompt(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self.likelihoods([(before, asked) for _, before, asked in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            totals.append(sum(found for found, _ in self.likelihoods([make_disjoint_window(pair) for pair in windows])))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self.written(request.args[0], dict(request.args[1])) for request in requests]

    def written(self, prompt: str, said: dict[str, Any]) -> str:
        """Writes after a prompt, up to the first of the texts that `said` names as ends."""
        until = said.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        temperature = float(said.get("temperature", 0.0)) if said.get("do_sample") else 0.0
        sampling = Sampling(temperature, int(said.get("top_k") or 0), float(said.get("top_p") or 1.0))
        tokens, text = self.tok_encode(prompt) or [self.prefix_token_id], ""
        coming = self.writer.tokens(tokens, int(said.get("max_gen_toks", MOST_TOKENS)), sampling)
        with contextlib.closing(pieces(self.writer.tokenizer, tokens, coming)) as written:  # type: ignore[type-var]
            for piece in written:
                text += piece
                if cuts := [place for end in ends if end and (place := text.find(end)) >= 0]:
                    return text[: min(cuts)]
        return text

    @torch.no_grad()
    def likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Returns of each pair the log-probability of the tokens asked for, and whether each is the likeliest. The model sees the last
        of what is before them. Raises ValueError for more tokens than that."""
        for _, asked in pairs:
            if len(asked) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(asked):,} tokens, and the model looks back {self.max_length:,} (batch.seq_len)"
                )
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        # Those of a length together, so that little is padded.
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for first in range(0, len(order), self.micro_size):
            some = order[first : first + self.micro_size]
            for i, one in zip(some, self._together([pairs[i] for i in some]), strict=True):
                found[i] = one
        return found

    def _together(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        rows = [[*before, *asked][-self.max_length - 1 :] for before, asked in pairs]
        device = next(self.writer.model.parameters()).device
        longest = max(len(row) for row in rows) - 1
        inputs = torch.tensor([row[:-1] + [0] * (longest + 1 - len(row)) for row in rows], device=device)
        positions = torch.arange(longest, device=device).expand_as(inputs)
        with float32_products("high" if self.writer.tf32 and device.type == "cuda" else "highest"):
            logits = self.writer.model(inputs, positions)
        found = []
        for logits_SV, row, (_, asked) in zip(logits, rows, pairs, strict=True):
            says = logits_SV[len(row) - 1 - len(asked) : len(row) - 1].double().log_softmax(-1)
            tokens = torch.tensor(asked, device=device, dtype=torch.long)
            likeliest = bool((says.argmax(-1) == tokens).all())
            found.append((float(says.gather(1, tokens[:, None]).sum()), likeliest))
        return found
