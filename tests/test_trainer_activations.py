"""What layers keep, as a run says it: the bytes of its tables, and folders that it can and cannot wait in. (Laws 4 and 5.)"""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from live_bytes import LiveBytes
from parity import small_config, with_layout
from rowwise.kernels.attention import causal_attention
from rowwise.launch.compose import compose_tree
from rowwise.parallel.activations.compress import Coding, Tokens, named_attention
from rowwise.parallel.activations.results import Sharing
from rowwise.parallel.activations.saved import Keeper, attach, begin_sequences
from rowwise.trainer import activations, advice
from rowwise.trainer.activations import check_folder, micro_batch_bytes
from rowwise.trainer.models.blocks import Block
from rowwise.trainer.models.config import model_of
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.rope import rope_tables
from rowwise.trainer.prepare import prepare

TOKENS = 8


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama_1b", torch.bfloat16), ("llama3_8b", torch.bfloat16), ("qwen3_0_6b", torch.float32)]
)
def test_codes_take_the_bytes_of_the_table(name, dtype):
    """Counted on the meta device, one block: codes and ranges, a number a norm and head, and nothing else."""
    config, places = replace(model_of(compose_tree([f"model={name}"])["model"]), layers=1), torch.arange(TOKENS)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
        keeper = Keeper(lambda *given: Coding(0, Tokens(TOKENS, places.to("meta"), places.to("meta")), *given))
        attach(keeper, model, list(model.blocks.items()))
        attend = named_attention(keeper, causal_attention, config.kv_heads)
        begin_sequences(model, 0)
        x = torch.empty(1, TOKENS, config.dim, dtype=dtype, requires_grad=True)
        tables = rope_tables(places.to("meta")[None], config, dtype)
        with LiveBytes() as live:
            y = model.blocks["0"](x, *tables, None, attend)
            waiting = live.now() - y.untyped_storage().nbytes()
    layer = Block.results(config, Sharing())
    exact, coded = (layer.bytes_kept(layer.names, dtype.itemsize, coded) for coded in (False, True))
    assert waiting == TOKENS * coded
    assert coded < {2: 0.54, 4: 0.28}[dtype.itemsize] * exact
    torch_keeps = exact + config.ffn_dim * dtype.itemsize  # silu(gate) too
    assert coded < 0.47 * torch_keeps


def away(tmp_path, where, *words):
    return with_layout(small_config(tmp_path, f"memory.offload_activations={where}", *words), 1)


def test_bytes_of_a_micro_batch_follow_the_options(tmp_path):
    whole = micro_batch_bytes(away(tmp_path, "cpu"))
    layer = Block.results(away(tmp_path, "cpu").model, Sharing())
    assert whole == 2 * 13 * 2 * layer.bytes_kept(layer.names, 8)  # sequences, tokens, layers
    for less in ("memory.compress=int8", "memory.recompute=full", "memory.recompute=0.5", "batch.micro_size=1"):
        assert micro_batch_bytes(away(tmp_path, "cpu", less)) < whole


def test_a_folder_must_be_one_and_take_what_comes(tmp_path, monkeypatch):
    check_folder(away(tmp_path, "none"))
    check_folder(away(tmp_path, "cpu"))
    check_folder(away(tmp_path, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin"], "the probe is gone"
    with pytest.raises(ValueError, match=r"tokens.bin: there is no such folder; possible are none, cpu, or the path"):
        check_folder(away(tmp_path, tmp_path / "tokens.bin"))
    with pytest.raises(ValueError, match=r"memory.offload_activations=: there is no such folder"):
        check_folder(away(tmp_path, ""))
    monkeypatch.setattr(activations, "write_speed", lambda *_: 1e3)
    with pytest.raises(ValueError, match=r"of a micro-batch take \d\d\d s to be written there, at 0.0 MB/s, and ranks wait "
                       r"parallel.timeout_seconds=60 for each other; give a faster folder"):  # fmt: skip
        check_folder(away(tmp_path, tmp_path, "parallel.timeout_seconds=60"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        ValueError, match=r"a rank keeps 0.0 GB of a micro-batch there, and it has 0.0 GB free; give another"
    ):
        check_folder(away(tmp_path, tmp_path))


def test_a_layer_without_results_by_name_may_wait_in_a_folder(tmp_path, monkeypatch):
    """How much it keeps is not known; that the folder can be written is tried all the same."""
    monkeypatch.setattr(activations, "results_of", lambda run: None)
    assert micro_batch_bytes(away(tmp_path, tmp_path)) == 0
    check_folder(away(tmp_path, tmp_path))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def full(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(activations.tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\); give another folder"):
        check_folder(away(tmp_path, tmp_path))


def test_a_run_is_refused_before_it_has_a_folder(tmp_path):
    config = away(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder"):
        prepare(config, 1)
    assert not (tmp_path / "run").exists()


def test_what_offloading_costs_is_said(tmp_path):
    said = advice._offloading(away(tmp_path, tmp_path), torch.device("cpu"))
    assert len(said) == 1 and "MB/s: what a rank keeps of a micro-batch, 0." in said[0]
    (line,) = advice._offloading(away(tmp_path, "cpu"), torch.device("cpu"))
    assert line.startswith("memory.offload_activations=cpu on a CPU copies what layers keep and saves nothing")
    assert advice._offloading(away(tmp_path, "cpu"), torch.device("cuda")) == []
    assert advice._offloading(away(tmp_path, "none"), torch.device("cpu")) == []
