"""What layers keep, on the device: 8-bit codes against their reference on the CPU, and results that leave and come back."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_place import Place

from rowwise.kernels.activation_codes import Codes, Groups, channel_groups, decode_reference_, encode_reference_
from rowwise.kernels.activation_codes_triton import decode_triton_, encode_triton_
from rowwise.parallel.activations.offload import Offload, store_on
from rowwise.parallel.activations.saved import Keeper, attach, begin_sequences
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.decoder import Decoder

KEY = 2**63 + 11


def check_activation_codes(place: Place) -> dict[str, Any]:
    """Codes and ranges are the same bits; the numbers behind them differ in the last place, where the device multiplies and adds
    at once."""
    apart, worst = 0, 0.0
    sizes = [(1, 1), (3, 300), (7, 64)] if place.rehearsal else [(1, 1), (3, 300), (70, 704), (2048, 4096)]
    for (rows, columns), dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        x, tokens = torch.randn(rows, columns).to(dtype), torch.arange(rows) * 5 + 2**33
        for groups in (channel_groups(columns), Groups(columns, 3, first=2, repeat=2)):
            pair = [codes_for(x, groups, device) for device in (place.device, torch.device("cpu"))]
            for given in (False, True):  # ranges of their own, and then one for all tokens
                if given:
                    pair = [Codes(codes, ranges[:1].clone().expand(ranges.shape)) for codes, ranges in pair]
                encode_triton_(x.to(place.device), pair[0], groups, KEY, tokens.to(place.device), given)
                encode_reference_(x, pair[1], groups, KEY, tokens, given)
                apart += sum(int((a.cpu() != b).sum()) for a, b in zip(*pair, strict=True))
                back, right = torch.empty_like(x, device=place.device), torch.empty_like(x)
                decode_triton_(pair[0], groups.width, back)
                decode_reference_(pair[1], groups.width, right)
                off = (back.cpu().double() - right.double()).abs().max() / right.double().abs().max()
                worst = max(worst, float(off) / torch.finfo(dtype).eps)
    return {"numbers_apart": apart, "largest_difference_in_last_places": worst, "passed": apart == 0 and worst <= 1}


def codes_for(x: torch.Tensor, groups: Groups, device: torch.device) -> Codes:
    """Room for the codes of x (N, C)."""
    rows, columns = x.shape
    ranges = torch.zeros(rows, -(-columns // groups.width), 2, device=device)
    return Codes(torch.zeros(rows, columns, dtype=torch.uint8, device=device), ranges)


def check_offload(place: Place) -> dict[str, Any]:
    """What leaves to the host, and on to a file, comes back as it was; and after the forward the device holds less."""
    wide = 64 if place.rehearsal else 1024
    config = ModelConfig(layers=8, dim=wide, heads=4, kv_heads=2, ffn_dim=2 * wide, vocab_size=256)
    torch.manual_seed(0)
    model, held = Decoder(config).to(place.device), {}
    exact, held["device"] = gradients(model, place)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for where in ("cpu", str(Path(folder))):
            store = store_on(place.device, where)
            found, held["cpu" if where == "cpu" else "files"] = gradients(copy_of(model, store), place)
            store.close()
            for ours, right in zip(found, exact, strict=True):
                worst = max(worst, float((ours - right).abs().max() / right.abs().max()))
    less = place.rehearsal or max(held["cpu"], held["files"]) < 0.6 * held["device"]
    return {"largest_relative_difference": worst, "bytes_after_forward": held, "passed": worst < 1e-5 and less}


def copy_of(model: Decoder, store: Offload) -> Decoder:
    """The same model, which keeps its results in `store`."""
    copy = Decoder(model.config).to(next(model.parameters()).device)
    copy.load_state_dict(model.state_dict())
    attach(Keeper(store=store), copy, list(copy.blocks.items()))
    return copy


def gradients(model: Decoder, place: Place) -> tuple[list[torch.Tensor], int]:
    """Those of a batch, twice, so that memory is used again; and what the device holds between forward and backward."""
    length, held = 32 if place.rehearsal else 1024, 0
    tokens = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1)).to(place.device)
    for _ in range(2):
        model.zero_grad()
        begin_sequences(model, 0)
        before = allocated(place)
        loss = model(tokens, torch.arange(length, device=place.device).expand_as(tokens)).square().mean()
        place.wait()
        held = allocated(place) - before
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], held


def allocated(place: Place) -> int:
    return 0 if place.rehearsal else torch.cuda.memory_allocated(place.device)
