"""`horovod-lm parity` as a person meets it, over backends in NumPy found by entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# The model of the NumPy engine is one square table, so the width is the vocabulary.
CONFIG = """\
[model]
width = 257
heads = 1
layers = 1
context = 8
[data]
text = ["text.txt"]
documents = "line"
vocabulary = 257
"""
LONG_ROWS = ["--set", "batching.kind=packed", "--set", "model.context=10000"]
BACKENDS = """\
from horovod_lm.errors import UserError
from tests.helpers import on_ranks
from tests.numpy_backend import NumpyEngine

class Tripled(NumpyEngine):
    def forward_backward(self, micro, step, loss_scale):
        super().forward_backward(micro, step, loss_scale)
        self._gradient[:, 0] *= 3

class Backend:
    name, kind, precisions = "plain", NumpyEngine, ("fp32", "fp64")
    def __init__(self, threads): pass
    def versions(self): return {"numpy": "2"}
    def communicator(self): return on_ranks(1, lambda communicator: communicator)[0]
    def engine(self, spec, settings, communicator):
        if settings.precision not in self.precisions:
            raise UserError(f"backend {self.name} has no {settings.precision}; allowed: fp32, fp64")
        return self.kind(communicator, spec.vocabulary)

class Other(Backend): name = "other"
class Broken(Backend): kind = Tripled
class Single(Backend): precisions = ("fp32",)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity")
    (path / "my.toml").write_text(CONFIG)
    words = ("the", "river", "runs", "past", "a", "mill", "and", "under", "old", "bridges")
    lines = (" ".join(words[(i * j) % 10] for j in range(1, 20)) for i in range(1, 100))
    (path / "text.txt").write_text("\n".join(lines))
    (path / "numpy_backends.py").write_text(BACKENDS)
    metadata = path / "numpy_backends-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: numpy-backends\nVersion: 1.0\n"
    )
    classes = {"plain": "Backend", "other": "Other", "broken": "Broken", "single": "Single"}
    entries = [f"{name} = numpy_backends:{kind}" for name, kind in classes.items()]
    entries += ["unmade = nothing_here:Backend"]
    text = "[horovod_lm.backends]\n" + "\n".join(entries)
    (metadata / "entry_points.txt").write_text(text)
    return path


@pytest.fixture(scope="module")
def run(folder):
    def run(*arguments, **environment):
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = {"PYTHONPATH": f"{folder}:{root}", "XDG_CACHE_HOME": f"{folder}/cache"}
        return subprocess.run(
            [sys.executable, "-m", "horovod_lm", "parity", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=120,
            env=os.environ | path | environment,
        )

    return run


def test_two_backends_of_a_user_are_the_same(run, folder):
    result = run("my.toml", "--backends", "plain,other", "--output", "report.json")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert "Gradients: other to plain in fp32, allowed 1.00e-04" in lines
    report = json.loads((folder / "report.json").read_text())
    assert (report["schema"], report["same"], report["referee"]) == (1, True, "plain")
    assert report["setting"]["versions"] == {"plain": {"numpy": "2"}, "other": {"numpy": "2"}}
    assert report["verdict"][0].startswith("The same: in fp32 all ")
    assert report["verdict"][-2:] == [
        "Not compared: activations: no Engine.trace in plain and other.",
        "Not compared: updates: no Engine.load_gradients in plain and other.",
    ]
    assert " ".join(result.stdout.split()).endswith(" ".join(report["verdict"]))


def test_a_broken_one_is_named_with_exit_code_3(run):
    result = run("my.toml", "--backends", "plain,broken", "--json", "--rows", "3")
    assert result.returncode == 3
    report = json.loads(result.stdout)  # and nothing else is printed there
    assert report["first"]["words"] == "gradient of embeddings, tokens"
    assert report["setting"]["rows"] == 3
    table = run("my.toml", "--backends", "plain,broken")
    assert table.returncode == 3
    assert "OVER: tokens" in table.stdout


def test_the_precision_is_the_configs_or_what_is_given(run):
    result = run("my.toml", "--backends", "plain,other", "--precision", "fp64", "--json")
    report = json.loads(result.stdout)
    assert (report["precision"], report["referee"]) == ("fp64", None)
    assert all(place["fp64_apart"] is None for place in report["places"])


def test_a_backend_without_fp64_leaves_the_other_as_referee(run):
    result = run("my.toml", "--backends", "single,plain", "--json")
    assert result.returncode == 0
    report = json.loads(result.stdout)
    assert report["referee"] == "plain"
    assert "single in fp64: backend plain has no fp64; allowed: fp32, fp64" in report["left_out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backends", "plain,plian"], '"plian" is not a backend; installed are: broken, other'),
        (["--backends", "plain"], "does not name two different backends"),
        (["--backends", "plain,unmade"], "backend unmade can't be imported: No module named"),
        (["--backends", "plain,other", "--precision", "bf16"], "backend plain has no bf16"),
        (["--backends", "plain,other", "--precision", "fp8"], "'fp8' is not one of 'fp64', 'fp32'"),
        (["--backends", "plain,other", "--rows", "1"], "1 is not in the range x>=2"),
        (["--backends", "plain,other", "--output", "no/such/file"], "--output no/such/file can't"),
        (["--set", "model.laers=3"], "did you mean model.layers?"),
        # Windows are compared, whatever would be trained on.
        (["--backends", "plain,other", *LONG_ROWS], "one window takes 10,001"),
    ],
)
def test_a_mistake_has_one_message_and_exit_code_2(run, arguments, said):
    result = run("my.toml", *arguments)
    assert result.returncode == 2, result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith("horovod-lm: ")]
    assert len(message) == 1 and said in message[0]
    assert result.stdout == ""


def test_a_run_that_fails_leaves_the_report_of_another(run, folder):
    (folder / "old.json").write_text("{}")
    result = run(
        "my.toml", "--backends", "plain,other", "--precision", "bf16", "--output", "old.json"
    )
    assert result.returncode == 2
    assert (folder / "old.json").read_text() == "{}"


def test_several_ranks_are_refused(run):
    result = run("my.toml", "--backends", "plain,other", HOROVOD_RANK="0", HOROVOD_SIZE="2")
    assert result.returncode == 2
    assert "parity runs on one rank and was started on 2" in result.stderr


def test_completion_knows_the_backends_after_a_comma(run, folder):
    words = "horovod-lm parity my.toml --backends plain,b"
    result = run(
        _HOROVOD_LM_COMPLETE="bash_complete",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    )
    assert result.stdout.split() == ["plain,plain,broken"]
