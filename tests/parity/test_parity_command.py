"""`horovod-lm parity` on both frameworks: each precision, optimizer and placement of norms."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.parity.test_mutations import CONFIG, DRIVER, write_text

pytestmark = pytest.mark.timeout(900)  # the first test runs all of JOBS in one process

ONE_LAYER = ("--set", "model.layers=1")
JOBS = {
    "fp32": [],
    "fp64": ["--precision", "fp64"],
    "bf16": ["--precision", "bf16"],
    "fp16": ["--precision", "fp16"],
    "adam": ["--set", "optimizer.name=adam", *ONE_LAYER],
    "sgd": ["--set", "optimizer.name=sgd", *ONE_LAYER],
    "adafactor": ["--set", "optimizer.name=adafactor", *ONE_LAYER],
    "lamb": ["--set", "optimizer.name=lamb", *ONE_LAYER],
    "post": [
        *("--set", "model.norm_placement=post", "--set", "model.positions=sinusoidal"),
        *("--set", "model.tied=false", "--set", "model.key_bias=true", "--rows", "3"),
    ],
    "encoder": [
        *("--set", "model.kind=encoder", "--set", "model.segments=2", "--set", "model.pooler=true"),
        *("--set", "model.head_transform=true", "--set", "model.head_bias=true"),
        *("--set", "model.norm_placement=post", *ONE_LAYER),
    ],
    "encoder-decoder": [
        *("--set", "model.kind=encoder-decoder", "--set", "model.norm=rms_norm"),
        *("--set", "model.positions=relative", "--set", "model.scale_attention=false"),
        *("--set", "model.gated=true", "--set", "model.bias=false", *ONE_LAYER),
    ],
    "rotary, grouped": [
        *("--set", "model.positions=rotary", "--set", "model.key_value_heads=1"),
        *("--set", "model.activation=silu", "--precision", "fp64", *ONE_LAYER),
    ],
    "native": ["--set", "train.dropout_generator=native"],
    "other way round": ["--backends", "tensorflow,torch"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity")
    (path / "config.toml").write_text(CONFIG)
    write_text(path)
    return path


def python(folder, *arguments, stdin=None):
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
    )


@pytest.fixture(scope="module")
def reports(folder):
    jobs = {name: ["config.toml", "--json", *given] for name, given in JOBS.items()}
    result = python(folder, "-c", DRIVER, stdin=json.dumps(jobs))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert all(text for _, text in found.values()), result.stderr
    return {name: (code, json.loads(text)) for name, (code, text) in found.items()}


@pytest.mark.parametrize("job", JOBS)
def test_both_frameworks_are_the_same(reports, job):
    code, report = reports[job]
    assert code == 0, report["verdict"]
    assert report["same"] and report["first"] is None
    assert {place["kind"] for place in report["places"]} == {"activation", "gradient", "update"}
    assert [text for text in report["left_out"] if "dropout, which is off" not in text] == []


def largest(report, kind, figure="apart"):
    return max(place[figure] for place in report["places"] if place["kind"] == kind)


def test_the_promises_hold(reports):
    _, report = reports["fp32"]
    assert largest(report, "activation") <= 1e-5
    assert largest(report, "gradient") <= 1e-4
    assert largest(report, "update") <= 1e-5
    assert report["tolerances"] == {"activation": 1e-5, "gradient": 1e-4, "update": 1e-5}


def test_figures_are_those_of_a_precision(reports):
    """Not nearer to fp64 than a precision allows either, nor equal: then two engines would not have
    been two. Two that round the same products to a half may come nearer to each other than a half
    is exact."""
    for name, least in {"fp32": 1e-8, "fp16": 1e-5, "bf16": 1e-4}.items():
        for figure in ("first_to_referee", "second_to_referee"):
            assert largest(reports[name][1], "gradient", figure) > least, (name, figure)
    for name, least in {"fp64": 1e-17, "fp32": 1e-8, "fp16": 1e-8, "bf16": 1e-8}.items():
        assert largest(reports[name][1], "gradient") > least, name
    for name in ("fp32", "fp16", "bf16"):
        assert largest(reports[name][1], "gradient", "fp64_apart") < 1e-13, name
        assert largest(reports[name][1], "activation", "first_to_referee") > 1e-8, name
    assert reports["fp64"][1]["referee"] is None
    assert reports["fp16"][1]["setting"]["loss_scale"] > 1


def test_every_site_is_there_in_order(reports):
    _, report = reports["fp32"]
    sites = [p["words"] for p in report["places"] if p["kind"] == "activation"]
    block = [
        "attention norm", "attention query", "attention key", "attention value",
        "attention scores", "attention probabilities", "attention probabilities after dropout",
        "attention, values mixed by it", "attention output", "residual stream after attention",
        "feed-forward norm", "feed-forward up", "feed-forward activation", "feed-forward down",
        "residual stream after feed-forward",
    ]  # fmt: skip
    assert sites == [
        "embeddings, sum of tokens and positions",
        "embeddings after dropout",
        *(f"block {number}, {name}" for number in (1, 2) for name in block),
        "final norm",
        "logits",
        "loss",
        "logits (without dropout)",
        "loss (of the whole batch)",
    ]


def test_with_post_norm_norms_come_after_the_sums(reports):
    _, report = reports["post"]
    sites = [p["words"] for p in report["places"] if p["kind"] == "activation"]
    assert sites[:3] == [
        "embeddings, sum of tokens and positions",
        "embeddings, norm",
        "embeddings after dropout",
    ]
    assert sites.index("block 1, attention norm") > sites.index(
        "block 1, residual stream after attention"
    )
    gradients = [p["words"] for p in report["places"] if p["kind"] == "gradient"]
    assert gradients[:2] == [
        "gradient of output layer kernel",
        "gradient of block 2, feed-forward norm bias",
    ]


def test_an_encoder_comes_before_its_decoder(reports):
    _, report = reports["encoder-decoder"]
    sites = [p["words"] for p in report["places"] if p["kind"] == "activation"]
    assert sites[0] == "source embeddings, sum of tokens and positions"
    order = ["encoder final norm", "embeddings after dropout", "block 1, attention scores",
             "block 1, cross-attention norm", "block 1, cross-attention probabilities",
             "residual stream after cross-attention", "block 1, feed-forward gate",
             "final norm", "logits"]  # fmt: skip
    order = [name if name in sites else f"block 1, {name}" for name in order]
    places = [sites.index(name) for name in order]
    assert places == sorted(places)
    gradients = [p["words"] for p in report["places"] if p["kind"] == "gradient"]
    assert gradients.index("gradient of decoder, relative bias") < gradients.index(
        "gradient of encoder block 1, feed-forward down kernel"
    )


def test_native_dropout_is_taken_out_and_said(reports):
    _, report = reports["native"]
    assert report["left_out"][0].startswith("dropout, which is off here")
    sites = {name: {p["name"] for p in reports[name][1]["places"]} for name in ("fp32", "native")}
    dropped = {f"decoder.{index}.attention.dropped" for index in (0, 1)}
    assert sites["fp32"] - sites["native"] == dropped


def test_the_first_named_is_the_reference(reports):
    _, report = reports["other way round"]
    assert report["backends"] == ["tensorflow", "torch"] and report["referee"] == "tensorflow"


def test_moments_of_every_optimizer_are_compared(reports):
    moments = {"adam": ("first", "second"), "sgd": ("first",), "lamb": ("first", "second"),
               "adafactor": ("row", "column", "second")}  # fmt: skip
    for name, expected in moments.items():
        _, report = reports[name]
        quantities = {p["quantity"] for p in report["places"] if p["kind"] == "update"}
        assert quantities == {
            f"{update}, {what}"
            for update in ("the first update", "the second update", "an update near epsilon")
            for what in ("weights", *(f"{moment} moment" for moment in expected))
        }


def test_a_table_and_a_file_for_a_person(folder):
    command = ["-m", "horovod_lm", "parity", "config.toml", "--output", "report.json"]
    result = python(folder, *command)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    tables = [n for n, line in enumerate(lines) if line.startswith("layer ")]
    assert len(tables) == 3
    for start in tables:
        rows = lines[start : lines.index("", start)]
        assert len({len(row) for row in rows}) == 1  # the last column's right edge
    report = json.loads((folder / "report.json").read_text())
    assert max(map(len, lines)) <= 100
    assert " ".join(result.stdout.split()).endswith(" ".join(report["verdict"]))
    assert report["verdict"][0].startswith("The same: in fp32 all ")
