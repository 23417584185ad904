"""Words of other frameworks are answered with ours, and every refusal is one line in our own words. (Law 5.)"""

import random
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from mistakes import MISTAKES
from omegaconf import OmegaConf

from rowwise.launch import start
from rowwise.launch.answers import WORDS, numbers
from rowwise.launch.choices import GROUPS, choices_of, keys_of, tree_of_files
from rowwise.launch.compose import compose_part, compose_tree
from rowwise.launch.given import gather
from rowwise.launch.overrides import SEARCHPATH
from rowwise.launch.slurm import SlurmConfig
from rowwise.launch.sweep.space import parse_space
from rowwise.launch.words.choices import CHOICES, MISSING
from rowwise.trainer.config import config_from_tree

# Of Hydra, OmegaConf and pydantic, as they speak to those who program with them.
LEAKS = (
    "search path", "provider", "pkg://", "hydra.cc", "viable", "lexer", "antlr", "object_type", "full_key", "pydantic",
    "omegaconf", "struct", "interpolation", "extraneous", "mismatched", "<eof>", "override_grammar", "input should be",
    "could not", "available options", "to append", "config group", "traceback", "exception", "--multirun",
)  # fmt: skip
OVERRIDES = re.compile(r"([a-z_]+(\.[a-z_]+)?=[^A-Z ]+ ?)+")


def composed(typed: list[str]) -> dict:
    return compose_tree(gather(start.parse(typed).overrides))


def refused(typed: list[str]) -> str:
    with pytest.raises(ValueError) as refusal:
        composed(typed)
    said = str(refusal.value)
    assert "\n" not in said and not [leak for leak in LEAKS if leak in said.lower()], said
    return said


@pytest.mark.parametrize("framework", MISTAKES)
def test_typical_mistakes_of_other_frameworks_are_answered_with_what_to_write(framework):
    """And what is to be written is taken, but for files that are not there."""
    for typed, answer in MISTAKES[framework]:
        said = refused(typed.split())
        taken = OVERRIDES.fullmatch(answer)
        assert (f"write {answer}" if taken and "give" not in said else answer) in said, (typed, said)
        if taken:
            try:
                compose_tree(gather([*start.parse(typed.split()).overrides[:-1], *answer.split()]))
            except ValueError as refusal:
                assert "No such file" in str(refusal) or "data.tokenizer is of data=chat, hf or text" in str(refusal)


def test_there_are_a_hundred_of_them():
    assert len(MISTAKES) >= 6 and sum(map(len, MISTAKES.values())) >= 100
    assert (
        min(len(MISTAKES[name]) for name in ("Hugging Face", "torchtitan", "DeepSpeed", "axolotl", "Megatron-LM")) >= 20
    )


def all_keys() -> set[str]:
    """Every key of the configuration, under any choice."""
    tree = compose_tree([])
    keys = {*tree, *(f"{key}.{inner}" for key, node in tree.items() if isinstance(node, dict) for inner in node)}
    keys |= {f"parallel.deepspeed.{key}" for key in tree["parallel"]["deepspeed"]}
    for group in tree:
        keys |= {
            f"{group}.{leaf}" for leaves in (keys_of(group).values() if choices_of(group) else ()) for leaf in leaves
        }
    return keys | {"experiment", "config"}


def test_every_key_that_the_table_writes_exists():
    keys, tree = all_keys() | {"optim.KEY", "schedule.KEY"}, compose_tree([])
    groups = {group for group in tree if choices_of(group)} | {"experiment"}
    for word in WORDS:
        for write in filter(None, [word.write, *word.values.values()]):
            for part in write.format(value="1", **numbers(tree, "1")).split():
                key, equals, value = part.partition("=")
                assert not equals or key in keys, (word.names, part)
                if key in groups and value not in ("NAME", "1"):
                    assert value in choices_of(key), (word.names, part)


def test_every_key_that_the_table_speaks_of_exists():
    sections = "|".join(key for key, node in compose_tree([]).items() if isinstance(node, dict))
    texts = [word.means for word in WORDS] + [text for table in MISSING.values() for text in table.values()]
    for text in texts:
        for key in re.findall(rf"\b(?:{sections})\.[a-z_]+", text):
            assert key in all_keys(), text


def test_every_choice_that_the_table_names_exists():
    for group, table in CHOICES.items():
        assert set(table.values()) <= set(choices_of(group)), group
        assert not set(table) & set(choices_of(group)), group
    assert not [name for group, table in MISSING.items() for name in table if name in choices_of(group)]


def test_no_name_of_the_table_stands_there_twice_or_is_ours():
    names = [name for word in WORDS for name in word.names.split()]
    assert len(names) == len(set(names)) >= 100
    assert not set(names) & all_keys()


def test_the_numbers_of_an_answer_are_those_of_the_configuration():
    said = refused(
        ["nproc=4", "batch.micro_size=2", "batch.global_size=64", "parallel.ring=2", "gradient_accumulation_steps=8"]
    )
    assert said == (
        "unknown key gradient_accumulation_steps: write batch.global_size=32 (gradient accumulation is batch.global_size / "
        "(batch.micro_size x data ranks): now 64 / (2 x 2) = 16)"
    )
    assert "write steps=7 (a step takes batch.global_size=16 sequences)" in refused(["train_samples=100"])


@pytest.mark.parametrize("word", ["mlflow_tracking_uri=postgresql://me:hidden@host/a", "sweep.storage=postgresql://me:hidden@host/[",
                                  "tracker=postgresql://me:hidden@host"])  # fmt: skip
def test_no_password_is_in_an_answer(word):
    assert "hidden" not in refused([word])


def test_several_unknown_keys_are_answered_at_once():
    said = refused(["lr=1e-3", "hidden_size=64", "optim.lrr=3"])
    assert "write optim.lr=1e-3" in said and "write model.dim=64" in said and "did you mean optim.lr?" in said


def test_where_one_value_has_an_answer_no_other_is_offered():
    assert refused(["fp32=maybe"]) == "unknown key fp32: write precision=fp32"


ANSWERED = {
    "optim=adam": "did you mean adamw?",
    "optim.rank=8": "optim.rank is of optim=apollo, dct, fira or galore",
    "optim.name=lion": "write optim=lion",
    "warmup_ratio=0.1": "write schedule.warmup=0.1 (a share of the run); it is of schedule=constant, cosine, infinite, linear or "
    "wsd, now schedule=one_cycle",
    "global_size=32": "did you mean batch.global_size?",
    "batch=16": "these are the keys of batch: batch.global_size,",
    "optim.lr=1e-3,3e-3": "several values are a sweep's",
    "steps=ten": "give a whole number",
    "steps==3": "the value cannot be read",
    "compile=maybe": "give true or false",
    "name=${nme}": "what stands in ${...} is not there",
    "hydra.run.dir=x": "a run sets what is Hydra's own itself",
    "~optim": "no key can be taken away",
    "optim@x=lion": "optim@x is no key",
    "llama_1b": "such as model=llama_1b",
    "optim.betas=[0.9": "the value cannot be read",
    "tracker=comet_ml": "metrics.jsonl is always written",
    "parallel=fsdp": "give parallel.zero=3",
    "model=llama-7b": "possible are",
    "model=Gemma-2-2B": "did you mean gemma2_2b?",
    "model=granite": "did you mean granite3_3_2b?",
    "model=qwen2.5-14b": "did you mean qwen2_5_7b? (Any other is its Hugging Face folder, model=FOLDER.)",
}


@pytest.mark.parametrize("word", ANSWERED)
def test_what_cannot_be_taken_is_answered(word):
    assert ANSWERED[word] in refused([word])


SAME = {
    "--steps 10": "steps=10",
    "--steps=10": "steps=10",
    "steps=1e3": "steps=1000",
    "steps=10.0": "steps=10",
    "steps=1_000": "steps=1000",
    "--optim.lr 1e-3 --compile": "optim.lr=1e-3 compile=true",
    "--compile --steps 3": "compile=true steps=3",
    "--compile steps=3": "compile=true steps=3",
    "--seed -1": "seed=-1",
    "compile=yes": "compile=true",
    "compile=0": "compile=false",
    "nproc=None": "nproc=null",
    "name=7": "name='7'",
    "+experiment=quick": "experiment=quick",
    "++seed=3": "seed=3",
    "experiment=null": "seed=0",
    "run_dir=~/x": "run_dir='~/x'",
    "run_dir=a#b": "run_dir='a#b'",
    "--parallel.timeout-seconds 60": "parallel.timeout_seconds=60",
}


@pytest.mark.parametrize("typed", SAME)
def test_ways_of_writing_that_mean_one_thing_are_understood(typed):
    assert config_from_tree(composed(typed.split())) == config_from_tree(compose_tree(SAME[typed].split()))


@pytest.mark.parametrize("typed", [["-x"], ["--nodes"], ["--max-restarts", "two"], ["--config-dir"]])
def test_wrong_options_are_one_line(typed, capsys):
    with pytest.raises(SystemExit) as end:
        start.parse(typed)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("refused: ") and said.count("\n") == 1


def test_no_word_of_what_reads_the_configuration_is_in_any_refusal():
    """Of 1,000 wrong command lines, drawn from pieces of which people make them."""
    chance = random.Random(0)
    keys = ["steps", "optim", "optim.lr", "optim.betas", "model", "data.files", "name", "batch", "foo", "a.b.c", "hydra/launcher",
            "hydra.job.name", "experiment", "optim.assign", "parallel.zero", "compile", "", "learning_rate", "1", "model.rope_scaling",
            "resume", "sample.prompt", "precision", "schedule.x", "optim.assign.0", "config"]  # fmt: skip
    values = ["", "ten", "[1,2", "{a:1}", "{a", "${x}", "${oc.env:NO_SUCH_X}", "${", "'", '"', "a b", "1,2", "null", "nan", "adam",
              "choice(1,2)", "foo(1)", "range(1)", "a=b", "~", "#", "(", "[[]]", "{}", "1e999", "glob(*)", "\\", "''", "[a,{b:1}]",
              "interval(1,2)", "int(x)", "@x", "!!python/none", "/nowhere.yaml"]  # fmt: skip
    refusals = 0
    for _ in range(1000):
        words = [f"{chance.choice(['', '', '', '+', '++', '~', '--', '-'])}{chance.choice(keys)}={chance.choice(values)}"
                 if chance.random() < 0.95 else chance.choice(keys) for _ in range(chance.choice([1, 1, 2]))]  # fmt: skip
        try:
            config_from_tree(compose_tree(gather([word for word in words if not word.startswith("-")])))
        except ValueError as refusal:
            said, refusals = str(refusal), refusals + 1
            leaked = [leak for leak in LEAKS if leak in said.lower().replace("hydra.job", "")]
            assert "\n" not in said and said and not leaked, (words, said)
    assert refusals > 700


def test_sweeps_and_scripts_speak_so_too():
    for made in (
        lambda: parse_space(["optim.lr=[1"]),
        lambda: compose_part("slurm", SlurmConfig, ["slurm.nodes=two"]),
        lambda: compose_part("slurm", SlurmConfig, ["slurm.name=a,b"]),
        lambda: compose_part("slurm", SlurmConfig, ["slurm.extra=1"]),
    ):
        with pytest.raises(ValueError) as refusal:
            made()
        assert "\n" not in str(refusal.value) and not [leak for leak in LEAKS if leak in str(refusal.value).lower()]


# Each file of each group once, every second of the models', which are alike but for their values; and none chosen.
NAMES = {group: choices_of(group)[:: 2 if group == "model" else 1] for group in GROUPS if group != "experiment"}
TURNS = range(max(map(len, NAMES.values())))
CHOSEN = [(), *(tuple(f"{group}={names[turn % len(names)]}" for group, names in NAMES.items()) for turn in TURNS)]


def test_files_read_by_themselves_are_what_hydra_composes():
    for choices in CHOSEN:
        with initialize_config_module("rowwise.conf", version_base="1.3"):
            theirs = OmegaConf.to_container(compose("train", overrides=list(choices)))
        ours = tree_of_files(choices)
        assert ours is not None and (ours, [*ours]) == (theirs, [*theirs]), choices
    assert tree_of_files(("experiment=quick",)) is None and tree_of_files((f"{SEARCHPATH}=[]",)) is None


def test_choices_are_the_files_of_conf():
    conf = Path(str(files("rowwise.conf")))
    assert keys_of("optim")["lion"] == set(yaml.safe_load((conf / "optim" / "lion.yaml").read_text()))
