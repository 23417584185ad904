"""`rowwise check` says what a run would be, and refuses what the run would be refused for, without starting any of it."""

from itertools import product
from types import SimpleNamespace

import pytest

from commands import overrides_of, run_in_pool
from rowwise.launch import look, timing
from rowwise.launch.compose import compose_tree
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.simulate import simulate, uniform_costs
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.preview import drawn, parameter_table, rates_of, readers, shares_in_words


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_run_for_machines_that_are_not_here(tmp_path, capsys):
    """Larger than all memory that is; it is told in whole lines, and leaves nothing."""
    words = overrides_of(tmp_path, "parallel.pipeline=2", "batch.global_size=512", "checkpoint.every=5", "picture=true")
    big = ["model=llama3_70b", "parallel.zero=3", *[word for word in words if not word.startswith("model.")]]
    assert look.main([*big, "world_size=64", "batch.micro_size=4"]) == 0
    said = capsys.readouterr()
    assert "70.6 B parameters" in said.out
    assert "64 x workers: pipeline of 2 (1f1b), batch over 32, ZeRO-3 over 32" in said.out
    assert "reads      ranks 0, 32: sequences 0 to 15\n" in said.out
    assert "... and so on: 32 shares of 16 sequences, of which each is read by 2 ranks" in said.out
    assert "blocks.*.attention.wq.weight" in said.out and "stage 1 (pipeline rank 1): layers " in said.out
    assert said.err.startswith("warning: model.vocab_size=128256 and data=tokens has ")
    assert not list((tmp_path / "here").iterdir()) and not (tmp_path / "run").exists()


REFUSED = {
    "the key of a run": (["optim.lrr=3"], "did you mean optim.lr?"),
    "a key of its own": (["world_sise=3"], "world_sise"),
    "no number": (["world_size=many"], "world_size=many"),
    "a layout": (["parallel.shard=3", "world_size=4"], "start 3 workers"),
    "a batch": (["world_size=3"], "does not divide into 3 data-parallel ranks"),
    "data": (["world_size=2", "data.files=/nowhere.bin"], "names no file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_would_be_refused_for(case, tmp_path, capsys):
    words, why = REFUSED[case]
    assert look.main([*overrides_of(tmp_path), *words]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("refused: ") and why in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.zero=3", "adapter=lora", "adapter.rank=4"],
        ["parallel.pipeline=2", "batch.micro_size=1"],
        ["optim=galore"],
    ],
)
def test_the_table_is_the_one_that_the_run_writes(ranks, tmp_path, layout):
    words = overrides_of(tmp_path, "steps=1", *layout)
    run_in_pool(ranks, words)
    written = (tmp_path / "run/parameters.txt").read_text().splitlines()
    assert sorted(parameter_table(config_from_tree(compose_tree(words)))) == sorted(written)


LAYOUTS = list(product((1, 2, 3), (1, 2), (1, 3), (1, 2), (1, 2)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_which_ranks_read_a_share_is_what_the_mesh_says(layout):
    pipeline, replicate, shard, ring, ulysses = layout
    parallel = ParallelConfig(replicate=replicate, shard=shard, pipeline=pipeline, ring=ring, ulysses=ulysses)
    degree, world = replicate * shard, pipeline * replicate * shard * ring * ulysses
    found = {}
    for rank in range(world):
        mesh = SimpleNamespace(rank=rank, sequence_degree=ring * ulysses, data_degree=degree)
        found.setdefault(Mesh.data_rank.fget(mesh), []).append(rank)
    assert {share: readers(share, parallel) for share in range(degree)} == found


def test_the_tokens_that_a_rank_of_a_shared_sequence_has():
    config = config_from_tree(compose_tree(["parallel.ring=3", "parallel.ulysses=2", "batch.seq_len=100"]))
    parallel = ParallelConfig(replicate=1, shard=1, ring=3, ulysses=2)
    assert shares_in_words(config.batch, parallel) == ["ranks 0-5: sequences 0 to 15, 17 of 102 tokens of each"]


@pytest.mark.parametrize("name", GENERATORS)
def test_a_picture_shows_every_action_where_there_is_room(name):
    shape = Shape(4, 1 if name in ("gpipe", "1f1b", "zb_h1", "zb_h2") else 2, 8, 4)
    schedule = make_schedule(name, shape)
    timeline = simulate(schedule, uniform_costs(schedule.stages))
    whole = drawn(timeline, 10_000)
    for line, actions in zip(whole, schedule.ranks, strict=True):
        shown = line[3:]
        assert len(shown) == round(timeline.makespan)
        for kind, units in (("F", 1), ("I", 1), ("W", 1), ("B", 2)):
            assert shown.count(kind) == units * sum(action.kind == kind for action in actions)
    assert {len(line) for line in drawn(timeline, 40)} == {min(40, len(whole[0]))}


def test_the_rates_are_those_of_the_steps():
    config = config_from_tree(compose_tree(["steps=7", "schedule=constant", "schedule.warmup_steps=3", "optim.lr=0.3"]))
    assert rates_of(config, 7) == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3, 0.3, 0.3])
    assert rates_of(config, 3) == pytest.approx([0.075, 0.3, 0.3])


@pytest.mark.parametrize("width", [80, 200])
def test_on_a_terminal_lines_fit_and_nothing_is_left_out(tmp_path, capsys, monkeypatch, width):
    words = [*overrides_of(tmp_path, "picture=true"), "world_size=4", "parallel.ring=2"]
    assert look.main(words) == 0
    plain = capsys.readouterr()
    monkeypatch.setattr(look, "is_terminal", lambda stream: True)
    monkeypatch.setattr(look, "width_of", lambda stream: width)
    assert look.main(words) == 0
    said = capsys.readouterr()
    path = str(tmp_path)  # a word that is longer than a line stands whole
    assert all(len(line) < width or path in line for line in (said.out + said.err).splitlines())
    table = [word for word in plain.out.split() if "▁" not in word]
    assert [word for word in said.out.split() if "▁" not in word] == table


@pytest.mark.full
def test_where_the_time_of_a_start_goes(tmp_path, capfd):
    assert timing.time_starts([*overrides_of(tmp_path, "steps=100000"), "resume=auto"]) == 0
    said = capfd.readouterr().out
    for what, _ in timing.MARKS:
        assert what in said
    assert not (tmp_path / "run").exists() and not list((tmp_path / "here").iterdir())
    assert timing.time_starts([*overrides_of(tmp_path), "data.files=/nowhere.bin"]) == 2
    assert "names no file" in capfd.readouterr().err
