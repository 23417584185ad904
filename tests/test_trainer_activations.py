"""What layers keep, as a run says it: the bytes of its tables, and folders that it can and cannot wait in. (Laws 4 and 5.)"""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from live_bytes import LiveBytes
from parity import small_config, with_layout
from rowwise.kernels.attention import causal_attention
from rowwise.launch.compose import compose_tree
from rowwise.launch.worker import _reason
from rowwise.parallel.activations.choose import leaving_results
from rowwise.parallel.activations.compress import Coding, Tokens, named_attention
from rowwise.parallel.activations.results import Sharing
from rowwise.parallel.activations.saved import Keeper, attach, begin_sequences
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer import activations, advice, offloading
from rowwise.trainer.activations import micro_batch_bytes, offload_in_words
from rowwise.trainer.models.blocks import Block
from rowwise.trainer.models.config import model_of
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.rope import rope_tables
from rowwise.trainer.offloading import FolderUnfit, carried_share, check_folder, leaving_share, require_folder
from rowwise.trainer.prepare import prepare
from runs import run_said

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
        tables = rope_tables(places.to("meta")[None], config.rope, dtype)
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
    config = away(tmp_path, "cpu", "batch.micro_size=2")
    whole, layer = micro_batch_bytes(config), Block.results(config.model, Sharing())
    assert whole == 2 * 13 * 2 * layer.bytes_kept(layer.names, 8)  # sequences, tokens, layers
    for less in ("memory.compress=int8", "memory.recompute=full", "memory.recompute=0.5", "batch.micro_size=1"):
        assert micro_batch_bytes(away(tmp_path, "cpu", "batch.micro_size=2", less)) < whole


def test_a_folder_must_be_one_and_take_what_comes(tmp_path, monkeypatch):
    check_folder(away(tmp_path, "none"))
    check_folder(away(tmp_path, "cpu"))
    check_folder(away(tmp_path, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin"], "the probe is gone"
    with pytest.raises(ValueError, match=r"tokens.bin: there is no such folder; possible are none, cpu, or the path"):
        check_folder(away(tmp_path, tmp_path / "tokens.bin"))
    with pytest.raises(ValueError, match=r"memory.offload_activations=: there is no such folder"):
        check_folder(away(tmp_path, ""))
    monkeypatch.setattr(offloading, "write_speed", lambda *_: 1e3)
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

    monkeypatch.setattr(offloading.tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\); give another folder"):
        check_folder(away(tmp_path, tmp_path))


def require_on(workers, config, poor: int) -> str:
    """What a rank is told where the folder of rank `poor` has no room."""
    mesh = make_mesh(config.parallel, workers)
    free = SimpleNamespace(free=10 if workers.rank == poor else 10**12)
    with mock.patch.object(shutil, "disk_usage", lambda _: free), pytest.raises(FolderUnfit) as raised:
        require_folder(config, mesh)
    return str(raised.value)


def test_a_folder_is_tried_on_every_machine(ranks, tmp_path):
    """And where one cannot have it, all ranks end in the same line."""
    config = small_config(tmp_path, f"memory.offload_activations={tmp_path}")
    told = ranks.run(require_on, 2, with_layout(config, 2), 1)
    assert told[0] == told[1] and re.match(
        r"rank 1 \(\S+\): memory.offload_activations=\S+: 2 ranks of this mach", told[0]
    )
    assert _reason(FolderUnfit(told[0]), tmp_path) == told[0]


def share_on(workers, config) -> float:
    """The share that leaves, where the second rank's folder is the slower by half, and the first computes the slower."""
    mesh = make_mesh(config.parallel, workers)
    bytes_a_second, operations_a_second = (8e6, 3e9) if workers.rank == 0 else (4e6, 4e9)
    with (
        mock.patch.object(offloading, "write_speed", lambda *_: bytes_a_second),
        mock.patch.object(offloading, "product_speed", lambda *_: operations_a_second),
    ):
        return leaving_share(config, mesh)


def test_the_slowest_machine_says_how_much_leaves(ranks, tmp_path):
    config = with_layout(
        small_config(tmp_path, f"memory.offload_activations={tmp_path}", "memory.offload_share=auto"), 2
    )
    found = ranks.run(share_on, 2, config)
    assert found[0] == found[1] == carried_share(config, 4e6, 3e9) and 0 < found[0] < 1
    # By hand: weights of a layer, 2 operations each a token, and causal attention; the bytes that a layer keeps of a token.
    model = config.model
    weights = 2 * model.dim * model.head_size * (model.heads + model.kv_heads) + 3 * model.dim * model.ffn_dim
    operations = 2 * weights + 2 * model.dim * 14
    layer = Block.results(model, Sharing())
    assert found[0] == pytest.approx(4e6 * operations / 3e9 / layer.bytes_kept(layer.names, 8))
    assert carried_share(config, 1e12, 3e9) == 1


def test_a_run_says_what_leaves(ranks, tmp_path):
    config = small_config(tmp_path, f"memory.offload_activations={tmp_path}", "memory.offload_share=0.6", "steps=1")
    (said,) = ranks.run(run_said, 1, with_layout(config, 1))
    told = r"memory.offload_activations=\S+ takes 60% of what layers keep away: what goes into each, and of 2 layers .*; the rest"
    assert re.search(told, said)
    table = Block.results(config.model, Sharing())
    assert offload_in_words(config, 1.0, table, [table.names]).endswith("takes all of what layers keep away")


def test_speeds_are_measured(tmp_path):
    assert offloading.leaving_speed(str(tmp_path), 1 << 16, torch.device("cpu")) > 0
    assert offloading.leaving_speed("cpu", 1 << 16, torch.device("cpu")) > 0
    assert offloading.product_speed(torch.device("cpu"), torch.float32) > 1e6


def test_what_leaves_first_takes_the_most_operations_a_byte():
    """Beside inputs: attention and products before norms and gates; the first layers before the last; no more than may."""
    config = model_of(compose_tree(["model=llama_1b"])["model"])
    layer, few = Block.results(config, Sharing()), frozenset({"qkv", "y"})
    kept = [layer.names, few, layer.names]
    total = sum(layer.bytes_kept(names, 2) for names in kept)
    seen = (config.dim + 1) / 2
    last = [frozenset()] * 3
    for share in (0.1, 0.2, 0.4, 0.7, 0.9, 1.0):
        leaves = leaving_results(share, layer, kept, 2, False, seen)
        gone = 3 * layer.input_bytes(2)
        for names, have, before in zip(leaves, kept, last, strict=True):
            gone += sum(r.bytes_waiting(r.name in have, 2, False) for r in layer.results if r.name in names)
            assert not names & before or len(names) >= len(before)
        assert gone <= max(share * total, 3 * layer.input_bytes(2))
        last = leaves
    assert leaves == [layer.names, few | {"n1", "n2"}, layer.names]  # a number a norm is kept whatever is chosen
    some = leaving_results(0.4, layer, kept, 2, False, seen)
    assert "n1" not in some[0] | some[2] and "s" not in some[0] | some[2] and "qkv" in some[0] and "qkv" in some[1]


def test_a_run_is_refused_before_it_has_a_folder(tmp_path):
    config = away(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder"):
        prepare(config, 1)
    assert not (tmp_path / "run").exists()


def test_what_a_check_measured_is_said_and_not_measured_again(tmp_path, monkeypatch):
    speeds = iter([2e6, 3e6])
    monkeypatch.setattr(offloading, "write_speed", lambda *_: next(speeds))
    monkeypatch.setattr(offloading, "_measured", {})
    config = away(tmp_path, tmp_path)
    check_folder(config)
    assert all("takes 2 MB/s" in advice._offloading(config, torch.device("cpu"))[0] for _ in range(2))
    check_folder(config)
    assert "takes 3 MB/s" in advice._offloading(config, torch.device("cpu"))[0]


def test_what_offloading_costs_is_said(tmp_path):
    said = advice._offloading(away(tmp_path, tmp_path), torch.device("cpu"))
    assert len(said) == 1 and "MB/s: what a rank keeps of a micro-batch, 0." in said[0]
    (line,) = advice._offloading(away(tmp_path, "cpu"), torch.device("cpu"))
    assert line.startswith("memory.offload_activations=cpu on a CPU copies what layers keep and saves nothing")
    assert advice._offloading(away(tmp_path, "cpu"), torch.device("cuda")) == []
    assert advice._offloading(away(tmp_path, "none"), torch.device("cpu")) == []
