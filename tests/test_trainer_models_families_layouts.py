"""What families differ in, on every layout: two steps equal those of one process. (Law 2.)"""

import pytest

from parity import assert_same, run_layout, run_plain, small_config, with_layout

BASE = ("model.layers=4", "model.heads=4", "model.kv_heads=2", "model.head_dim=10", "optim=adamw")
FORMS = {
    "gemma": (
        "model.norms=both", "model.qk_norm=true", "model.norm_offset=1", "model.activation=gelu_tanh", "model.embed_scale=5.5",
        "model.attention_cap=4", "model.logit_cap=6", "model.window=5", "model.window_layers=[true,true,false]",
        "model.rope_local_theta=500", "model.tie_embeddings=true", "model.attention_scale=0.4",
    ),
    "olmo2 with biases, scales and a part of heads turned": (
        "model.norms=after", "model.qk_norm=true", "model.qk_norm_over=all", "model.qkv_bias=true", "model.out_bias=true",
        "model.mlp_bias=true", "model.residual_scale=0.6", "model.attention_scale=0.3", "model.logit_scale=0.5",
        "model.rope_share=0.4", "model.rope_scaling={kind: yarn, factor: 4.0, original_length: 8, attention_factor: 1.1}",
    ),
    "smollm3 with windows": (
        "model.rope_layers=[true,false]", "model.window_layers=[false,true]", "model.window=4", "model.residual_scale=0.6",
    ),
}  # fmt: skip
LAYOUTS = {
    "zero 3, some made again": (2, {"zero": 3}, ("memory.recompute=selective",)),
    "ring x ulysses, all made again": (4, {"zero": 3, "ring": 2, "ulysses": 2, "ring_order": "zigzag"}, ("memory.recompute=full",)),
    "zb_v": (2, {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2}, ("batch.micro_size=3", "batch.global_size=12")),
    "striped": (2, {"zero": 0, "ring": 2, "ring_order": "striped"}, ()),
}  # fmt: skip
NOW = {
    ("gemma", "ring x ulysses, all made again"),
    ("olmo2 with biases, scales and a part of heads turned", "zb_v"),
}
DRAWN = [
    pytest.param(form, layout, marks=[] if (form, layout) in NOW else pytest.mark.full)
    for form in FORMS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("form", "layout"), DRAWN)
def test_steps_equal_those_of_one_process(ranks, tmp_path, form, layout):
    world, degrees, words = LAYOUTS[layout]
    config = with_layout(small_config(tmp_path, *BASE, *FORMS[form], *words), world, **degrees)
    assert_same(ranks.run(run_layout, world, config, 2)[0], run_plain(config, 2))
