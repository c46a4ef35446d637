"""The canonical parameter table, sizes and FLOPs, against tables and formulas by hand."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from horovod_lm.config import make_config
from horovod_lm.errors import UserError
from horovod_lm.spec import (
    ModelSpec,
    alibi_slopes,
    relative_buckets,
    rotary_tables,
    sinusoidal_positions,
)

TINY = {"vocabulary": 11, "context": 5, "width": 4, "layers": 1, "heads": 2, "feed_forward": 6}


def table(**changes) -> list[str]:
    spec = ModelSpec(**{**TINY, **changes})
    return [f"{p.name} {'x'.join(map(str, p.shape))}" for p in spec.parameters]


def norm(name):
    return [f"{name}.scale 4", f"{name}.bias 4"]


def attention(name):
    return [
        f"{name}.query.kernel 4x4",
        f"{name}.query.bias 4",
        f"{name}.key.kernel 4x4",
        f"{name}.value.kernel 4x4",
        f"{name}.value.bias 4",
        f"{name}.output.kernel 4x4",
        f"{name}.output.bias 4",
    ]


def feed_forward(name):
    return [
        f"{name}.up.kernel 4x6",
        f"{name}.up.bias 6",
        f"{name}.down.kernel 6x4",
        f"{name}.down.bias 4",
    ]


def block(name, cross=False):
    return [
        *norm(f"{name}.attention_norm"),
        *attention(f"{name}.attention"),
        *(norm(f"{name}.cross_attention_norm") if cross else []),
        *(attention(f"{name}.cross_attention") if cross else []),
        *norm(f"{name}.feed_forward_norm"),
        *feed_forward(f"{name}.feed_forward"),
    ]


EMBEDDINGS = ["embeddings.tokens 11x4", "embeddings.positions 5x4"]
DECODER = [*EMBEDDINGS, *block("decoder.0"), *norm("decoder.norm")]


def test_decoder():
    assert table() == DECODER
    assert DECODER[2:6] == [
        "decoder.0.attention_norm.scale 4",
        "decoder.0.attention_norm.bias 4",
        "decoder.0.attention.query.kernel 4x4",
        "decoder.0.attention.query.bias 4",
    ]


def test_encoder():
    assert table(kind="encoder", segments=2) == [
        *EMBEDDINGS,
        "embeddings.segments 2x4",
        *block("encoder.0"),
        *norm("encoder.norm"),
    ]


def test_encoder_decoder():
    assert table(kind="encoder-decoder", encoder_layers=2) == [
        *EMBEDDINGS,
        *block("encoder.0"),
        *block("encoder.1"),
        *norm("encoder.norm"),
        *block("decoder.0", cross=True),
        *norm("decoder.norm"),
    ]


def test_post_norm_has_a_norm_of_embeddings_and_none_at_the_end():
    assert table(norm_placement="post") == [
        *EMBEDDINGS,
        *norm("embeddings.norm"),
        *block("decoder.0"),
    ]


def test_untied_adds_a_kernel_at_the_end():
    assert table(tied=False) == [*DECODER, "heads.lm.kernel 4x11"]


def test_without_bias():
    assert table(bias=False) == [row for row in DECODER if ".bias " not in row]


def test_a_key_bias_stands_after_its_kernel():
    rows = table(key_bias=True)
    assert rows[rows.index("decoder.0.attention.key.kernel 4x4") + 1] == (
        "decoder.0.attention.key.bias 4"
    )
    assert len(rows) == len(DECODER) + 1


def test_sinusoidal_positions_are_no_parameter():
    assert table(positions="sinusoidal") == [r for r in DECODER if "positions" not in r]


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_positions_that_act_in_attention_alone_are_no_parameter(positions):
    rows = [r for r in DECODER if "positions" not in r]
    if positions == "rotary":  # turned keys have a use for a bias
        at = rows.index("decoder.0.attention.key.kernel 4x4")
        rows.insert(at + 1, "decoder.0.attention.key.bias 4")
    assert table(positions=positions) == rows


def test_relative_positions_have_one_table_a_stack():
    rows = table(kind="encoder-decoder", positions="relative", relative_buckets=8)
    for stack in ("encoder", "decoder"):
        at = rows.index(f"{stack}.relative_bias 8x2")
        assert rows[at + 1] == f"{stack}.0.attention_norm.scale 4"
    assert len([row for row in rows if "relative" in row]) == 2


def test_positions_may_begin_after_unused_rows():
    assert table(position_offset=2)[1] == "embeddings.positions 7x4"


def test_rms_norm_has_a_scale_alone():
    assert table(norm="rms_norm") == [row for row in DECODER if "norm.bias" not in row]


def test_a_gate_stands_beside_up():
    rows = table(gated=True)
    at = rows.index("decoder.0.feed_forward.gate.kernel 4x6")
    assert rows[at - 1 : at + 3] == [
        "decoder.0.feed_forward.up.bias 6",
        "decoder.0.feed_forward.gate.kernel 4x6",
        "decoder.0.feed_forward.gate.bias 6",
        "decoder.0.feed_forward.down.kernel 6x4",
    ]


def test_heads_of_keys_and_values_may_be_fewer_and_of_another_size():
    rows = table(key_value_heads=1, head_size=3, kind="encoder-decoder")
    for name in ("encoder.0.attention", "decoder.0.attention", "decoder.0.cross_attention"):
        own = [row.removeprefix(f"{name}.") for row in rows if row.startswith(f"{name}.")]
        assert own == [
            "query.kernel 4x6",
            "query.bias 6",
            "key.kernel 4x3",
            "value.kernel 4x3",
            "value.bias 3",
            "output.kernel 6x4",
            "output.bias 4",
        ]


def test_outputs():
    heads = [{"name": "kind", "outputs": 3}, {"name": "tag", "outputs": 5, "over": "token"}]
    rows = table(
        kind="encoder", pooler=True, head_transform=True, head_bias=True, tied=False,
        task_heads=heads, norm_placement="post", embedding_norm=False, segments=1,
    )  # fmt: skip
    at = rows.index("pooler.kernel 4x4")
    assert rows[at:] == [
        "pooler.kernel 4x4",
        "pooler.bias 4",
        "heads.lm.transform.kernel 4x4",
        "heads.lm.transform.bias 4",
        "heads.lm.norm.scale 4",
        "heads.lm.norm.bias 4",
        "heads.lm.kernel 4x11",
        "heads.lm.bias 11",
        "heads.kind.kernel 4x3",
        "heads.kind.bias 3",
        "heads.tag.kernel 4x5",
        "heads.tag.bias 5",
    ]
    assert rows[:3] == [*EMBEDDINGS, "embeddings.segments 1x4"]
    assert not any(row.startswith("embeddings.norm") for row in rows)


def test_decay_and_initialisers():
    spec = ModelSpec(**{**TINY, "layers": 8}, segments=2, positions="relative", initial_std=0.5)
    for p in spec.parameters:
        assert p.decay == (p.name.endswith("kernel") or p.name == "embeddings.tokens"), p.name
        if p.name == "decoder.relative_bias":
            assert p.initialiser.std == 0.5
            continue
        if p.name.endswith("scale"):
            assert p.initialiser.kind == "ones"
        elif p.name.endswith("bias"):
            assert p.initialiser.kind == "zeros"
        else:
            branch = ("attention.output.kernel", "feed_forward.down.kernel")
            expected = 0.5 / math.sqrt(16) if p.name.endswith(branch) else 0.5
            assert (p.initialiser.kind, p.initialiser.std) == ("normal", expected), p.name


def test_split_axes_cut_what_belongs_together():
    axes = {p.name: p.split_axis for p in ModelSpec(**TINY, tied=False, key_bias=True).parameters}
    block = "decoder.0"
    for part in ("attention.query", "attention.key", "attention.value", "feed_forward.up"):
        assert (axes[f"{block}.{part}.kernel"], axes[f"{block}.{part}.bias"]) == (1, 0)
    for part in ("attention.output", "feed_forward.down"):
        assert (axes[f"{block}.{part}.kernel"], axes[f"{block}.{part}.bias"]) == (0, None)
    assert (axes["embeddings.tokens"], axes["heads.lm.kernel"]) == (0, 1)
    assert axes["decoder.norm.scale"] is None


GPT2 = ModelSpec(
    vocabulary=50257, context=1024, width=768, layers=12, heads=12, activation="gelu_tanh"
)


def test_the_size_of_gpt2():
    # 124,439,808 as published; here without the biases of 12 layers' keys.
    assert GPT2.size == 124_439_808 - 12 * 768
    assert ModelSpec(**{**GPT2.model_dump(), "key_bias": True}).size == 124_439_808


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_sizes_by_formula(kind, norm_placement, tied, bias):
    v, c, d, f, n, m = 97, 19, 12, 30, 3, 2
    spec = ModelSpec(
        kind=kind, vocabulary=v, context=c, width=d, layers=n, encoder_layers=m, heads=3,
        feed_forward=f, norm_placement=norm_placement, tied=tied, bias=bias,
    )  # fmt: skip
    one_norm = d + d * bias
    one_attention = 4 * d * d + 3 * d * bias
    layer = one_attention + 2 * one_norm + 2 * d * f + (d + f) * bias
    size = v * d + c * d + (0 if tied else v * d)
    size += {"decoder": n, "encoder": m, "encoder-decoder": n + m}[kind] * layer
    if kind == "encoder-decoder":
        size += n * (one_attention + one_norm)
    final_norms = (2 if kind == "encoder-decoder" else 1) if norm_placement == "pre" else 1
    assert spec.size == size + final_norms * one_norm
    names = [p.name for p in spec.parameters]
    assert len(names) == len(set(names))


def test_flops_of_gpt2():
    # 6 x (12 layers x 12 x 768^2 + 768 x 50257) + 12 x 768 x 12 x 1025 / 2, by hand
    assert GPT2.flops_per_token() == 797_870_592
    assert GPT2.flops_per_token(1) == 6 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 768 * 12


def test_memory_by_part():
    memory = GPT2.memory(rows=2)
    assert memory["weights"] == memory["gradients"] == 4 * GPT2.size
    assert memory["moments"] == 8 * GPT2.size
    assert GPT2.memory(rows=4)["activations"] == 2 * memory["activations"]
    assert GPT2.memory(rows=2, precision="bf16")["activations"] < memory["activations"]
    assert GPT2.memory(rows=2, precision="fp64") == {k: 2 * v for k, v in memory.items()}
    assert GPT2.memory(rows=2, recompute=True)["activations"] < memory["activations"] / 4


def test_derived_widths():
    assert ModelSpec(width=24, heads=4).head_width == 6
    assert ModelSpec(width=24, heads=4).inner_width == 96
    assert ModelSpec(width=24, heads=4, feed_forward=7).inner_width == 7
    assert ModelSpec(width=64, positions="sinusoidal").embedding_scale == 8
    assert ModelSpec(width=64).embedding_scale == 1


def test_a_spec_is_immutable():
    with pytest.raises(ValidationError):
        ModelSpec().width = 3


@pytest.mark.parametrize(
    ("key", "bad", "allowed"),
    [
        ("kind", "gpt", '"decoder" or "encoder" or "encoder-decoder"'),
        ("context", 1, "a whole number, at least 2, at most 65536"),
        ("context", 65537, "a whole number, at least 2, at most 65536"),
        ("width", 0, "a whole number, at least 1, at most 65536"),
        ("width", 2.5, "a whole number, at least 1, at most 65536"),
        ("layers", 0, "a whole number, at least 1, at most 1024"),
        ("encoder_layers", 0, "a whole number, at least 1, at most 1024"),
        ("heads", 0, "a whole number, at least 1, at most 1024"),
        ("feed_forward", 0, "a whole number, at least 1, at most 1048576"),
        ("norm", "batch_norm", '"layer_norm" or "rms_norm"'),
        ("key_value_heads", 0, "a whole number, at least 1, at most 1024"),
        ("head_size", 0, "a whole number, at least 1, at most 65536"),
        ("relative_buckets", 6, "a whole number, at least 4, at most 1024, a multiple of 4"),
        ("task_heads", 3, "a list of sections"),
        ("norm_placement", "mid", '"pre" or "post"'),
        ("norm_epsilon", 0, "a number, above 0, at most 0.1"),
        ("activation", "swish", '"gelu" or "gelu_tanh" or "relu" or "silu"'),
        (
            "positions",
            "absolute",
            '"learned" or "sinusoidal" or "rotary" or "relative" or "alibi"',
        ),
        ("bias", 1, "true or false"),
        ("key_bias", "no", "true or false"),
        ("tied", 0, "true or false"),
        ("segments", 65, "a whole number, at least 0, at most 64"),
        ("dropout", 1, "a number, at least 0, below 1"),
        ("dropout", -0.1, "a number, at least 0, below 1"),
        ("attention_dropout", 1.5, "a number, at least 0, below 1"),
        ("initial_std", 0, "a number, above 0, at most 10"),
        ("initial_std", math.inf, "a number, above 0, at most 10"),
    ],
)
def test_bad_values_are_refused_with_the_allowed_range(key, bad, allowed):
    with pytest.raises(UserError) as caught:
        make_config({"model": {key: bad}}, "file")
    assert str(caught.value) == f"file: model.{key} = {bad!r} is not allowed; it must be {allowed}"


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"width": 64, "heads": 7}, "heads = 7 does not divide width = 64; use heads = "),
        (
            {"heads": 8, "key_value_heads": 3},
            "key_value_heads = 3 does not divide heads = 8; use key_value_heads = 1 or 2 or 4",
        ),
        (
            {"width": 9, "heads": 3, "positions": "sinusoidal"},
            "sinusoidal positions need an even width, not 9",
        ),
        (
            {"width": 9, "heads": 3, "positions": "rotary"},
            "rotary positions need heads of even width, not 3",
        ),
        (
            {"positions": "alibi", "position_offset": 2},
            'position_offset = 2 needs positions = "learned"',
        ),
        (
            {"relative_buckets": 32, "relative_distance": 16},
            "relative_distance = 16 must be above half of relative_buckets = 32",
        ),
        ({"pooler": True}, 'pooler = true needs kind = "encoder", not "decoder"'),
        ({"task_heads": [{"name": "lm", "outputs": 2}]}, "a task head can't be called"),
        (
            {"task_heads": [{"name": "a", "outputs": 2}, {"name": "a", "outputs": 3}]},
            "task_heads has a name twice: a, a",
        ),
    ],
)
def test_values_that_do_not_fit_together(fields, fault):
    with pytest.raises(ValidationError, match=fault):
        ModelSpec(**fields)


def test_what_is_wrong_with_a_task_head_is_said_where_it_stands():
    heads = [{"name": "fine", "outputs": 2}, {"name": "Bad", "outputs": 0, "over": "row"}]
    with pytest.raises(UserError) as caught:
        make_config({"model": {"task_heads": heads}}, "file")
    assert str(caught.value).splitlines() == [
        "file: model.task_heads.1.name = 'Bad' is not allowed; it must be a string, lower case; "
        "not lm",
        "file: model.task_heads.1.outputs = 0 is not allowed; it must be a whole number, at least "
        "1, at most 1048576",
        'file: model.task_heads.1.over = \'row\' is not allowed; it must be "sequence" or "token"',
    ]
    for bad, said in (([3], "model.task_heads.0 = 3 is not allowed; it must be a section"),
                      ([{"name": "a", "output": 3}], "model.task_heads.0.output")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            make_config({"model": {"task_heads": bad}}, "file")


def test_the_suggested_heads_divide_the_width():
    with pytest.raises(ValidationError) as caught:
        ModelSpec(width=60, heads=7)
    assert "use heads = 4 or 5 or 6, or" in str(caught.value)


def test_sinusoidal_table_by_hand():
    positions = sinusoidal_positions(ModelSpec(width=4, heads=2, context=3, positions="sinusoidal"))
    assert positions.dtype == np.float32
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    np.testing.assert_allclose(positions, expected, rtol=1e-6, atol=1e-7)


def test_derived_factors():
    plain = ModelSpec(width=64, heads=4)
    assert (plain.attention_scale, plain.output_scale) == (0.25, 1)
    t5 = ModelSpec(width=64, heads=4, scale_attention=False, scale_output=True, head_size=9)
    assert (t5.attention_scale, t5.output_scale, t5.attention_width) == (1, 1 / 8, 36)
    assert ModelSpec(width=64, scale_embeddings=True).embedding_scale == 8
    fixed = ModelSpec(width=64, scale_embeddings=False, positions="sinusoidal")
    assert fixed.embedding_scale == 1


def test_flops_count_every_stack_and_what_keys_see():
    v, d, f, n, m, length = 97, 12, 30, 3, 2, 7
    spec = ModelSpec(
        kind="encoder-decoder", vocabulary=v, context=19, width=d, heads=3, layers=n,
        encoder_layers=m, feed_forward=f, gated=True, key_value_heads=1, head_transform=True,
    )  # fmt: skip
    attention = 2 * d * d + 2 * d * d // 3
    products = (m + 2 * n) * attention + (m + n) * 3 * d * f + d * d + v * d
    keys = m * length + n * (length + 1) / 2 + n * length
    assert spec.flops_per_token(length) == 6 * products + 12 * d * keys


def test_rotary_tables_by_hand():
    spec = ModelSpec(width=8, heads=2, context=3, positions="rotary", rotary_base=100.0)
    cosines, sines = rotary_tables(spec)
    angles = [[p, p / 10] for p in range(3)]
    np.testing.assert_allclose(cosines, np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(sines, np.sin(angles), rtol=1e-6)
    assert cosines.dtype == sines.dtype == np.float32


def bucket(distance: int, buckets: int, most: int) -> float:
    """Of a distance to keys before, as Raffel et al. write it, before it is rounded down."""
    exact = buckets // 2
    if distance < exact:
        return distance
    far = math.log(distance / exact) / math.log(most / exact) * (buckets - exact)
    return min(exact + far, buckets - 1)


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (4, 8), (64, 1000)])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_relative_buckets_are_those_of_the_formula(stack, buckets, most):
    spec = ModelSpec(positions="relative", relative_buckets=buckets, relative_distance=most)
    length = 2 * most
    found = relative_buckets(spec, stack, range(length), range(length))
    assert (found.dtype, found.shape) == (np.int32, (length, length))
    assert np.array_equal(found[5:, 5:], found[:-5, :-5])  # of the distance alone
    of_last = relative_buckets(spec, stack, range(length - 1, length), range(length))
    assert np.array_equal(of_last, found[-1:])
    own = buckets // 2 if stack == "encoder" else buckets
    for distance in range(1, length):
        expected = bucket(distance, own, most)
        if abs(expected - round(expected)) > 1e-9 or distance < own // 2:
            assert found[distance, 0] == int(expected + 1e-9), distance
        else:  # where the logarithm is a whole number, that is the bucket
            assert found[distance, 0] == min(round(expected), own - 1), distance
        after = own + found[distance, 0] if stack == "encoder" else 0
        assert found[0, distance] == after
    assert found[0, 0] == 0 and found[most, 0] == own - 1


def test_relative_buckets_that_t5_is_known_for():
    spec = ModelSpec(positions="relative")
    decoder = relative_buckets(spec, "decoder", range(200), range(1))[:, 0]
    assert decoder[[0, 15, 16, 18, 19, 32, 64, 127, 128, 199]].tolist() == [
        0, 15, 16, 16, 17, 21, 26, 31, 31, 31,
    ]  # fmt: skip


def test_alibi_slopes_by_hand():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(4).tolist() == [2.0 ** (-2 * i) for i in range(1, 5)]
    # Of 12: the eight of 8, then the 1st, 3rd, 5th and 7th of 16.
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** (-i / 2) for i in (1, 3, 5, 7)]
    np.testing.assert_allclose(alibi_slopes(12), expected, rtol=1e-7)
    assert alibi_slopes(1).tolist() == [2.0**-8]


def test_a_changed_copy_has_parameters_of_its_own():
    spec = ModelSpec(**TINY)
    assert spec.size
    assert spec.model_copy(update={"layers": 3}).size == ModelSpec(**{**TINY, "layers": 3}).size
