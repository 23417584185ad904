"""A run's checkpoint as a Hugging Face folder, which transformers opens.

    python -m rowwise.launch.export run=runs/NAME to=DIR

    run=PATH             the run, or one checkpoint of it
    to=DIR               the folder to make; it must not exist, or be empty
    checkpoint=STEP      the checkpoint, by step or path; default: the newest whose checksums are right
    dtype=fp32           fp32 (as trained, unless in fp64), bf16 (half the size) or fp16
    max_file_bytes=5e9   of a safetensors file; the export holds one of them in memory, and a shard of one tensor
    tokenizer=PATH       the tokenizer.json to put beside the weights, bytes (a token is a byte), or none; default: the run's
                         own, and none where it read tokens
    form=dense           of the hidden weights of a sparse run: dense, which transformers opens; condensed (of constant
                         fan-in, sparsity=srigl) or semi_structured (2:4, sparsity=nm), which
                         rowwise.trainer.models.forms.open_exported opens for inference

Exit code 0: DIR is complete; 2: refused, and there is no DIR. It gets its name last: what a killed export leaves behind
is DIR.incomplete, which the next one removes.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import argparse
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from rowwise.trainer.keys import unknown_key
from rowwise.trainer.manifest import Manifest, damage, find_checkpoints, read_manifest, step_folder
from rowwise.trainer.models.config_json import FORMS

POSSIBLE_DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ExportConfig:
    """The keys, as they were given."""

    run: str
    to: str
    checkpoint: str | None = None
    dtype: str = "fp32"
    max_file_bytes: str = "5e9"
    tokenizer: str | None = None
    form: str = "dense"


def main(arguments: list[str] | None = None) -> int:
    """Exports. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="rowwise.launch.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    try:
        print(export(parse(parser.parse_args(arguments).settings)))
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def parse(settings: list[str]) -> ExportConfig:
    """`key=value` arguments, strictly. Raises ValueError."""
    known = [field.name for field in fields(ExportConfig)]
    given: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(unknown_key(key, known))
        if not value or key in given:
            raise ValueError(f"{setting}: give {key}=VALUE, once")
        given[key] = value
    for field in fields(ExportConfig):
        if field.default is MISSING and field.name not in given:
            raise ValueError(f"{field.name}= is missing; give run=runs/NAME to=DIR")
    return ExportConfig(**given)


def export(config: ExportConfig) -> str:
    """Exports what the keys ask for, and returns what was done, in a line. Raises ValueError."""
    if config.dtype not in POSSIBLE_DTYPES:
        raise ValueError(f"dtype={config.dtype}: possible are {', '.join(POSSIBLE_DTYPES)}")
    if config.form not in FORMS:
        raise ValueError(f"form={config.form}: possible are {', '.join(FORMS)}")
    if config.form == "semi_structured" and config.dtype == "fp32":
        raise ValueError("dtype=fp32: form=semi_structured has 16-bit numbers; give dtype=bf16 or dtype=fp16")
    max_file_bytes, folder = _bytes(config.max_file_bytes), _free(Path(config.to).expanduser())
    checkpoint, manifest = choose(config)
    from rowwise.trainer.export import Source, Target, write  # torch, which no refusal above waits for

    target = Target(folder, config.dtype, config.form, max_file_bytes, config.tokenizer)
    return write(Source(checkpoint, manifest["config"], manifest["fingerprint"].get("tokenizer")), target)


def choose(config: ExportConfig) -> tuple[Path, Manifest]:
    """The checkpoint to export and its manifest. Says what it passes over. Raises ValueError where none is sound."""
    candidates, complaints = _candidates(config), []
    for checkpoint in candidates:
        try:
            manifest = read_manifest(checkpoint)
            found = damage(checkpoint, manifest["files"].items())
        except ValueError as error:
            found = [str(error)]
        if not found:
            return checkpoint, manifest
        complaints.append(f"{checkpoint} is damaged: {'; '.join(found)}")
        if checkpoint != candidates[-1]:
            print(f"{complaints[-1]}; passed over", file=sys.stderr)
    raise ValueError(f"{complaints[-1]}; no sound checkpoint is left, give another checkpoint= or run=")


def _candidates(config: ExportConfig) -> list[Path]:
    run = Path(config.run).expanduser()
    found = find_checkpoints(run)
    if not found:
        others = sorted(str(p) for p in run.parent.iterdir() if _holds_some(p)) if run.parent.is_dir() else []
        hint = f"possible are {', '.join(others)}" if others else "give a folder that a training run wrote"
        raise ValueError(f"run={config.run}: there is no checkpoint; {hint}")
    if config.checkpoint is None:
        return found
    if config.checkpoint.isdigit():
        name = step_folder(run, int(config.checkpoint)).name
        chosen = [checkpoint for checkpoint in found if checkpoint.name == name]
    else:
        path = Path(config.checkpoint).expanduser().resolve()
        chosen = [checkpoint for checkpoint in found if checkpoint.resolve() == path]
    if not chosen:
        possible = ", ".join(checkpoint.name for checkpoint in found)
        raise ValueError(f"checkpoint={config.checkpoint}: not one of run={config.run}; possible are {possible}")
    return chosen


def _holds_some(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(find_checkpoints(folder))
    except (OSError, ValueError):  # another's, which is not asked for
        return False


def _bytes(text: str) -> int:
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ValueError(f"max_file_bytes={text}: a number of bytes of at least 1, such as 5e9")
    return number


def _free(final: Path) -> Path:
    """The folder to make: what a link leads to, not the link. Raises ValueError."""
    if final.is_symlink() and not final.exists():
        raise ValueError(
            f"to={final} is a link to {final.readlink()}, which is not there; make that folder, or give another"
        )
    final = final.resolve() if final.is_symlink() else final
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"to={final} exists and is not empty; give a new folder, or remove it")
    return final


if __name__ == "__main__":
    sys.exit(main())
