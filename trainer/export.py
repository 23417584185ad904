"""A run's checkpoint, written as a Hugging Face folder; see `rowwise.launch.export` for the command."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rowwise.parallel.precision import DTYPES
from rowwise.trainer.adapters.as_lora import as_lora
from rowwise.trainer.adapters.config import AdaLora, Dora, Lora
from rowwise.trainer.adapters.frozen import decoded
from rowwise.trainer.adapters.merge import adapter_of
from rowwise.trainer.adapters.peft import write_adapter
from rowwise.trainer.data.chat.tokenizer import ChatTokenizer
from rowwise.trainer.data.own_tokenizer import of_one_tokenizer, tokenizer_of_run
from rowwise.trainer.data.tokenizer import byte_tokenizer_json
from rowwise.trainer.files import new_folder
from rowwise.trainer.metadata import read_metadata
from rowwise.trainer.models.config_json import their_config, with_form
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.models.forms import in_form
from rowwise.trainer.models.huggingface import their_name, write_folder
from rowwise.trainer.models.init import model_rows
from rowwise.trainer.whole import Source, coded_in, reader


@dataclass(frozen=True)
class Target:
    """The folder to make; the dtype's and the form's names; the most bytes of a file; the tokenizer that was asked for."""

    folder: Path
    dtype: str
    form: str
    max_file_bytes: int
    tokenizer: str | None


def write(source: Source, target: Target) -> str:
    """Writes the folder and returns what it did, in a line. Raises ValueError before anything is written, or for
    numbers that the dtype or the form cannot hold."""
    refuse_own(source)
    read_metadata(source.checkpoint)
    model, dtype = source.model, DTYPES[target.dtype]
    if model.stable_embedding:
        raise ValueError(
            f"{source.checkpoint} has model.stable_embedding=true, and no model of transformers has a norm after its "
            "embedding; possible are runs with model.stable_embedding=false: train one"
        )
    if model.block != "llama":
        raise ValueError(
            f"{source.checkpoint} has model.block={model.block}, and folders hold layers like Llama's; possible are runs with "
            "model.block=llama: train one"
        )
    specs, scaling, seq_len = parameter_specs(model), model.rope_scaling, source.config["batch"]["seq_len"]
    tokenizer, end_token = tokenizer_of(source, target.tokenizer)
    positions = seq_len if scaling is None else max(seq_len, scaling.longest)
    try:
        config_json = with_form(their_config(model, dtype, positions, end_token), target.form)
    except ValueError as error:
        raise ValueError(
            f"{source.checkpoint}: {error}; possible are the shapes of docs/models.md: train one"
        ) from None
    if target.form != "dense" and any(spec.their_rows is not None for spec in specs.values()):
        kind = config_json["model_type"]
        raise ValueError(
            f"form={target.form}: {kind} has several matrices in one tensor, which is dense; give form=dense"
        )
    changed: list[str] = []

    def form(name: str, tensor: Tensor) -> dict[str, Tensor]:
        tensors = in_form(target.form, name, specs[name], tensor)
        changed.extend([name] if their_name(name, specs[name]) not in tensors else [])
        return tensors

    with new_folder(target.folder) as partial:
        read = reader(source, specs)
        files = write_folder(partial, config_json, specs, read, dtype, target.max_file_bytes, form)
        if target.form != "dense" and not changed:
            raise ValueError(f"form={target.form}: every hidden weight would be larger than dense; give form=dense")
        for name, content in tokenizer.items():
            (partial / name).write_bytes(content)
    parameters = sum(spec.shape.numel() for spec in specs.values())
    told = f"{source.checkpoint} -> {target.folder}: {parameters:,} parameters in {target.dtype}, files: {len(files)}"
    return f"{told}, {target.form} matrices: {len(changed)}" if changed else told


def write_adapter_alone(source: Source, folder: Path, dtype: str) -> str:
    """Writes the adapter of a run as PEFT's folder and returns what it did, in a line. Raises ValueError before anything is written,
    or for numbers that the dtype cannot hold."""
    refuse_own(source)
    read_metadata(source.checkpoint)
    adapter, specs = adapter_of(source.config), parameter_specs(source.model)
    if not isinstance(adapter, Lora | Dora | AdaLora):
        raise ValueError(
            f"{source.checkpoint} has adapter={adapter.name}; possible are runs with adapter=lora, dora or adalora, "
            "or the merged export"
        )
    read_ = decoded(source.read_(), coded_in(source, specs))
    with new_folder(folder) as partial:
        adapter, read_ = as_lora(adapter, specs, read_, model_rows(source.model, source.config["seed"]))
        numbers = write_adapter(partial, adapter, specs, read_, DTYPES[dtype])
    return f"{source.checkpoint} -> {folder}: {adapter.name} of rank {adapter.rank}, {numbers:,} parameters in {dtype}"


def refuse_own(source: Source) -> None:
    """Refuses a model of one's own, without running it. Raises ValueError."""
    if (own := source.config["model"].get("own")) is not None:
        raise ValueError(
            f"{source.checkpoint} has model.own={own}, and no folder of Hugging Face holds such a model; its checkpoint has every "
            "weight by name (docs/own-model.md)"
        )


def tokenizer_of(source: Source, choice: str | None) -> tuple[dict[str, bytes], int | None]:
    """Returns the tokenizer's files to put beside the weights, by name, and the token that ends a document; none and None where
    there is none. Raises ValueError."""
    own = tokenizer_of_run(source.manifest, choice, or_none=", or tokenizer=none")
    if own is None:
        return {}, of_one_tokenizer(source.config["data"]).get("separator")
    # The word to transformers to take it as it is: it would rebuild a Llama's from the vocabulary with rules of its own.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    content = byte_tokenizer_json().encode() if own.file is None else own.file.read_bytes()
    if own.end_of_text is not None:
        settings["eos_token"] = own.end_of_text
    files = {"tokenizer.json": content}
    if isinstance(own.tokenizer, ChatTokenizer):
        settings |= own.tokenizer.named
        files["chat_template.jinja"] = own.tokenizer.template.source.encode()
    return {**files, "tokenizer_config.json": json.dumps(settings, indent=1).encode()}, own.end_token
