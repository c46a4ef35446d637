"""Bad input through the real command line: one message, the right exit code, nothing half done."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm import checkpoint
from tests.ranks.jobs import ROOT, TRAIN, needs_horovod, run_job, write_tiny

pytestmark = needs_horovod


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder whose cache has the prepared data of the tiny run."""
    return write_tiny(tmp_path_factory.mktemp("refuses")).parent


@pytest.fixture
def run(shared, tmp_path):
    """Run `train` in a folder of its own, alone or on ranks; what it leaves there is looked at."""
    config = write_tiny(tmp_path)

    def run(*arguments, ranks=0, **options):
        command = [*TRAIN, str(config), "--output", str(tmp_path / "out"), *arguments]
        return run_job(shared / "job.log", command, ranks, **options)

    run.config = config
    return run


def change(config, old, new):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def unknown_key(config):
    change(config, "global_batch_size", "globl_batch_size")


def wrong_type(config):
    change(config, "steps = 25", 'steps = "many"')


def heads_do_not_divide(config):
    change(config, "heads = 2", "heads = 3")


def empty_corpus(config):
    (config.parent / "text.txt").write_text("\n\n")


def short_corpus(config):
    (config.parent / "text.txt").write_text("a rank waits\n\nfor the other\n")


def binary_file(config):
    (config.parent / "text.txt").write_bytes(bytes(range(256)) * 40)


def no_file(config):
    (config.parent / "text.txt").unlink()


CASES = {
    unknown_key: "there is no key train.globl_batch_size; did you mean train.global_batch_size?",
    wrong_type: "train.steps = 'many' is not allowed; it must be a whole number, at least 1",
    heads_do_not_divide: "heads = 3 does not divide width = 16; use heads = ",
    empty_corpus: "the corpus of data.text is empty",
    short_corpus: "one window takes 17 (model.context + 1)",
    binary_file: "text.txt",
    no_file: "text.txt",
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_a_mistake_is_named_before_the_work_begins(spoil, run):
    spoil(run.config)
    message = run().only_message(2)
    assert CASES[spoil] in message
    left = {path.name for path in run.config.parent.iterdir()}
    assert left <= {"tiny.toml", "text.txt"}


@pytest.mark.parametrize("spoil", [unknown_key, binary_file], ids=lambda spoil: spoil.__name__)
def test_ranks_name_a_mistake_once(spoil, run):
    spoil(run.config)
    assert CASES[spoil] in run(ranks=2).only_message(2)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="root may read everything, and needs setpriv to become somebody else",
)
def test_an_unreadable_file_is_named(run, shared, tmp_path_factory):
    """As somebody else, in a folder that is theirs and whose text is not; the interpreter may lie
    where they cannot go."""
    python = [sys.executable, "-c", "import horovod_lm, pydantic, numpy"]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*nobody, *python], capture_output=True, cwd="/").returncode:
        pytest.skip("another user can't run this interpreter")
    folder = Path("/tmp") / f"horovod-lm-test-{os.getpid()}"
    folder.mkdir()
    try:
        config = write_tiny(folder)
        (folder / "text.txt").chmod(0o600)
        os.chown(folder, 65534, 65534)
        command = [*nobody, *TRAIN, str(config), "--output", str(folder / "out")]
        env = {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder)}
        message = run_job(shared / "job.log", command, 0, env=env).only_message(2)
        assert "text.txt" in message and "ermission denied" in message
        assert not (folder / "out").exists()
    finally:
        shutil.rmtree(folder)


def test_a_folder_in_use_another_model_and_damaged_checkpoints_are_refused(run):
    output = run.config.parent / "out"
    steps = ["--set", "train.steps=4", "--set", "schedule.updates=25"]
    result = run(*steps)
    assert result.code == 0, result.text
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}

    message = run(*steps).only_message(2)
    assert (
        message == f"{output} has a run in it; go on with it by --resume, or give another --output"
    )

    other = ["--resume", "--set", "model.width=32"]
    message = run(*steps, *other, ranks=2).only_message(2)
    assert "is a checkpoint of another model: embeddings.tokens has shape (300, 16)" in message

    message = run(*steps, "--resume", "--set", "train.seed=2").only_message(2)
    assert "belongs to another run; changed since then:" in message

    record = json.loads((output / "run.json").read_text())
    result = run(*steps, "--resume")  # there is nothing left to do
    assert result.code == 0 and f"finished: {output}" in result.lines
    again = json.loads((output / "run.json").read_text())
    for key in ("state", "steps", "updates", "loss", "validation_loss", "checkpoint", "sample"):
        assert again[key] == record[key] is not None
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}

    (path,) = (output / "checkpoints").iterdir()
    with (path / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    message = run(*steps, "--resume").only_message(2)
    assert f"no checkpoint in {output / 'checkpoints'} is valid" in message
    files = [path for path in output.rglob("*") if path.name != "weights.safetensors"]
    assert {path: path.stat().st_mtime_ns for path in files}.items() <= before.items()


FULL_DISK = """
mount -t tmpfs -o size=$1 tmpfs "$2" || exit 99
shift 2
"$@"
code=$?
cp -r "$OUT" "$KEPT"
exit $code
"""


@pytest.mark.skipif(
    os.geteuid() != 0
    or shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "x", "/mnt"]).returncode != 0,
    reason="a small file system of its own takes root and a mount namespace",
)
@pytest.mark.parametrize(
    ("kib", "every", "words"),
    [(280, 10, "can't be written to"), (56, 0, "no space left on device")],
)
def test_a_full_disk_ends_all_ranks_with_one_message(kib, every, words, run, shared, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    command = [
        "unshare", "-m", "sh", "-c", FULL_DISK, "sh", f"{kib}k", str(disk),
        str(Path(sys.executable).parent / "mpirun"), "-np", "2", "--bind-to", "none",
        "--map-by", "slot:OVERSUBSCRIBE", *TRAIN, str(run.config), "--output", str(disk / "out"),
        "--set", f"checkpoint.every={every}", "--set", "train.steps=400",
        # The metrics stay small, so that it is the checkpoint that finds no space.
        "--set", "schedule.name=constant", "--set", "output.weights_every=0",
    ]  # fmt: skip
    env = {"OUT": str(disk / "out"), "KEPT": str(kept)}
    message = run_job(shared / "job.log", command, 0, env=env).only_message(1)
    assert message.startswith("rank 0: ") and words in message
    assert not [path for path in kept.rglob("*") if "tmp" in path.name]
    record = json.loads((kept / "run.json").read_text())
    assert (record["state"], record["message"]) == ("failed", message)
    if every:
        assert "is kept" in message and checkpoint.newest(kept / "checkpoints", log=pytest.fail)


def test_without_our_horovod_the_message_says_how_to_build_it(run, tmp_path):
    """A user's site-packages that come first on the path stand for an environment without it."""
    plain = tmp_path / "site" / "horovod-0.28.1.dist-info"
    plain.mkdir(parents=True)
    (plain / "METADATA").write_text("Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n")
    path = f"{plain.parent}{os.pathsep}{ROOT}"
    message = run(env={"PYTHONPATH": path}).only_message(2)
    assert message.startswith("Horovod 0.28.1 is the plain release, which fails on today's framew")
    assert "build_horovod.py --install" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_without_horovod_the_message_says_how_to_build_it(backend, run, tmp_path):
    """An interpreter with links to all that is installed here, but Horovod."""
    site = next(Path(p) for p in sys.path if (Path(p) / "horovod").is_dir())
    copy = tmp_path / "site"
    copy.mkdir()
    for path in site.iterdir():
        if not path.name.lower().startswith("horovod") and path.suffix != ".pth":
            (copy / path.name).symlink_to(path)
    for path in site.glob("horovod_lm*"):
        (copy / path.name).symlink_to(path)
    code = "import sys; from horovod_lm.cli import main; main(sys.argv[1:])"
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    command = [
        str(base), "-S", "-c", code, "train", str(run.config), "--output", str(tmp_path / "out"),
        "--backend", backend,
    ]  # fmt: skip
    env = {"PYTHONPATH": f"{copy}{os.pathsep}{ROOT}"}
    message = run_job(tmp_path / "job.log", command, 0, env=env).only_message(2)
    assert message.startswith("Horovod is not installed; build the one that fits with: ")
    assert not (tmp_path / "out").exists()
