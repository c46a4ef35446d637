"""Deliberately broken copies of a backend: parity finds each one, and names the right place.

A copy is a package of its own with one edit, installed as an entry point by metadata beside it, as
a user's own backend would be. All copies of one framework run in one process, since importing it
takes longer than comparing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # the first test of a package compares all of its copies

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
[model]
width = 16
layers = 2
heads = 2
context = 12
dropout = 0.1
attention_dropout = 0.1
[data]
text = ["text.txt"]
documents = "line"
vocabulary = 300
[launch]
threads = 1
"""
DRIVER = """\
import contextlib, io, json, sys
from horovod_lm.cli import main
results = {}
for name, arguments in json.load(sys.stdin).items():
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            main(["parity", *arguments])
        except SystemExit as end:
            results[name] = end.code, output.getvalue()
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Mutation:
    """`old`, which is there once, becomes `new` in a file of a backend's package; `words` are those
    of the first place where the copy differs."""

    name: str
    package: str
    file: str
    old: str
    new: str
    words: str
    sets: tuple[str, ...] = ()

    @property
    def entry(self) -> str:
        return f"{self.package.removesuffix('_backend')}_{self.name.replace(' ', '_')}"

    @property
    def fits(self) -> bool:
        """Whether the sources still have the place to break."""
        return (ROOT / self.package / self.file).read_text().count(self.old) == 1


def torch(*arguments: Any, **options: Any) -> Mutation:
    return Mutation(arguments[0], "torch_backend", *arguments[1:], **options)


def tensorflow(*arguments: Any, **options: Any) -> Mutation:
    return Mutation(arguments[0], "tf_backend", *arguments[1:], **options)


UPDATE = "update of {} (the {} update, {})"
MUTATIONS = [
    torch(
        "another epsilon in the norm", "layers.py",
        "self.epsilon, self.centred = spec.norm_epsilon,", "self.epsilon, self.centred = 1e-6,",
        "block 1, attention norm",
    ),
    torch(
        "positions shifted", "layers.py",
        "self.positions[start : start + tokens_BL.shape[1]]",
        "self.positions.roll(-1, 0)[start : start + tokens_BL.shape[1]]",
        "embeddings, sum of tokens and positions",
    ),
    torch(
        "no embedding scale", "layers.py",
        "if self.spec.embedding_scale != 1:", "if False:",
        "embeddings, sum of tokens and positions",
        sets=("model.positions=sinusoidal",),
    ),
    torch(
        "dropout by local rows", "engine.py",
        "settings.seed, micro.rows", "settings.seed, np.arange(len(micro.rows))",
        "embeddings after dropout",
    ),
    torch(
        "dropout of the step before in training alone", "engine.py",
        "self._begin()\n        self._loss_scale = loss_scale",
        "self._begin()\n        step -= 1\n        self._loss_scale = loss_scale",
        "loss (of the whole batch)",
    ),
    torch(
        "keys for values", "layers.py",
        "query, key, value = self._heads(", "query, value, key = self._heads(",
        "block 1, attention key",
    ),
    torch(
        "heads swapped", "layers.py",
        "mixed.transpose(1, 2).reshape(", "mixed.flip(1).transpose(1, 2).reshape(",
        "block 1, attention, values mixed by it",
    ),
    torch(
        "scores over K", "layers.py",
        "self.spec.attention_scale", "self.spec.attention_scale**2",
        "block 1, attention scores",
    ),
    torch(
        "mask off by one", "layers.py",
        "-math.inf).triu_(1)", "-math.inf).triu_(2)",
        "block 1, attention probabilities",
    ),
    torch(
        "tanh form of GELU", "layers.py",
        '"gelu": F.gelu,', '"gelu": lambda x: F.gelu(x, approximate="tanh"),',
        "block 1, feed-forward activation",
    ),
    torch(
        "no weights on the targets", "engine.py",
        "weights * coefficient", "torch.full_like(weights, coefficient)",
        "loss",
    ),
    torch(
        "mean of means", "engine.py",
        "loss_scale * loss.factor / loss.normaliser",
        "loss_scale * loss.factor / (2 * float(loss.weights.sum()))",
        "gradient of final norm bias",
    ),
    torch(
        "backward of softmax", "layers.py",
        "d_scores.sub_(inner_sum[:, start:end])", "d_scores",
        "gradient of block 2, attention key kernel",
    ),
    torch(
        "decay on biases", "optimizer.py",
        "slice(weights.decayed, weights.size), 0.0)",
        "slice(weights.decayed, weights.size), self.settings.weight_decay)",
        UPDATE.format("embeddings, positions", "first", "weights"),
    ),
    torch(
        "clipping with 1e-6", "engine.py",
        "mul_(clip / self._norm)", "mul_(clip / (self._norm + 1e-6))",
        UPDATE.format("embeddings, tokens", "first", "first moment"),
    ),
    torch(
        "rate in the momentum", "optimizer.py",
        "torch.add(gradients, first, alpha=self.settings.momentum, out=first)",
        "torch.add(learning_rate * gradients, first, alpha=self.settings.momentum, out=first)",
        UPDATE.format("embeddings, tokens", "first", "first moment"),
        sets=("optimizer.name=sgd",),
    ),
    torch(
        "padding is seen", "model.py",
        "blocks[:, :, None] == blocks[:, None, :]", "blocks[:, :, None] >= 0",
        "encoder block 1, attention scores",
        sets=("model.kind=encoder",),
    ),
    torch(
        "padding of the source is seen", "model.py",
        "== source_blocks[:, None, :]", ">= source_blocks[:, None, :]",
        "block 1, cross-attention scores",
        sets=("model.kind=encoder-decoder",),
    ),
    torch(
        "keys and values of another row", "layers.py",
        "x.repeat_interleave(ctx.groups, 0)", "x.repeat(ctx.groups, 1, 1)",
        "block 1, attention scores",
        sets=("model.key_value_heads=1",),
    ),
    torch(
        "gate and up change places", "layers.py",
        "self.activation(full(gate)) * full(up)", "self.activation(full(up)) * full(gate)",
        "block 1, feed-forward activation",
        sets=("model.gated=true",),
    ),
    tensorflow(
        "another epsilon in the norm", "layers.py",
        "rsqrt(variance + epsilon)", "rsqrt(variance + 1e-6)",
        "block 1, attention norm",
    ),
    tensorflow(
        "scores without a scale", "layers.py",
        "scale = self.spec.attention_scale", "scale = 1.0",
        "block 1, attention scores",
    ),
    tensorflow(
        "heads merged in the wrong order", "layers.py",
        "tf.transpose(mixed, [0, 2, 1, 3])", "tf.transpose(mixed, [0, 2, 3, 1])",
        "block 1, attention, values mixed by it",
    ),
    tensorflow(
        "tanh form of GELU", "layers.py",
        '"gelu": _gelu,', '"gelu": lambda x: tf.nn.gelu(x, approximate=True),',
        "block 1, feed-forward activation",
    ),
    tensorflow(
        "turned the other way", "layers.py",
        "_turned(full(x), cosines, sines)", "_turned(full(x), cosines, -sines)",
        "block 1, attention query",
        sets=("model.positions=rotary",),
    ),
    tensorflow(
        "buckets of an encoder", "model.py",
        "relative_buckets(spec, self.name,", 'relative_buckets(spec, "encoder",',
        "block 1, attention scores",
        sets=("model.positions=relative",),
    ),
    tensorflow(
        "no gradient of the relative table", "model.py",
        "tf.gather(tf.convert_to_tensor(self.relative_bias), buckets)",
        "tf.stop_gradient(tf.gather(tf.convert_to_tensor(self.relative_bias), buckets))",
        "gradient of decoder, relative bias",
        sets=("model.positions=relative",),
    ),
    tensorflow(
        "a norm that centres", "layers.py",
        '"rms_norm": _divide_by_size', '"rms_norm": _normalise',
        "encoder block 1, attention norm",
        sets=("model.norm=rms_norm", "model.kind=encoder-decoder"),
    ),
    tensorflow(
        "mean of means", "engine.py",
        "loss_scale * loss.factor / loss.normaliser",
        "loss_scale * loss.factor / (2 * float(loss.weights.sum()))",
        "gradient of final norm bias",
    ),
    tensorflow(
        "the last micro-batch alone", "engine.py",
        "else self.weights.gradients + buffer", "else buffer",
        "loss (of the whole batch)",
    ),
    tensorflow(
        "epsilon inside the root", "optimizer.py",
        "move = rate * m / (tf.sqrt(v) * correction + self.settings.epsilon)",
        "move = rate * m / tf.sqrt(v * correction**2 + self.settings.epsilon)",
        UPDATE.format("embeddings, tokens", "first", "weights"),
    ),
    tensorflow(
        "a momentum without correction", "optimizer.py",
        "learning_rate / (1 - settings.beta1**update)", "learning_rate",
        UPDATE.format("embeddings, tokens", "first", "weights"),
    ),
]  # fmt: skip
CONTROLS = [
    torch("as it is", "engine.py", "class Engine", "class Engine", ""),
    tensorflow("as it is", "engine.py", "class Engine", "class Engine", ""),
]


def install(mutation: Mutation, folder: Path) -> str:
    """Make the broken copy in `folder`; returns its line of entry points."""
    package = folder / mutation.entry.replace("-", "_")
    shutil.copytree(ROOT / mutation.package, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / mutation.file
    path.write_text(path.read_text().replace(mutation.old, mutation.new))
    for path in package.glob("*.py"):
        path.write_text(path.read_text().replace(mutation.package, package.name))
    return f"{mutation.entry} = {package.name}.backend:Backend"


def write_text(folder: Path) -> None:
    """The text that CONFIG names."""
    words = ("the", "river", "runs", "past", "a", "mill", "and", "under", "old", "bridges")
    lines = (" ".join(words[(i * j) % 10] for j in range(1, 20)) for i in range(1, 100))
    (folder / "text.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A function: what parity says of all copies of one package, by mutation."""
    folder = tmp_path_factory.mktemp("mutations")
    (folder / "config.toml").write_text(CONFIG)
    write_text(folder)
    everything = [mutation for mutation in MUTATIONS if mutation.fits] + CONTROLS
    metadata = folder / "mutated_backends-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mutated-backends\nVersion: 1.0\n"
    )
    entries = "\n".join(install(mutation, folder) for mutation in everything)
    (metadata / "entry_points.txt").write_text(f"[horovod_lm.backends]\n{entries}\n")
    known: dict[str, dict[str, Any]] = {}

    def run(package: str) -> dict[str, Any]:
        if package in known:
            return known[package]
        jobs = {
            m.name: [str(folder / "config.toml"), "--backends", f"torch,{m.entry}", "--json"]
            + [part for text in m.sets for part in ("--set", text)]
            for m in everything
            if m.package == package
        }
        environment = {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": f"{folder}:{ROOT}"}
        result = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            env=os.environ | environment,
            cwd=folder,
        )
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        known[package] = {
            name: (code, text and json.loads(text)) for name, (code, text) in found.items()
        }
        return known[package]

    return run


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.package}: {m.name}")
def test_a_broken_copy_is_found_and_named(compared, mutation):
    assert mutation.fits, f"{mutation.package}/{mutation.file} has not once: {mutation.old}"
    code, report = compared(mutation.package)[mutation.name]
    assert code == 3
    assert report["first"]["words"] == mutation.words
    assert f"{mutation.words}: " in report["verdict"][0]
    assert any("not a matter of rounding" in sentence for sentence in report["verdict"])


@pytest.mark.parametrize("control", CONTROLS, ids=lambda m: m.package)
def test_an_unbroken_copy_is_the_same(compared, control):
    code, report = compared(control.package)[control.name]
    assert (code, report["same"], report["left_out"]) == (0, True, [])
