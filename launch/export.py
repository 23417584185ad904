"""A run's checkpoint as a Hugging Face folder, which transformers opens.

    python -m rowwise.launch.export run=runs/NAME to=DIR

    run=PATH             the run, or one checkpoint of it
    to=DIR               the folder to make; it must not exist, or be empty
    checkpoint=STEP      the checkpoint, by step or path; default: the newest whose checksums are right
    weights=last         of a run with average.ema: those of the last step; default: the average
    dtype=fp32           fp32 (as trained, unless in fp64), bf16 (half the size) or fp16
    max_file_bytes=5e9   of a safetensors file; the export holds one of them in memory, and a shard of one tensor
    tokenizer=PATH       the tokenizer.json to put beside the weights, bytes (a token is a byte), or none; default: the run's
                         own, and none where it read tokens
    form=dense           of the hidden weights of a sparse run: dense, which transformers opens; condensed (of constant
                         fan-in, sparsity=srigl) or semi_structured (2:4, sparsity=nm), which
                         rowwise.trainer.models.forms.open_exported opens for inference
    adapter_only=true    of a run with an adapter that alone, as PEFT's folder (adapter_config.json, adapter_model.safetensors),
                         which PEFT opens on the model that the run began from; default: merged into whole matrices

Exit code 0: DIR is complete; 2: refused, and there is no DIR. It gets its name last: what a killed export leaves behind
is DIR.incomplete, which the next one removes.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

from dataclasses import dataclass
from pathlib import Path

from rowwise.launch.checkpoints import Weights, choose_sound, means_last
from rowwise.launch.settings import free_folder, parse, read_words
from rowwise.trainer.models.config_json import FORMS

POSSIBLE_DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ExportConfig:
    """The keys, as they were given."""

    run: str
    to: str
    checkpoint: str | None = None
    weights: Weights | None = None
    dtype: str = "fp32"
    max_file_bytes: str = "5e9"
    tokenizer: str | None = None
    form: str = "dense"
    adapter_only: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Exports. Returns the exit code."""
    words = read_words("rowwise export", __doc__, sys.argv[1:] if arguments is None else arguments)
    try:
        print(export(parse(ExportConfig, words, "run=runs/NAME to=DIR")))
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def export(config: ExportConfig) -> str:
    """Exports what the keys ask for, and returns what was done, in a line. Raises ValueError."""
    if config.dtype not in POSSIBLE_DTYPES:
        raise ValueError(f"dtype={config.dtype}: possible are {', '.join(POSSIBLE_DTYPES)}")
    if config.form not in FORMS:
        raise ValueError(f"form={config.form}: possible are {', '.join(FORMS)}")
    if config.form == "semi_structured" and config.dtype == "fp32":
        raise ValueError("dtype=fp32: form=semi_structured has 16-bit numbers; give dtype=bf16 or dtype=fp16")
    if config.adapter_only and config.form != "dense":
        raise ValueError(
            f"form={config.form} with adapter_only=true: an adapter has no sparse matrices; give form=dense"
        )
    max_file_bytes, folder = _bytes(config.max_file_bytes), free_folder(Path(config.to).expanduser())
    chosen = choose_sound(config.run, config.checkpoint)
    last = means_last(chosen.manifest, config.weights)
    from rowwise.trainer.export import Target, write, write_adapter_alone  # torch, which no refusal above waits for
    from rowwise.trainer.whole import Source

    if config.adapter_only:
        return write_adapter_alone(Source(chosen.path, chosen.manifest, last), folder, config.dtype)
    target = Target(folder, config.dtype, config.form, max_file_bytes, config.tokenizer)
    return write(Source(chosen.path, chosen.manifest, last), target)


def _bytes(text: str) -> int:
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ValueError(f"max_file_bytes={text}: a number of bytes of at least 1, such as 5e9")
    return number


if __name__ == "__main__":
    sys.exit(main())
