"""The command line as a person meets it: real processes, their output and their exit codes."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from horovod_lm import __version__
from horovod_lm.cli import COMMANDS
from horovod_lm.cli.common import load
from horovod_lm.cli.table import scaled, size
from horovod_lm.config import load_config
from horovod_lm.inspection import check_disk, describe, micro_batch_rows, parts, plan, rows
from horovod_lm.installed import Horovod
from horovod_lm.presets import preset
from horovod_lm.spec import ModelSpec

HEAVY = ("numpy", "pydantic", "rich", "torch", "tensorflow", "keras", "horovod", "psutil")
TINY = """\
[model]
width = 32
layers = 3
heads = 2
context = 16
[data]
text = ["text.txt"]
documents = "line"
vocabulary = 300
[train]
steps = 3
global_batch_size = 4
[output]
tensorboard = false
"""
WORDS = ("the", "river", "runs", "past", "a", "mill", "and", "under", "old", "bridges")
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def can_train(backend: str) -> bool:
    return importlib.util.find_spec(backend) is not None and Horovod.find().fault(backend) is None


needs_torch = pytest.mark.skipif(not can_train("torch"), reason="needs torch and our Horovod")


def run(*arguments, cwd=None, stdin=None, env=None):
    return subprocess.run(
        [sys.executable, "-m", "horovod_lm", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        input=stdin,
        timeout=120,
        env={**os.environ, **(env or {})},
    )


def code(source: str, *arguments):
    return subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config, a text and a cache of its own."""
    path = tmp_path_factory.mktemp("cli")
    (path / "tiny.toml").write_text(TINY)
    lines = (" ".join(WORDS[(i * j) % 10] for j in range(1, 20)) for i in range(1, 200))
    (path / "text.txt").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def cache(folder):
    return {"XDG_CACHE_HOME": str(folder / "cache")}


@pytest.fixture(scope="module")
def trained(folder, cache):
    """The folder of a finished run."""
    output = folder / "run"
    result = run("train", folder / "tiny.toml", "--output", output, env=cache)
    assert result.returncode == 0, result.stderr
    return output


# ---- help, version, completion


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_imports_nothing_heavy(command):
    source = (
        "import sys\nfrom horovod_lm.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print([m for m in sys.modules if m in {HEAVY}], file=sys.stderr)"
    )
    result = code(source, *command, "--help")
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"
    assert result.stdout.startswith("Usage: horovod-lm")
    assert "Examples:" in result.stdout if command else "A first run:" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_help_lists_every_command_with_its_whole_purpose():
    text = run("--help").stdout
    listed = re.findall(r"^  (\w+)  +([A-Z].*)$", text, re.MULTILINE)
    assert tuple(name for name, _ in listed) == COMMANDS
    assert all(purpose.endswith(".") and "..." not in purpose for _, purpose in listed)


def test_version():
    assert run("--version").stdout.strip() == f"horovod-lm, version {__version__}"


def test_completion_completes_commands_and_options():
    def complete(words):
        env = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        result = run(env={**env, "_HOROVOD_LM_COMPLETE": "bash_complete"})
        return result.stdout.split()

    assert complete("horovod-lm tr") == ["plain,train"]
    assert "plain,--backend" in complete("horovod-lm train --b")
    assert complete("horovod-lm train x --set train.ste") == ["plain,train.steps="]


def test_without_a_command_the_help_is_shown():
    result = run()
    assert result.returncode == 2
    assert result.stderr.startswith("Usage: horovod-lm")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell):
    result = run("completion", shell)
    assert "_HOROVOD_LM_COMPLETE" in result.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=result.stdout, text=True, check=True)


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "x"], "there is no command trian; did you mean train?"),
        (["zzzz"], "there is no command zzzz; there are doctor, prepare"),
        (["compare", "x", "--lancher", "mpirun"], "Did you mean '--launcher'?"),
        (["train"], "missing argument 'CONFIG'"),
        (["compare", "x", "-np", "0"], "0 is not in the range x>=1"),
        (["train", "x", "-np", "4"], "mpirun -np 4 horovod-lm train"),
        (["train", "missing.toml"], "missing.toml does not exist"),
        (["inspect", "{folder}"], "has no config.toml"),
        (["inspect"], "give a config, the folder of a run, or --preset NAME: one of them"),
        (["inspect", "{config}", "--preset", "gpt2"], "or --preset NAME: one of them"),
        (["inspect", "--preset", "gpt-2"], 'model.preset: there is no preset "gpt-2"; known: '),
        (["inspect", "{config}", "--set", "model.laers=3"], "did you mean model.layers?"),
        (["inspect", "{config}", "--set", "layers=3"], "did you mean model.layers?"),
        (["inspect", "{config}", "--set", "train.steps"], "is not of the form section.key=value"),
        (["inspect", "{config}", "--set", "train.steps=many"], "train.steps = 'many'"),
        (["inspect", "{config}", "--set", "model.heads=3"], "does not divide width = 32"),
        (
            ["train", "{config}", "--set", "model.kind=encoder"],
            'causal_lm, the default objective, needs model.kind = "decoder", not "encoder"; change',
        ),
        (["evaluate", "{folder}"], "is not the folder of a run"),
        (["generate", "x", "--prompt", ""], "the prompt is empty"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "is not in the range x>=0"),
    ],
)
def test_a_mistake_has_one_message_and_exit_code_2(folder, arguments, said):
    names = {"folder": str(folder), "config": str(folder / "tiny.toml")}
    result = run(*(argument.format(**names) for argument in arguments), cwd=folder)
    assert result.returncode == 2
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.startswith("horovod-lm: ")
    assert len(result.stderr.splitlines()) == 1


def test_an_internal_error_is_one_line_and_a_traceback_on_request(folder, monkeypatch):
    source = (
        "import sys, horovod_lm.inspection as i\ni.describe = lambda config: 1 / 0\n"
        "from horovod_lm.cli import main\nmain(['inspect', sys.argv[1]])"
    )
    result = code(source, folder / "tiny.toml")
    assert result.returncode == 1
    assert result.stderr == (
        "horovod-lm: internal error: ZeroDivisionError: division by zero "
        "(set HOROVOD_LM_TRACEBACK=1 for the traceback)\n"
    )
    monkeypatch.setenv("HOROVOD_LM_TRACEBACK", "1")
    assert "Traceback" in code(source, folder / "tiny.toml").stderr


def test_a_closed_pipe_is_no_news(folder):
    command = f'"{sys.executable}" -m horovod_lm inspect tiny.toml --json | head -n 1'
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=folder, timeout=60
    )
    assert result.stdout == "{\n"
    assert result.stderr == ""


def test_ctrl_c_ends_quietly_with_130():
    process = subprocess.Popen(
        [sys.executable, "-m", "horovod_lm", "generate", "x", "--prompt", "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    asleep = 0
    while asleep < 5:  # until it waits for its standard input
        time.sleep(0.1)
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip() == ""


def test_a_mistake_on_two_ranks_is_told_once():
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("no mpirun")
    command = [mpirun, "-np", "2", "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
    result = subprocess.run(
        [*command, sys.executable, "-m", "horovod_lm", "train", "missing.toml"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **ROOT},
    )
    assert result.returncode == 2
    assert result.stderr.count("horovod-lm: missing.toml does not exist") == 1


def test_a_mistake_that_rank_1_alone_sees_is_told_too():
    env = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}
    result = run("train", "missing.toml", env=env)
    assert result.returncode == 2
    assert "missing.toml does not exist" in result.stderr


# ---- flags and figures


def test_flags_are_short_names_of_keys(folder):
    config = load(
        folder / "tiny.toml",
        ("train.steps=7", "launch.backend=torch", 'name="x"'),
        backend="tensorflow",
        ranks=3,
        launcher="horovodrun",
        output=Path('a "b"'),
    )
    assert config.train.steps == 7
    assert config.name == "x"
    assert config.launch.backend == "tensorflow"
    assert config.launch.ranks == 3
    assert config.launch.launcher == "horovodrun"
    assert config.output.folder == 'a "b"'


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
def test_rows_and_parts_add_up(kind, tied, placement):
    spec = ModelSpec(kind=kind, tied=tied, norm_placement=placement, layers=3, encoder_layers=2)
    table = rows(spec.parameters)
    assert sum(row.count for row in table) == spec.size
    assert len({row.name for row in table}) == len(table)
    assert sum(parts(spec).values()) == spec.size
    assert ("heads" in parts(spec)) == (not tied)
    assert ("cross_attention" in parts(spec)) == (kind == "encoder-decoder")


def test_parts_of_well_known_models():
    bert = parts(preset("bert-base").spec)
    assert list(bert) == ["embeddings", "norms", "attention", "feed_forward", "pooler", "heads"]
    assert bert["embeddings"] == (30522 + 512 + 2) * 768
    assert bert["pooler"] == 768 * 768 + 768
    assert bert["heads"] == bert["pooler"] + 30522
    t5 = parts(preset("t5-small").spec)
    assert t5["attention"] == 12 * 4 * 512 * 512 + 2 * 32 * 8
    assert t5["cross_attention"] == 6 * 4 * 512 * 512


def test_figures_of_a_small_model_by_hand(folder):
    figures = describe(load_config(folder / "tiny.toml"))
    block = 4 * 32 * 32 + 3 * 32 + 2 * 32 * 128 + 128 + 32 + 2 * 64
    assert figures["total"] == 300 * 32 + 16 * 32 + 3 * block + 64
    assert figures["decayed"] == 300 * 32 + 3 * (4 * 32 * 32 + 2 * 32 * 128)
    assert figures["parts"]["attention"] == 3 * (4 * 32 * 32 + 3 * 32)
    # 6 for each weight of a product, 12 x width for each of 8.5 keys seen on average, in 3 layers
    assert figures["flops_per_token"] == 6 * figures["decayed"] + 12 * 32 * 8.5 * 3


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [
        (16, None, 2, 8),
        (16, 4, 2, 4),
        (5, None, 2, 3),
        (16, 100, 1, 16),
        (10, 4, 1, 4),
        (9, 4, 1, 3),
    ],
)
def test_rows_of_a_micro_batch(folder, batch, micro, ranks, expected):
    sets = [f"train.global_batch_size={batch}"]
    if micro:
        sets.append(f"train.micro_batch_size={micro}")
    config = load_config(folder / "tiny.toml", sets)
    assert micro_batch_rows(config, ranks) == expected
    figures = plan(config, ranks, 1000)
    assert figures["micro_batches"] * figures["micro_batch_rows"] * ranks >= batch


def test_plan_counts_tokens_and_epochs(folder):
    figures = plan(load_config(folder / "tiny.toml"), 2, 1000)
    assert figures["tokens_per_step"] == 64
    assert figures["epochs"] == pytest.approx(3 * 64 / 1000)
    assert (
        figures["flops_per_step"]
        == 64 * describe(load_config(folder / "tiny.toml"))["flops_per_token"]
    )


def test_a_disk_that_is_too_small_is_named(tmp_path):
    check_disk(tmp_path / "new" / "run", 1)
    with pytest.raises(Exception, match=r"MiB free, and the run's checkpoints take"):
        check_disk(tmp_path / "new" / "run", 2**60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size(0), "0 B"),
        (size(1000), "1000 B"),
        (size(1536), "1.5 KiB"),
        (size(20 * 2**20), "20 MiB"),
        (size(3.5 * 2**30), "3.50 GiB"),
        (scaled(71.23e9, "FLOP"), "71.2 GFLOP"),
        (scaled(999.7e6, "FLOP"), "1 GFLOP"),
        (scaled(12, "FLOP"), "12 FLOP"),
    ],
)
def test_figures_for_a_person(text, expected):
    assert text == expected


def test_inspect_prints_plain_columns_into_a_pipe(folder):
    text = run("inspect", folder / "tiny.toml").stdout
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"^decoder\.0-2\.attention\.query\.kernel +32 x 32 +3 +3,072 ", text, re.M)
    ends = {len(m[0]) for m in re.finditer(r"^\S.*\d(?=  (normal|zeros|ones))", text, re.M)}
    assert len(ends) == 1  # the numbers' right edges


def test_inspect_json_is_the_whole_table(folder):
    figures = json.loads(run("inspect", folder / "tiny.toml", "--json").stdout)
    spec = load_config(folder / "tiny.toml").model
    assert [p["name"] for p in figures["parameters"]] == [p.name for p in spec.parameters]
    assert figures["total"] == spec.size


def test_inspect_shows_a_preset_beside_what_was_published():
    text = run("inspect", "--preset", "bert-base").stdout
    assert re.search(
        r"^published +110,000,000\nhere +110,104,890\ndifference +\+104,890 ", text, re.M
    )
    assert "Published: Devlin et al. (2019), section 3; with the head of masked words." in text
    assert re.search(r"^encoder\.0-11\.attention\.query\.kernel +768 x 768 +12 ", text, re.M)
    assert max(map(len, text.splitlines())) <= 100
    figures = json.loads(run("inspect", "--preset", "gpt2", "--json").stdout)
    assert (figures["preset"], figures["difference"]) == ("gpt2", 0)
    assert figures["published"] == figures["total"] == 124_439_808
    assert "openai" in figures["source"]
    smaller = run("inspect", "--preset", "gpt2", "--set", "model.layers=6", "--json").stdout
    assert json.loads(smaller)["difference"] == -6 * (12 * 768 * 768 + 13 * 768)


@pytest.mark.parametrize("no_color", [False, True])
def test_inspect_on_a_terminal(folder, no_color):
    import pty

    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    env |= {"TERM": "xterm-256color", "COLUMNS": "160"} | ({"NO_COLOR": "1"} if no_color else {})
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "horovod_lm", "inspect", str(folder / "tiny.toml")],
        stdout=child,
        stderr=child,
        env=env,
    )
    os.close(child)
    chunks = []
    try:
        while chunk := os.read(parent, 4096):
            chunks.append(chunk)
    except OSError:  # the other end is closed
        pass
    assert process.wait(30) == 0
    text = b"".join(chunks).decode()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "decoder.0-2.attention.query.kernel" in plain
    assert max(map(len, plain.splitlines())) <= 100
    assert "\x1b[" in text  # bold headings
    colours = re.findall(r"\x1b\[(?:[0-9;]*;)?[34]\dm", text)
    assert not (no_color and colours)


# ---- commands that work


def test_prepare_says_what_it_made(folder, cache):
    result = run("prepare", folder / "tiny.toml", env=cache)
    assert result.returncode == 0, result.stderr
    assert re.search(r"[\d,]+ training tokens, [\d,]+ validation tokens", result.stdout)


@needs_torch
def test_dry_run_prints_the_plan_and_leaves_no_run(folder, cache):
    output = folder / "planned"
    result = run("train", folder / "tiny.toml", "--output", output, "--dry-run", env=cache)
    assert result.returncode == 0, result.stderr
    assert "nothing was trained" in result.stdout
    assert re.search(r"^tokens per step +64$", result.stdout, re.MULTILINE)
    assert not output.exists()


@needs_torch
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_folder_in_use_is_refused(trained, folder, cache, flags):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    result = run("train", folder / "tiny.toml", "--output", trained, *flags, env=cache)
    assert result.returncode == 2
    assert "has a run in it" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@needs_torch
def test_inspect_reads_a_runs_folder(trained, folder):
    of_run = json.loads(run("inspect", trained, "--json").stdout)
    of_config = json.loads(run("inspect", folder / "tiny.toml", "--json").stdout)
    assert of_run["parameters"] == of_config["parameters"]


@needs_torch
def test_evaluate_agrees_with_the_run(trained, cache):
    result = run("evaluate", trained, "--json", env=cache)
    figures = json.loads(result.stdout)
    recorded = json.loads((trained / "run.json").read_text())
    assert figures["step"] == 3
    assert figures["loss"] == pytest.approx(recorded["validation_loss"], abs=1e-6)
    result = run("evaluate", trained, env=cache)
    assert f"validation loss {figures['loss']:.4f} nats per token" in result.stdout
    assert len(result.stdout.splitlines()) == 1


@needs_torch
def test_generate_is_repeatable_and_reads_standard_input(trained, cache):
    def texts(*arguments, stdin=None):
        result = run("generate", trained, "--json", *arguments, stdin=stdin, env=cache)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    greedy = texts("--prompt", "the river", "--tokens", "4")
    assert greedy["prompt"] == "the river"
    assert texts("--prompt", "-", "--tokens", "4", stdin="the river") == greedy
    drawn = ["--prompt", "the river", "--tokens", "8", "--temperature", "1"]
    assert texts(*drawn, "--seed", "5") != texts(*drawn, "--seed", "6")


@needs_torch
def test_a_prompt_that_is_no_text_or_too_long_is_refused(trained, cache):
    result = subprocess.run(
        [sys.executable, "-m", "horovod_lm", "generate", str(trained), "--prompt", "-"],
        input=b"\xff\xfe",
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert b"is not UTF-8 text" in result.stderr
    result = run("generate", trained, "--prompt", "the river " * 50, env=cache)
    assert result.returncode == 2
    assert "allowed are 1 to 15" in result.stderr
