"""Checkpoints: whole or not at all, digests before use, nothing outside their folder."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from horovod_lm.backend import EngineState
from horovod_lm.checkpoint import (
    RunState,
    check_model,
    check_same_run,
    load,
    newest,
    save,
    verify,
)
from horovod_lm.config import Config, make_config
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.optimizers import moment_shapes
from horovod_lm.randomness import initial_weights

SMALL = {
    "model": {"width": 8, "layers": 1, "heads": 2, "context": 8},
    "data": {"vocabulary": 300, "text": ["/corpora/book.txt"]},
}
CONFIG = make_config(SMALL, "small")


def changed(**sections) -> Config:
    values = {name: {**SMALL.get(name, {}), **keys} for name, keys in sections.items()}
    return make_config({**SMALL, **values}, "changed")


def state_at(step: int, config: Config = CONFIG, **extra) -> RunState:
    weights = initial_weights(config.model, step)
    moments = {
        "first": {name: array * np.float32(0.5) for name, array in weights.items()},
        "second": {name: array * array for name, array in weights.items()},
    }
    scaler = {"scale": 1024.0, "skipped": 3, "finite_steps": 2, "allowance": 1}
    return RunState(step, step - 3, scaler, EngineState(weights, moments, step - 3), extra)


def assert_same(left: RunState, right: RunState) -> None:
    assert (left.step, left.updates, left.scaler) == (right.step, right.updates, right.scaler)
    assert left.extra == right.extra
    assert left.engine.updates == right.engine.updates
    tables = [(left.engine.weights, right.engine.weights)]
    assert left.engine.moments.keys() == right.engine.moments.keys()
    tables += [(table, right.engine.moments[name]) for name, table in left.engine.moments.items()]
    for mine, other in tables:
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype == np.float32
            assert mine[name].tobytes() == other[name].tobytes(), name
            assert mine[name].shape == other[name].shape


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    state = state_at(7, data_digest="d", note={"nested": [1, "two"]})
    path = save(tmp_path / "checkpoints", state, CONFIG, keep=2)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert names(path) == ["manifest.json", "moments.safetensors", "weights.safetensors"]
    verify(path)
    loaded = load(path)
    assert_same(loaded, state)
    loaded.engine.weights["decoder.norm.scale"] += 1  # arrays are the caller's own


def test_a_run_in_fp64_is_kept_in_fp64(tmp_path):
    config, state = changed(train={"precision": "fp64"}), state_at(7)
    name = "decoder.0.feed_forward.up.kernel"
    for table in (state.engine.weights, *state.engine.moments.values()):
        table.update({key: array / np.float64(3) for key, array in table.items()})
    path = save(tmp_path / "checkpoints", state, config, keep=2)
    loaded = load(path)
    assert loaded.engine.weights[name].dtype == np.float64
    assert np.array_equal(loaded.engine.weights[name], state.engine.weights[name])
    moment = loaded.engine.moments["second"][name]
    assert np.array_equal(moment, state.engine.moments["second"][name])
    with pytest.raises(UserError, match=r"train\.precision: fp64 → fp32"):
        check_same_run(path, CONFIG)


def test_tensors_of_another_precision_than_the_run_has(tmp_path):
    path = save(tmp_path, state_at(7), CONFIG, keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["run"]["train.precision"] = "fp64"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is float32, not float64"):
        load(path)


def test_the_files_are_plain_safetensors_under_canonical_names(tmp_path):
    state = state_at(7)
    path = save(tmp_path, state, CONFIG, keep=2)
    with safe_open(path / "weights.safetensors", framework="np") as file:
        assert set(file.keys()) == {p.name for p in CONFIG.model.parameters}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            assert np.array_equal(file.get_tensor(name), state.engine.weights[name])
    with safe_open(path / "moments.safetensors", framework="np") as file:
        assert "first.decoder.norm.scale" in file.keys()  # noqa: SIM118


def test_arrays_in_other_layouts_are_stored_by_value(tmp_path):
    state = state_at(7)
    name = "decoder.0.feed_forward.up.kernel"
    state.engine.weights[name] = np.asfortranarray(state.engine.weights[name])
    loaded = load(save(tmp_path, state, CONFIG, keep=2))
    assert np.array_equal(loaded.engine.weights[name], state.engine.weights[name])


def test_a_state_without_moments(tmp_path):
    state = state_at(3)
    state.engine.moments = {}
    assert load(save(tmp_path, state, CONFIG, keep=1)).engine.moments == {}


def test_moments_of_other_shapes_than_their_parameters(tmp_path):
    config, state = changed(optimizer={"name": "adafactor"}), state_at(3)
    shapes = {name: array.shape for name, array in state.engine.weights.items()}
    state.engine.moments = {
        moment: {name: np.full(shape, 3, np.float32) for name, shape in table.items()}
        for moment, table in moment_shapes("adafactor", shapes).items()
    }
    path = save(tmp_path, state, config, keep=1)
    assert_same(load(path), state)
    with pytest.raises(UserError, match=r"optimizer\.name: adafactor → adamw"):
        check_same_run(path, CONFIG)


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_moments_of_another_optimizer_are_refused(tmp_path, optimizer):
    path = save(tmp_path, state_at(3), changed(optimizer={"name": optimizer}), keep=1)
    with pytest.raises(UserError, match=f"does not hold the moments of {optimizer} for the"):
        load(path)


def test_an_optimizer_that_is_not_known_is_refused(tmp_path):
    path = save(tmp_path, state_at(3), CONFIG, keep=1)
    edit(path, lambda manifest: manifest["run"].update({"optimizer.name": ["adamw"]}))
    with pytest.raises(UserError, match=r"run: optimizer\.name is \['adamw'\]"):
        load(path)


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / ".tmp-step-00000001").mkdir()
    (tmp_path / ".tmp-step-00000001" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    for step in (5, 10, 15, 20):
        save(tmp_path, state_at(step), CONFIG, keep=2)
    assert names(tmp_path) == ["notes.txt", "step-00000015", "step-00000020"]
    assert newest(tmp_path) == tmp_path / "step-00000020"


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, state_at(step), CONFIG, keep=2)
    assert newest(tmp_path).name == "step-100000000"


def test_nothing_to_load(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None


def test_a_valid_checkpoint_of_the_same_step_stays(tmp_path):
    path = save(tmp_path, state_at(5), CONFIG, keep=2)
    before = (path / "manifest.json").stat().st_ino
    assert save(tmp_path, state_at(5), CONFIG, keep=2) == path
    assert (path / "manifest.json").stat().st_ino == before


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def other_tensors(path: Path) -> None:
    """Weights of other names, with a digest that fits."""
    save_file({"else": np.zeros(3, np.float32)}, path / "weights.safetensors")
    data = (path / "weights.safetensors").read_bytes()
    file = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    edit(path, lambda m: m["files"].update({"weights.safetensors": file}))


def link(path: Path) -> None:
    outside = path.parent / "outside.safetensors"
    os.rename(path / "weights.safetensors", outside)
    (path / "weights.safetensors").symlink_to(outside)


def escape(path: Path) -> None:
    shutil.copy(path / "weights.safetensors", path.parent / "weights.safetensors")
    edit(
        path,
        lambda m: m["files"].update(
            {"../weights.safetensors": m["files"].pop("weights.safetensors")}
        ),
    )


DAMAGE = {
    "a flipped bit in the weights": (
        lambda p: flip(p / "weights.safetensors", -5),
        "weights.safetensors is damaged",
    ),
    "a flipped bit in the moments": (
        lambda p: flip(p / "moments.safetensors", 700),
        "moments.safetensors is damaged",
    ),
    "a short file": (
        lambda p: os.truncate(p / "moments.safetensors", 100),
        "moments.safetensors has 100 bytes instead of",
    ),
    "a missing file": (
        lambda p: (p / "moments.safetensors").unlink(),
        "moments.safetensors: No such file",
    ),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: No such file"),
    "half a manifest": (
        lambda p: os.truncate(p / "manifest.json", 200),
        "manifest.json: Invalid JSON",
    ),
    "an unknown schema": (lambda p: edit(p, lambda m: m.update(schema=2)), "manifest.json: schema"),
    "an unknown key": (lambda p: edit(p, lambda m: m.update(more=2)), "manifest.json: more"),
    "a negative step": (lambda p: edit(p, lambda m: m.update(step=-1)), "manifest.json: step"),
    "a file not listed": (
        lambda p: edit(p, lambda m: m["files"].pop("moments.safetensors")),
        "manifest.json does not list moments.safetensors",
    ),
    "a name that leaves the folder": (escape, "manifest.json: files"),
    "a link": (link, "weights.safetensors is not a plain file"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage, reason):
    for step in (5, 10):
        save(tmp_path, state_at(step), CONFIG, keep=2)
    path = tmp_path / "step-00000010"
    damage(path)
    for function in (verify, load):
        with pytest.raises(UserError) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path} is not a valid checkpoint: {reason}")
    lines = []
    assert newest(tmp_path, lines.append) == tmp_path / "step-00000005"
    assert len(lines) == 1
    assert reason in lines[0]
    # The run goes on from step 5 and comes to step 10 again.
    assert save(tmp_path, state_at(10), CONFIG, keep=2) == path
    assert_same(load(path), state_at(10))


def test_a_later_damaged_checkpoint_does_not_push_out_good_ones(tmp_path):
    for step in (5, 30):
        save(tmp_path, state_at(step), CONFIG, keep=1)
    flip(tmp_path / "step-00000030" / "weights.safetensors", -1)
    save(tmp_path, state_at(10), CONFIG, keep=1)
    assert newest(tmp_path, lambda line: None) == tmp_path / "step-00000010"


def test_tensors_that_the_manifest_does_not_list_are_refused(tmp_path):
    path = save(tmp_path, state_at(5), CONFIG, keep=1)
    other_tensors(path)
    with pytest.raises(UserError, match=r"weights\.safetensors does not hold the tensors"):
        load(path)


def test_a_linked_folder_is_refused_and_passed_over(tmp_path):
    path = save(tmp_path / "elsewhere", state_at(5), CONFIG, keep=1)
    (tmp_path / "step-00000005").symlink_to(path)
    assert newest(tmp_path) is None
    with pytest.raises(UserError, match="it is a link"):
        load(tmp_path / "step-00000005")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"not a valid checkpoint: manifest\.json: No such file"):
        load(tmp_path / "step-00000005")


# Another model, another run


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"width": 16}, "embeddings.tokens has shape (300, 8) in it, and shape (300, 16)"),
        ({"layers": 2}, "decoder.1.attention_norm.scale is missing in it, and shape (8,)"),
        ({"key_bias": True}, "decoder.0.attention.key.bias is missing in it"),
        ({"bias": False}, "it has decoder.0.attention_norm.bias, which [model] does not have"),
        ({"positions": "sinusoidal"}, "it has embeddings.positions, which [model]"),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path, model, message):
    path = save(tmp_path, state_at(5), CONFIG, keep=1)
    check_model(path, CONFIG.model)
    with pytest.raises(UserError) as caught:
        check_model(path, changed(model=model).model)
    assert f"{path} is a checkpoint of another model: {message}" in str(caught.value)


def test_what_may_change_when_a_run_goes_on(tmp_path):
    path = save(tmp_path, state_at(5), CONFIG, keep=1)
    check_same_run(
        path,
        changed(
            evaluation={"every": 7, "windows": 3},
            checkpoint={"every": 7, "keep": 9},
            train={"check_every": 1, "micro_batch_size": 2},
            launch={"ranks": 4, "backend": "tensorflow"},
            output={"folder": "elsewhere"},
        ),
    )


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        ({"train": {"seed": 9}}, ["train.seed: 1 → 9"]),
        (
            {"train": {"precision": "bf16", "global_batch_size": 8}},
            ["train.global_batch_size: 16 → 8", "train.precision: fp32 → bf16"],
        ),
        ({"train": {"max_norm": 0}}, ["train.max_norm: 1.0 → not set"]),
        ({"model": {"dropout": 0.5}}, ["model.dropout: 0.1 → 0.5"]),
        (
            {"optimizer": {"name": "sgd"}},
            [
                "optimizer.beta1: 0.9 → not set",
                "optimizer.beta2: 0.999 → not set",
                "optimizer.epsilon: 1e-08 → not set",
                "optimizer.momentum: not set → 0.9",
                "optimizer.name: adamw → sgd",
            ],
        ),
        ({"train": {"steps": 300}}, ["schedule.updates: 200 → 300", "to train longer, set it"]),
        ({"data": {"text": ["/b.txt"]}}, ["data.text: ['/corpora/book.txt'] → ['/b.txt']"]),
    ],
)
def test_what_makes_it_another_run(tmp_path, sections, lines):
    path = save(tmp_path, state_at(5), CONFIG, keep=1)
    with pytest.raises(UserError) as caught:
        check_same_run(path, changed(**sections))
    message = str(caught.value)
    for line in lines:
        assert line in message
    assert message.count("→") == len([line for line in lines if "→" in line])


def test_the_number_of_steps_may_change_where_the_schedule_does_not_follow_it(tmp_path):
    path = save(tmp_path, state_at(5), CONFIG, keep=1)
    check_same_run(path, changed(train={"steps": 300}, schedule={"updates": 200}))
    constant = changed(schedule={"name": "constant"})
    path = save(tmp_path, state_at(6), constant, keep=1)
    check_same_run(path, changed(schedule={"name": "constant"}, train={"steps": 300}))


def test_the_text_may_move_if_the_prepared_data_are_the_same(tmp_path):
    path = save(tmp_path, state_at(5, data_digest="abc"), CONFIG, keep=1)
    moved = changed(data={"text": ["/elsewhere/book.txt"]})
    check_same_run(path, moved, data_digest="abc")
    with pytest.raises(UserError, match="digest of the prepared data: abc → xyz"):
        check_same_run(path, CONFIG, data_digest="xyz")
    with pytest.raises(UserError, match=r"data\.text"):
        check_same_run(path, moved)


def in_folder(folder, weight=1.0, start="base"):
    """A config that takes everything it can from a folder, as after reading it from a file."""
    source = {
        "name": "pairs",
        "text": [f"{folder}/source.txt"],
        "target": [f"{folder}/target.txt"],
        "weight": weight,
    }
    return make_config(
        {
            "model": SMALL["model"],
            "data": {"vocabulary": 300, "sources": [source], "tokenizer": f"{folder}/words.json"},
            "train": {"start_from": f"{folder}/runs/{start}"},
        },
        "moved",
    )


def test_everything_may_move_together(tmp_path):
    path = save(tmp_path, state_at(5, data_digest="abc"), in_folder("/old"), keep=1)
    check_same_run(path, in_folder("/new"), data_digest="abc")
    with pytest.raises(UserError, match="digest of the prepared data: abc → xyz"):
        check_same_run(path, in_folder("/new"), data_digest="xyz")
    with pytest.raises(UserError, match=r"data\.sources: .*'weight': 1\.0.* → .*'weight': 2\.0"):
        check_same_run(path, in_folder("/new", weight=2.0), data_digest="abc")
    with pytest.raises(UserError, match=r"train\.start_from: base → better\n"):
        check_same_run(path, in_folder("/new", start="better"), data_digest="abc")
    one = changed(data={"text": ["/old/a.txt"], "target": ["/old/b.txt"]})
    path = save(tmp_path, state_at(6, data_digest="abc"), one, keep=1)
    other = changed(data={"text": ["/new/a.txt"], "target": ["/new/b.txt"]})
    check_same_run(path, other, data_digest="abc")


# Kills, full disks, memory

SAVER = """
import sys
from pathlib import Path
from horovod_lm.checkpoint import newest, load, save
from tests.unit.test_checkpoint import CONFIG, state_at

folder = Path(sys.argv[1])
path = newest(folder, log=lambda line: print("PASSED OVER", line, flush=True))
step = load(path).step if path else 2
states = [state_at(step + ahead) for ahead in range(1, 400)]
print("ready", flush=True)
for state in states:
    save(folder, state, CONFIG, keep=2)
    print(state.step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    delays = random.Random(5)
    saved = 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n", "no checkpoint may need passing over"
        time.sleep(delays.uniform(0.001, 0.08))
        process.send_signal(signal.SIGKILL)
        told = process.communicate(timeout=30)[0].split()
        saved = int(told[-1]) if told else saved
        path = newest(tmp_path, log=pytest.fail)
        if saved:
            # The one that was reported, or one more that was on the disk before its report.
            assert load(path).step in (saved, saved + 1)
            assert_same(load(path), state_at(load(path).step))
            saved = load(path).step
        assert len([name for name in names(tmp_path) if name.startswith("step-")]) <= 3
    assert saved > 10, "the kills came too early to test anything"


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from horovod_lm import checkpoint
from tests.unit.test_checkpoint import CONFIG, state_at

folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def audit(event, arguments):
    # Python reports each change to the file system before it is made.
    global calls
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        if str(folder) in str(arguments[0]) or event != "open":
            if calls == wanted:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1

state = state_at(30)
sys.addaudithook(audit)
checkpoint.save(folder, state, CONFIG, keep=1)
print("done", calls)
"""


def test_a_kill_before_each_single_change_leaves_a_loadable_checkpoint(tmp_path):
    outcomes = []
    for number in range(100):
        folder = tmp_path / str(number)
        for step in (10, 20):
            save(folder, state_at(step), CONFIG, keep=2)
        (folder / ".tmp-step-00000025").mkdir()
        process = subprocess.run(
            [sys.executable, "-c", KILLED_AT, str(folder), str(number)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode in (0, -signal.SIGKILL), process.stderr
        path = newest(folder, log=pytest.fail)
        outcomes.append(path.name)
        assert_same(load(path), state_at(load(path).step))
        if process.returncode == 0:
            break
        save(folder, state_at(40), CONFIG, keep=1)
        assert names(folder) == ["step-00000040"]
        shutil.rmtree(folder)
    assert process.returncode == 0
    assert outcomes == sorted(outcomes), "once the new one is there, it stays"
    assert outcomes[0] == "step-00000020"
    assert outcomes[-1] == "step-00000030"
    assert len(outcomes) > 15


FILL = """
import sys
from pathlib import Path
from horovod_lm.checkpoint import newest, save
from horovod_lm.errors import RunFailed
from tests.unit.test_checkpoint import CONFIG, state_at

folder = Path(sys.argv[1])
for step in range(1, 100):
    try:
        save(folder, state_at(step * 10), CONFIG, keep=100)
    except RunFailed as error:
        print(error)
        break
print(sorted(p.name for p in folder.iterdir()) == [f"step-{s * 10:08d}" for s in range(1, step)])
print(newest(folder, log=print).name == f"step-{(step - 1) * 10:08d}")
"""


def in_a_small_file_system(folder: Path, size: str, program: str) -> subprocess.CompletedProcess:
    """Run Python code with `folder` on a tmpfs of `size`, in a mount namespace of its own."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o "size=$0" none "$1" && shift && "$@"']
    command = [*mount, size, str(folder), sys.executable, "-c", program, str(folder / "c")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    if in_a_small_file_system(tmp_path, "64k", "pass").returncode:
        pytest.skip("needs the right to mount a small file system")
    process = in_a_small_file_system(tmp_path, "300k", FILL)
    assert process.returncode == 0, process.stderr
    message, clean, loadable = process.stdout.splitlines()
    assert "no space left on device; the last checkpoint, " in message
    assert ", is kept" in message
    assert (clean, loadable) == ("True", "True")


def test_a_file_size_limit_ends_as_a_full_disk_does(tmp_path):
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", limit + FILL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    message = process.stdout.splitlines()[0]
    assert "file too large; there is no earlier one" in message
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"the checkpoint of step 5 can't be written.*directory"):
        save(tmp_path / "file" / "checkpoints", state_at(5), CONFIG, keep=1)


LOADER = """
import resource, sys
from pathlib import Path
from horovod_lm.checkpoint import load

def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

before = kib("VmHWM")
state = load(Path(sys.argv[1]))
print(kib("VmHWM") - before, sum(a.nbytes for a in state.engine.weights.values()) * 3 // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_holds_one_copy(tmp_path):
    big = make_config({"model": {"width": 512}, "data": {"vocabulary": 30_000}}, "big")
    path = save(tmp_path, state_at(5, big), big, keep=1)
    process = subprocess.run(
        [sys.executable, "-c", LOADER, str(path)], capture_output=True, text=True, timeout=60
    )
    grown, size = map(int, process.stdout.split())
    assert size > 200_000
    assert grown < 1.1 * size
