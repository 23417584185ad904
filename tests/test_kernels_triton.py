"""Law 1 for machines that are not here: every Triton kernel is compiled for sm_80, sm_90 and sm_100."""

import importlib
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCKS = {"rows": "i32", "columns": "i32", "per_row": "i32", "BLOCKS": 4, "WIDTH": 256}
ADAMW = {
    **dict.fromkeys(("keep", "beta1_rest", "beta2", "beta2_rest", "rate", "eps"), "fp32"),
    **dict.fromkeys(("avg_codes", "sq_codes"), "*u8"),
    **dict.fromkeys(("avg_absmax", "sq_absmax", "avg_book", "sq_book"), "*fp32"),
    **dict.fromkeys(("avg_table", "sq_table"), "*i32"),
    **dict.fromkeys(("key", "start"), "i64"),
    **BLOCKS,
}
PAIR = {
    **{name: ADAMW[name] for name in ADAMW if name.startswith(("avg_", "sq_"))},
    **dict.fromkeys(("m", "v"), "*fp32"),
    **BLOCKS,
}
LION = {
    **dict.fromkeys(("keep", "lr", "beta1_rest", "beta2_rest"), "fp32"),
    **dict.fromkeys(("absmax", "book"), "*fp32"),
    **dict.fromkeys(("key", "start"), "i64"),
    "codes": "*u8",
    "table": "*i32",
    **BLOCKS,
}
QUANTISE = {"codes": "*u8", "absmax": "*fp32", "table": "*i32", **BLOCKS}
DEQUANTISE = {"codes": "*u8", "absmax": "*fp32", "book": "*fp32", **BLOCKS}
ROUND = {"x": "*fp32", "out": "*bf16", "key": "i64", "start": "i64", "count": "i64", "WIDTH": 1024}
SCALE = {
    **dict.fromkeys(("numerator", "denominator", "y", "squares"), "*fp32"),
    **dict.fromkeys(("rank", "columns"), "i32"),
    "RANK_STEPS": 1,
    "STEPS": 2,
    "WIDTH": 1024,
}
COLUMNS = {"columns": "*i64", "n": "i32", "rank": "i32", "ROWS": 16, "COLUMNS": 64}
COLUMNS |= dict.fromkeys(("first_scale", "scale"), "fp32")
SQUARES = {"partial": "*fp32", "rows": "i32", "n": "i32", "ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "STEPS": 24}
GROUPS = {**dict.fromkeys(("groups", "inner", "keep"), "i32"), "WIDTH": 4, "GROUPS": 256, "M": 4}
CODED = {"codes": "*u8", "ranges": "*fp32", **dict.fromkeys(("rows", "columns", "per_row", "width"), "i32")}
ENCODED = {**CODED, "tokens": "*i64", "key": "i64", **dict.fromkeys(("count", "first", "repeat"), "i32")}
PLACES = {**dict.fromkeys(("columns", "rows"), "*i32"), **dict.fromkeys(("live", "k", "batch"), "i32")}
CONDENSED = {x: {**dict.fromkeys(("xt", "values", "out"), f"*{x}"), **PLACES} for x in ("fp32", "bf16")}
ONE_VECTOR = {"ABLATED": False, "STEPS": 1, "ROWS": 4, "WIDTH": 512, "BATCH": 1}
MANY_VECTORS = {"ABLATED": True, "STEPS": 20, "ROWS": 4, "WIDTH": 16, "BATCH": 64}
LOSS = {**dict.fromkeys(("tokens", "words", "dim"), "i32"), "labels": "*i64", "ROWS": 128, "COLUMNS": 128}
SMALL = {"ROWS": 64, "COLUMNS": 64}  # a quarter of a tile has the same instructions, and compiles in half the time
SMALLEST = {"ROWS": 32, "COLUMNS": 32}  # whose products the first processor alone has the same instructions for
ONE_BLOCK = {"BLOCKS": 1}  # of a program of four
LOSS |= dict.fromkeys(("scale", "cap"), "fp32")
SUMS = {**LOSS, **dict.fromkeys(("sums", "at_label"), "*fp32"), "tiles": "i32"}
GRADIENT = {**LOSS, **dict.fromkeys(("lse", "g"), "*fp32")}
TILE = {
    "bf16": {"x": "*bf16", "w": "*bf16", "DEPTH": 64, "TF32": False, "WIDEN": False, "CAPPED": True},
    "fp32": {"x": "*fp32", "w": "*fp32", "DEPTH": 32, "TF32": True, "WIDEN": False, "CAPPED": False},
}
NORM = {**dict.fromkeys(("x", "weight", "y", "dy", "dx"), "*bf16"), "r": "*fp32", "columns": "i32"} | dict.fromkeys(
    ("eps", "offset"), "fp32"
)
ROW = {"STEPS": 2, "WIDTH": 4096}
DOWN = {"sums": "*fp32", **dict.fromkeys(("rows", "per_segment"), "i32"), "ROWS": 32, "WIDTH": 64}
GATE = {x: {**dict.fromkeys(("gate", "up", "y", "dy", "dg", "du"), f"*{x}"), "count": "i32", "NUMBERS": 1024, "GELU": x == "bf16"}
        for x in ("fp32", "bf16", "fp16")}  # fmt: skip

ROW_CODES = {
    **dict.fromkeys(("slices", "rows", "columns", "per_row", "code_columns"), "i32"),
    **dict.fromkeys(("x_slice", "out_slice", "codes_slice", "scales_slice", "key", "start"), "i64"),
    "codes": "*u8",
    "scales": "*fp32",
    "BLOCKS": 4,
    "WIDTH": 256,
}
CODED_ROWS = {
    **dict.fromkeys(("rows", "columns", "per_row", "row_bytes", "code_bytes"), "i32"),
    **dict.fromkeys(("scales", "book"), "*fp32"),
    "codes": "*u8",
}
ATTENTION = {
    **dict.fromkeys(("q", "k", "v", "d_out", "out", "d_q", "d_k", "d_v"), "*bf16"),
    **dict.fromkeys(("lse", "shift"), "*fp32"),
    **dict.fromkeys(("q_begins", "k_begins"), "*i32"),
    **dict.fromkeys(("total", "heads", "groups", "size"), "i32"),
    **dict.fromkeys(("scale", "cap"), "fp32"),
    "ROWS": 32,
    "KEYS": 32,
    "SIZE": 256,
    "CAUSAL": True,
    "TF32": False,
    "WIDEN": False,  # Gemma 2's heads
}
SMALL_HEADS = ATTENTION | {"ROWS": 64, "KEYS": 64, "SIZE": 64, "CAUSAL": False}
NARROW = {"ROWS": 32, "KEYS": 32, "SIZE": 64}  # which the first processor has the same products for

# Those for which another of the same processor stands.
FULL = [
    (90, "lion8bit", "lion8bit", {"param": "*bf16", "grad": "*fp32", **LION, "ALIGNED": True}),
    (80, "condensed", "condensed_linear", CONDENSED["bf16"] | ONE_VECTOR),
    (80, "condensed", "condensed_linear", CONDENSED["fp32"] | MANY_VECTORS),
    (90, "condensed", "condensed_linear", CONDENSED["bf16"] | MANY_VECTORS),
    (80, "nm", "nm", {"w": "*i64", "out": "*i64", **GROUPS, "LARGEST": 2**63 - 1, "MASK": False}),
    (80, "coded_rows", "decode", CODED_ROWS | {"out": "*bf16", "BITS": 8, "BLOCKS": 4, "WIDTH": 256}),
    (90, "cross_entropy", "sum_and_label", SUMS | TILE["fp32"]),
    (80, "cross_entropy", "sum_and_label", SUMS | TILE["bf16"]),
    (80, "cross_entropy", "logit_gradient", GRADIENT | TILE["fp32"] | {"dz": "*fp32"}),
    (100, "cross_entropy", "sum_and_label", SUMS | TILE["bf16"]),
    (100, "cross_entropy", "logit_gradient", GRADIENT | TILE["bf16"] | {"dz": "*bf16"}),
    *((80, "attention", name, types) for name, types in (("attend", SMALL_HEADS), ("query_gradient", ATTENTION))),
    (100, "attention", "attend", ATTENTION),
    (100, "attention", "query_gradient", SMALL_HEADS),
    *((100, "attention", "key_gradient", types) for types in (ATTENTION, SMALL_HEADS)),
]
# Of every argument its type, or its value if it is a constant of the program. Every processor sees every kernel; the
# variants of a kernel (dtypes, alignment) are spread over the first two.
VARIANTS = [
    (80, "philox", "normal", {"out": "*fp32", "key": "i64", "start": "i64", "count": "i64", "COUNTERS": 256}),
    (90, "philox", "normal", {"out": "*fp32", "key": "i64", "start": "i64", "count": "i64", "COUNTERS": 256}),
    (80, "blockwise", "quantise", {"x": "*fp32", **QUANTISE}),
    (90, "blockwise", "quantise", {"x": "*bf16", **QUANTISE}),
    (80, "blockwise", "dequantise", {"out": "*bf16", **DEQUANTISE}),
    (90, "blockwise", "dequantise", {"out": "*fp32", **DEQUANTISE}),
    (80, "moment_pair", "quantise_pair", PAIR | ONE_BLOCK),
    (90, "moment_pair", "quantise_pair", {**PAIR, "m": "*bf16"}),
    (80, "rounding", "round", {**ROUND, "ALIGNED": True}),
    (90, "rounding", "round", {**ROUND, "ALIGNED": False}),
    (80, "adamw8bit", "adamw8bit", {"param": "*bf16", "grad": "*bf16", **ADAMW, **ONE_BLOCK, "ALIGNED": False}),
    (90, "adamw8bit", "adamw8bit", {"param": "*bf16", "grad": "*fp32", **ADAMW, "ALIGNED": True}),
    (80, "lion8bit", "lion8bit", {"param": "*bf16", "grad": "*bf16", **LION, **ONE_BLOCK, "ALIGNED": False}),
    (90, "lion8bit", "lion8bit", {"param": "*fp32", "grad": "*fp32", **LION, "ALIGNED": True}),
    (80, "row_scale", "scale_rows", {"x": "*fp32", **SCALE}),
    (90, "row_scale", "scale_rows", {"x": "*bf16", **SCALE}),
    (80, "dct", "columns", {"out": "*bf16", **COLUMNS}),
    (90, "dct", "columns", {"out": "*fp32", **COLUMNS}),
    (80, "dct", "squares", {"g": "*fp32", **SQUARES, **SMALLEST}),
    (90, "dct", "squares", {"g": "*bf16", **SQUARES}),
    (80, "condensed", "condensed_linear", CONDENSED["bf16"] | MANY_VECTORS),
    (90, "condensed", "condensed_linear", CONDENSED["fp32"] | ONE_VECTOR),
    (80, "activation_codes", "encode", {"x": "*bf16", **ENCODED, "GIVEN": True, "BLOCKS": 4, "WIDTH": 256}),
    (90, "activation_codes", "encode", {"x": "*fp32", **ENCODED, "GIVEN": False, "BLOCKS": 8, "WIDTH": 128}),
    (80, "activation_codes", "decode", {"out": "*fp32", **CODED, "GIVEN": False, "BLOCKS": 8, "WIDTH": 128}),
    (90, "activation_codes", "decode", {"out": "*bf16", **CODED, "GIVEN": True, "BLOCKS": 4, "WIDTH": 256}),
    (80, "rms_norm", "norm", NORM | ROW),
    (90, "rms_norm", "norm", NORM | dict.fromkeys(("x", "weight", "y"), "*fp32") | {"STEPS": 1, "WIDTH": 2048}),
    (80, "rms_norm", "norm_gradient", NORM | dict.fromkeys(("dy", "x", "weight", "dx"), "*fp32") | ROW),
    (90, "rms_norm", "norm_gradient", NORM | {"STEPS": 1, "WIDTH": 2048}),
    (80, "rms_norm", "weight_gradient", NORM | DOWN),
    (90, "rms_norm", "weight_gradient", NORM | dict.fromkeys(("dy", "x"), "*fp32") | DOWN),
    (80, "glu", "gate", GATE["bf16"]),
    (90, "glu", "gate", GATE["fp32"]),
    (80, "glu", "gate_gradient", GATE["fp16"]),
    (90, "glu", "gate_gradient", GATE["bf16"]),
    (80, "nm", "nm", {"w": "*i16", "out": "*i16", **GROUPS, "LARGEST": 2**15 - 1, "MASK": False}),
    (90, "nm", "nm", {"w": "*i32", "out": "*i32", **GROUPS, "M": 3, "LARGEST": 2**31 - 1, "MASK": False}),
    (90, "nm", "nm", {"w": "*i32", "out": "*i8", **GROUPS, "LARGEST": 2**31 - 1, "MASK": True}),
    (80, "cross_entropy", "sum_and_label", SUMS | TILE["bf16"] | SMALLEST),
    (90, "cross_entropy", "sum_and_label", SUMS | TILE["fp32"] | SMALL),
    (80, "cross_entropy", "logit_gradient", GRADIENT | TILE["fp32"] | {"dz": "*fp32"} | SMALLEST),
    (80, "row_codes", "encode", ROW_CODES | {"x": "*bf16", "RANDOM": False, "ALIGNED": False, "BITS": 8}),
    (90, "row_codes", "encode", ROW_CODES | {"x": "*fp32", "RANDOM": True, "ALIGNED": True, "BITS": 4}),
    (80, "row_codes", "decode", ROW_CODES | {"out": "*fp32", "ADD": True, "BITS": 4}),
    (90, "row_codes", "decode", ROW_CODES | {"out": "*bf16", "ADD": False, "BITS": 8}),
    (80, "coded_rows", "decode", CODED_ROWS | {"out": "*bf16", "BITS": 4, "BLOCKS": 16, "WIDTH": 64}),
    (90, "coded_rows", "decode", CODED_ROWS | {"out": "*fp32", "BITS": 3, "BLOCKS": 32, "WIDTH": 32}),
    (90, "cross_entropy", "logit_gradient", GRADIENT | TILE["bf16"] | {"dz": "*bf16"}),
    (80, "attention", "attend", SMALL_HEADS | NARROW),
    (90, "attention", "attend", ATTENTION),
    (80, "attention", "query_gradient", ATTENTION | NARROW),
    (90, "attention", "query_gradient", SMALL_HEADS),
    (80, "attention", "key_gradient", SMALL_HEADS | NARROW),
    (90, "attention", "key_gradient", ATTENTION),
]

LAST = [
    (100, "cross_entropy", "sum_and_label", SUMS | TILE["bf16"] | SMALL),
    (100, "cross_entropy", "logit_gradient", GRADIENT | TILE["bf16"] | {"dz": "*bf16"} | SMALL),
    (100, "attention", "attend", SMALL_HEADS),
    (100, "attention", "query_gradient", ATTENTION | NARROW),
    (100, "attention", "key_gradient", ATTENTION | NARROW),
]
OTHERS = {
    (file, name): (100, file, name, types | (ONE_BLOCK if types.get("BLOCKS") == 4 else {}))
    for _, file, name, types in VARIANTS
    if file not in ("cross_entropy", "attention")
}
KERNELS = [*VARIANTS, *OTHERS.values(), *LAST]
# Triton makes another program of arguments that are divisible by 16: addresses, as torch's always are, and sizes.
DIVISIBLE = {80: "", 90: "*i", 100: "*"}


@pytest.mark.parametrize(
    ("capability", "file", "name", "types"),
    [*KERNELS, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
)
def test_every_kernel_compiles_for_gpus_that_are_not_here(capability, file, name, types, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as it always was; unset, Triton warns that this will change
    kernel = getattr(importlib.import_module(f"rowwise.kernels.{file}_triton"), f"{name}_kernel")
    constants = {name: value for name, value in types.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    divisible = [i for i, kind in enumerate(signature.values()) if kind[0] in DIVISIBLE[capability]]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    assert bool(divisible) == (capability > 80)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 0
    assert f"sm_{capability}" in compiled.asm["ptx"]


def test_every_kernel_is_in_the_list():
    found = set()
    for path in (Path(__file__).parents[1] / "kernels").glob("*_triton.py"):
        module = importlib.import_module(f"rowwise.kernels.{path.stem}")
        names = [name for name, kernel in vars(module).items() if name.endswith("_kernel") and callable(kernel)]
        found |= {(capability, path.stem, name) for name in names for capability in DIVISIBLE}
    assert found == {(capability, f"{file}_triton", f"{name}_kernel") for capability, file, name, _ in KERNELS}
