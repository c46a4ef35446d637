"""The canonical parameter table, sizes and FLOPs, against tables and formulas by hand."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from horovod_lm.config import make_config
from horovod_lm.errors import UserError
from horovod_lm.spec import ModelSpec, sinusoidal_positions

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


def test_decay_and_initialisers():
    spec = ModelSpec(**{**TINY, "layers": 8}, segments=2, initial_std=0.5)
    for p in spec.parameters:
        assert p.decay == (p.name.endswith("kernel") or p.name == "embeddings.tokens"), p.name
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
        ("norm", "rms_norm", '"layer_norm"'),
        ("norm_placement", "mid", '"pre" or "post"'),
        ("norm_epsilon", 0, "a number, above 0, at most 0.1"),
        ("activation", "swish", '"gelu" or "gelu_tanh" or "relu"'),
        ("positions", "rotary", '"learned" or "sinusoidal"'),
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


def test_values_that_do_not_fit_together():
    with pytest.raises(ValidationError, match="heads = 7 does not divide width = 64; use heads = "):
        ModelSpec(width=64, heads=7)
    with pytest.raises(ValidationError, match="sinusoidal positions need an even width, not 9"):
        ModelSpec(width=9, heads=3, positions="sinusoidal")


def test_the_suggested_heads_divide_the_width():
    with pytest.raises(ValidationError) as caught:
        ModelSpec(width=60, heads=7)
    assert "use heads = 4 or 5 or 6, or" in str(caught.value)


def test_sinusoidal_table_by_hand():
    positions = sinusoidal_positions(ModelSpec(width=4, heads=2, context=3, positions="sinusoidal"))
    assert positions.dtype == np.float32
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    np.testing.assert_allclose(positions, expected, rtol=1e-6, atol=1e-7)
