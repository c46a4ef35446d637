import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from horovod_lm.config import make_config
from horovod_lm.data import making, progress
from horovod_lm.data.cache import cache_folder
from horovod_lm.data.making import unigram_entropy
from horovod_lm.data.prepare import prepare
from horovod_lm.data.tokenizer import END_OF_TEXT, Tokenizer
from horovod_lm.errors import RunFailed, UserError

WORDS = ["the", "cat", "and", "a", "dog", "sat", "on", "one", "mat", "or", "went", "to", "see"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "horovod_lm" / "data"


@pytest.fixture
def text(tmp_path):
    """A file of 100 paragraphs, each with its number."""
    path = tmp_path / "text.txt"
    write(path, 100)
    return path


def write(path, count):
    words = np.random.default_rng(count).choice(WORDS, (count, 30))
    paragraphs = [f"Number {i}: {' '.join(line)}." for i, line in enumerate(words)]
    path.write_text("\n\n".join(paragraphs) + "\n")


def config(*text, context=16, **data):
    data = {"text": [str(path) for path in text], "vocabulary": 400, **data}
    return make_config({"model": {"context": context}, "data": data}, "test")


def test_the_cache_follows_xdg(cache, monkeypatch, tmp_path):
    assert cache_folder() == cache
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / ".cache" / "horovod_lm" / "data"


def documents(prepared, tokens):
    stream = prepared.tokenizer.decode(tokens.read(0, len(tokens)))
    assert stream.endswith(END_OF_TEXT)
    return stream.split(END_OF_TEXT)[:-1]


def test_the_last_documents_are_for_validation_and_nothing_is_lost(text, cache):
    prepared = prepare(config(text))
    train, validation = (documents(prepared, s) for s in (prepared.train, prepared.validation))
    assert train + validation == text.read_text().strip().split("\n\n")
    assert (len(train), len(validation)) == (95, 5)
    assert len(prepared.train.documents) == 95 and len(prepared.validation.documents) == 5
    starts = prepared.train.documents[1:]
    ends = [prepared.train.read(int(start) - 1, 1)[0] for start in starts]
    assert set(ends) == {prepared.tokenizer.end}
    assert prepared.folder.parent == cache


def test_the_tokenizer_is_trained_on_the_training_documents_alone(tmp_path):
    path = tmp_path / "text.txt"
    write(path, 40)
    with path.open("a") as stream:
        stream.write("\n" + "xyzzy " * 500)
    one_held_out = config(path, validation_fraction=0.01)
    assert prepare(one_held_out).tokenizer.encode(" xyzzy").size > 1
    with path.open("a") as stream:
        stream.write("\n\nThe end, and it is a long one, so that it fills a window.")
    assert prepare(one_held_out).tokenizer.encode(" xyzzy").size == 1


@pytest.mark.parametrize("fraction, held_out", [(0.05, 5), (0.001, 1), (0.5, 50), (0.999, 99)])
def test_the_share_of_validation(text, fraction, held_out):
    prepared = prepare(config(text, validation_fraction=fraction))
    assert len(prepared.validation.documents) == held_out
    assert len(prepared.train.documents) == 100 - held_out


def test_kinds_of_documents(text, tmp_path):
    write(tmp_path / "more.txt", 7)
    both = text, tmp_path / "more.txt"
    for kind, count in (("paragraph", 107), ("line", 107), ("file", 2)):
        prepared = prepare(config(*both, documents=kind))
        assert len(prepared.train.documents) + len(prepared.validation.documents) == count


def test_the_manifest_has_the_digests_of_everything(text):
    prepared = prepare(config(text))
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest == prepared.manifest
    assert manifest["sources"][0]["corpus"] == [
        {"file": str(text), "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}
    ]
    entries = [manifest["tokenizer"]]
    for split in ("train", "validation"):
        stream = manifest["sources"][0][split]["text"]
        entries += [*stream["shards"], stream["index"]]
    for entry in entries:
        data = (prepared.folder / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    names = {entry["file"] for entry in entries} | {"manifest.json"}
    assert names == {path.name for path in prepared.folder.iterdir()}


def test_of_parallel_text_the_target_stands_for_the_corpus(tmp_path):
    for name, word in (("source", "one"), ("target", "zwei")):
        (tmp_path / name).write_text("".join(f"{word} {number}\n" for number in range(100)))
    prepared = prepare(config(tmp_path / "source", target=[str(tmp_path / "target")]))
    for tokens, first in ((prepared.train, "zwei 0"), (prepared.validation, "zwei 95")):
        assert documents(prepared, tokens)[0] == first


def test_the_unigram_entropy_by_hand():
    # 4 ids; training counts 3, 1, 0, 0: probabilities 4/8, 2/8, 1/8, 1/8.
    train, validation = np.array([3, 1, 0, 0]), np.array([2, 0, 1, 0])
    expected = (2 * math.log(2) + math.log(8)) / 3
    assert unigram_entropy(train, validation) == pytest.approx(expected, rel=1e-12)


def test_the_unigram_entropy_counts_the_streams(text):
    prepared = prepare(config(text))
    train = np.bincount(prepared.train.read(0, len(prepared.train)), minlength=400)
    validation = np.bincount(prepared.validation.read(0, len(prepared.validation)), minlength=400)
    assert prepared.unigram_entropy == unigram_entropy(train, validation)
    assert 2 < prepared.unigram_entropy < math.log(400)


def test_a_second_time_nothing_is_done(text):
    first, lines = prepare(config(text)), []
    start = time.monotonic()
    second = prepare(config(text), lines.append)
    assert time.monotonic() - start < 1
    assert lines == []
    assert second.folder == first.folder and second.manifest == first.manifest


def test_the_key_is_of_contents_and_settings(text, tmp_path):
    first = prepare(config(text)).folder
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    assert prepare(config(copy)).folder == first
    assert prepare(config(text, context=8)).folder == first
    others = [
        prepare(config(text, vocabulary=300)).folder,
        prepare(config(text, documents="line")).folder,
        prepare(config(text, validation_fraction=0.1)).folder,
        prepare(config(text, copy)).folder,  # given twice is another corpus
    ]
    assert len({first, *others}) == 5
    # The same size and time of change, and yet other text.
    status = text.stat()
    text.write_text(text.read_text().replace("cat", "cow"))
    os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepare(config(text)).folder not in {first, *others}


def test_the_key_is_of_the_formats_that_names_stand_for(text, tmp_path):
    row = json.dumps({"text": "Line after line of a text that is long enough."}) + "\n"
    names = ("part-0", "part-0.jsonl", "part-0.txt")
    plain, records, same = paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_text(row * 40)
    first = prepare(config(plain, documents="line"))
    assert prepare(config(same, documents="line")).folder == first.folder
    others = [
        prepare(config(records, documents="line")),
        prepare(config(plain, records, documents="line")),
        prepare(config(records, plain, documents="line")),
    ]
    assert len({prepared.folder for prepared in (first, *others)}) == 4
    assert "{" in documents(first, first.train)[0]
    assert "{" not in documents(others[0], others[0].train)[0]
    # Said or told by the name, it is the same format.
    said = prepare(config(plain, documents="line", format="jsonl"))
    assert said.folder == others[0].folder


def test_two_makings_are_equal(text, cache):
    first = prepare(config(text)).manifest
    subprocess.run(["rm", "-r", str(cache)], check=True)
    assert prepare(config(text)).manifest == first


def test_damage_is_found_and_mended(text):
    prepared = prepare(config(text))
    for name in ("tokenizer.json", "train-00000.tokens", "validation.documents", "manifest.json"):
        path = prepared.folder / name
        path.write_bytes(path.read_bytes()[:-3])
        lines = []
        again = prepare(config(text), lines.append)
        assert any("is damaged; making it anew" in line for line in lines)
        assert again.manifest == prepared.manifest


def test_all_ids_are_below_the_vocabulary_also_where_it_is_not_filled(text):
    lines = []
    prepared = prepare(config(text, vocabulary=60_000), lines.append)
    assert any("of 60,000 ids" in line for line in lines)
    assert prepared.tokenizer.vocabulary < 60_000
    assert prepared.train.read(0, len(prepared.train)).max() < prepared.tokenizer.vocabulary


def leftovers(cache):
    """What a failed preparation may not leave."""
    if not cache.exists():
        return []
    return [p for p in cache.rglob("*") if p.is_file() and p.suffix not in (".lock", ".json")]


def refused(cache, *arguments, **settings):
    with pytest.raises(UserError) as caught:
        prepare(config(*arguments, **settings), lambda line: None)
    return str(caught.value)


@pytest.mark.parametrize(
    "content, settings, message",
    [
        (b"", {}, "is empty"),
        (b"\n \n\t\n", {}, "is empty"),
        (b"one paragraph\nof two lines", {}, "one document only"),
        (b"one\n\ntwo", {"documents": "file"}, "one document only"),
        (b"one\n\nt\xffo", {}, "line 3: at byte 1 of the line it has byte 0xff"),
        (b"\x89PNG\r\n\0", {}, "line 1: at byte 0 of the line it has byte 0x89"),
    ],
)
def test_a_corpus_of_no_use_is_refused(tmp_path, cache, content, settings, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert message in refused(cache, path, **settings)
    assert leftovers(cache) == []


def test_a_split_shorter_than_a_window_is_refused(text, cache):
    short = refused(cache, text, context=10_000)
    assert "training documents have" in short and "10,001 (model.context + 1)" in short
    train = len(prepare(config(text)).train)
    assert "validation documents have" in refused(cache, text, context=train - 1)


MASKED_ON_PAIRS = {"name": "masked_lm", "on": "next_sentence"}


@pytest.mark.parametrize(
    "sections, windows",
    [
        ({"batching": {"kind": "packed"}}, False),
        ({"batching": {"kind": "buckets"}}, False),
        ({"objective": [{"name": "masked_lm"}]}, True),
        ({"objective": [{"name": "next_sentence"}, MASKED_ON_PAIRS]}, False),
    ],
)
def test_only_what_is_cut_into_windows_must_fill_one(text, sections, windows):
    model = {"context": 10_000, "kind": "encoder" if "objective" in sections else "decoder"}
    data = {"text": [str(text)], "vocabulary": 400}
    settings = make_config({"model": model, "data": data, **sections}, "test")
    if windows:
        with pytest.raises(UserError, match="one window takes"):
            prepare(settings)
    else:
        assert prepare(settings).train.documents.size == 95


def test_a_file_that_changes_meanwhile_is_refused(text, cache):
    def log(line):
        if line.startswith("tokenising"):
            write(text, 90)

    with pytest.raises(UserError, match="changed while it was prepared"):
        prepare(config(text), log)
    assert leftovers(cache) == []


def test_after_an_interrupt_it_goes_on(text, cache):
    def log(line):
        if line.startswith("tokenising"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config(text), log)
    lines = []
    prepare(config(text), lines.append)
    assert [line for line in lines if "going on with" in line]
    assert not [line for line in lines if line.startswith("training")]  # the tokenizer is there
    assert not list(cache.glob("*.partial"))


CODE = """
import os, resource, signal, sys
from horovod_lm.config import make_config
from horovod_lm.data.prepare import prepare
from horovod_lm.errors import HorovodLmError
def log(line):
    print(line, flush=True)
    if line.startswith("tokenising") and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if line.startswith("tokenising") and sys.argv[2] == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
config = {"model": {"context": 16}, "data": {"text": [sys.argv[1]], "vocabulary": 400}}
try:
    prepare(make_config(config, "test"), log)
except HorovodLmError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def run(text, what):
    command = [sys.executable, "-c", CODE, str(text), what]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_kill_leaves_nothing_that_counts(text, cache):
    assert run(text, "kill").returncode == -signal.SIGKILL
    assert [path.suffix for path in cache.iterdir() if path.is_dir() and path.name != "known"] == [
        ".partial"
    ]
    prepare(config(text), lambda line: None)
    assert not list(cache.glob("*.partial"))


def test_no_space_left(text, cache):
    # A limit on the size of files is the nearest to a full disk that needs no root.
    done = run(text, "full")
    assert done.returncode == RunFailed.exit_code, done.stderr
    assert "no space left for prepared data in" in done.stdout
    assert leftovers(cache) == []
    assert run(text, "").returncode == 0


def test_no_space_left_on_a_real_disk(text, tmp_path):
    # In a mount namespace of its own, which ends with the command.
    disk = tmp_path / "cache"
    disk.mkdir()
    shell = (
        'mount -t tmpfs -o size=28k none "$1" || exit 99\n'
        '"$2" -c "$3" "$4" ""; code=$?; find "$1" -type f -size +0; exit $code'
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", shell, "sh"]
    command += [str(disk), sys.executable, CODE, str(text)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        pytest.skip("unshare is missing (util-linux)")
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"mounting a small disk is not allowed: {done.stderr}")
    assert done.returncode == RunFailed.exit_code, done
    assert "(No space left on device)" in done.stdout
    left = [line for line in done.stdout.splitlines() if line.startswith(str(disk))]
    assert [line for line in left if "/known/" not in line] == []


def test_a_cache_that_can_not_be_written(text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"can't be written: Not a directory.*set XDG_CACHE_HOME"):
        prepare(config(text), lambda line: None)


def test_two_at_once_wait_for_each_other(text):
    working, waiting = threading.Event(), threading.Event()
    results, lines = {}, []

    def first_log(line):
        if line.startswith("tokenising"):
            working.set()
            assert waiting.wait(30)

    def second_log(line):
        lines.append(line)
        if "another process is preparing" in line:
            waiting.set()

    def first():
        results[1] = prepare(config(text), first_log)

    thread = threading.Thread(target=first)
    thread.start()
    assert working.wait(30)
    results[2] = prepare(config(text), second_log)
    thread.join()
    assert len(lines) == 1 and lines[0].endswith("waiting for it")
    assert results[1].manifest == results[2].manifest


def test_memory_does_not_grow_with_the_corpus(text, tmp_path):
    # The same paragraphs again and again: what a tokenizer counts grows with the different words.
    paragraphs = text.read_text()
    # One thread, and one arena, so that how memory is dealt out is the same each time.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}

    def peak(count):
        path = tmp_path / f"{count}.txt"
        path.write_text((paragraphs + "\n") * (count // 100))
        code = CODE.replace("400}", '400, "workers": 1}')
        code += "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        command = [sys.executable, "-c", code, str(path), ""]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return path.stat().st_size, int(done.stdout.split()[-1]) * 1024

    (small, low), (large, high) = peak(30_000), peak(120_000)
    assert large - small > 1e7
    # All at once would take more than 40 bytes for each byte of text; batches in flight and mapped
    # shards take what is allowed here.
    assert high - low < 4 * (large - small)


def test_the_data_of_default_settings_stays_the_same(text):
    # Checkpoints name it: a run goes on only with equal data.
    assert hashlib.sha256(text.read_bytes()).hexdigest().startswith("c1ceb7a57c487d88")
    manifest = prepare(config(text)).manifest
    assert manifest["digest"].startswith("c562d70415bf436d")
    assert manifest["tokenizer"]["sha256"].startswith("36e6c055fb2ac30a")


def small_batches(monkeypatch):
    monkeypatch.setattr(making, "_BATCH", 500)
    monkeypatch.setattr(making, "_SAVE_SECONDS", 0.0)


def test_the_same_bytes_for_any_number_of_workers(text, cache, monkeypatch):
    small_batches(monkeypatch)
    manifests = []
    for workers in (1, 2, 3):
        lines = []
        manifests.append(prepare(config(text, workers=workers), lines.append).manifest)
        processes = f" in {workers} processes" if workers > 1 else ""
        assert f"tokenising 100 documents{processes}" in lines
        subprocess.run(["rm", "-r", str(cache)], check=True)
    assert manifests[0] == manifests[1] == manifests[2]


KILLED = """
import os, signal, sys
import psutil
from horovod_lm.config import make_config
from horovod_lm.data import making
from horovod_lm.data.prepare import prepare
making._BATCH, making._SAVE_SECONDS = 500, 0.0
save, left = making.Making._save, [int(sys.argv[2])]
def kill(self, current):
    save(self, current)
    left[0] -= 1
    if not left[0]:
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
making.Making._save = kill
config = {"model": {"context": 16}, "data": eval(sys.argv[1])}
prepare(make_config(config, "test"), lambda line: None)
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("through", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_after_a_kill_it_goes_on_and_the_same_comes_out(text, cache, monkeypatch, workers, through):
    small_batches(monkeypatch)
    settings = config(text, workers=workers)
    save, saves = making.Making._save, []
    monkeypatch.setattr(
        making.Making, "_save", lambda self, current: saves.append(save(self, current))
    )
    expected = prepare(settings, lambda line: None).manifest
    number = max(1, round(through * len(saves)))
    for path in cache.iterdir():
        if path.is_dir() and path.name != "known":
            subprocess.run(["rm", "-r", str(path)], check=True)
    data = {"text": [str(text)], "vocabulary": 400, "workers": workers}
    command = [sys.executable, "-c", KILLED, repr(data), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    tokenised, lines = [], []
    encode = Tokenizer.encode_batch

    def count(self, batch):
        tokenised.extend(batch)
        return encode(self, batch)

    monkeypatch.setattr(Tokenizer, "encode_batch", count)
    prepared = prepare(settings, lines.append)
    assert "going on with what was left unfinished" in lines[0]
    assert prepared.manifest == expected
    assert {path.name for path in prepared.folder.iterdir()} == {
        "manifest.json", "tokenizer.json", "train-00000.tokens", "train.documents",
        "validation-00000.tokens", "validation.documents",
    }  # fmt: skip
    # Each time there were at least three documents.
    assert len(tokenised) <= 100 - 3 * (number - 2)
    ended_soon(map(int, done.stdout.split()))


def ended_soon(pids):
    for pid in pids:
        for _ in range(100):
            if not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie":
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {pid} goes on without the one that started it")


def test_unfinished_data_that_is_damaged_is_made_anew(text, cache, monkeypatch):
    small_batches(monkeypatch)
    expected = prepare(config(text), lambda line: None).manifest
    subprocess.run(["rm", "-r", str(cache)], check=True)
    data = {"text": [str(text)], "vocabulary": 400}
    command = [sys.executable, "-c", KILLED, repr(data), "15"]
    subprocess.run(command, capture_output=True, check=False, timeout=60)
    (shard,) = cache.glob("*.partial/train-00000.tokens")
    content = shard.read_bytes()
    shard.write_bytes(content[:20] + b"x" + content[21:])
    lines = []
    assert prepare(config(text), lines.append).manifest == expected
    assert not [line for line in lines if "going on" in line]


def test_a_worker_that_dies_is_told_and_what_is_done_is_kept(text, cache, monkeypatch):
    small_batches(monkeypatch)
    expected = prepare(config(text), lambda line: None).manifest
    subprocess.run(["rm", "-r", str(cache)], check=True)

    save, count = making.Making._save, [0]

    def kill_a_worker(self, current):
        save(self, current)
        count[0] += 1
        if count[0] == 10:
            psutil.Process().children()[0].kill()

    monkeypatch.setattr(making.Making, "_save", kill_a_worker)
    with pytest.raises(RunFailed, match=r"tokenises was ended by signal 9; what is done is kept"):
        prepare(config(text, workers=2), lambda line: None)
    assert not psutil.Process().children()
    lines = []
    assert prepare(config(text, workers=2), lines.append).manifest == expected
    assert "going on with what was left unfinished" in lines[0]


def test_several_sources(text, tmp_path):
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of another corpus"}) + "\n" for i in range(40))
    )
    prepared = prepare(
        make_config(
            {
                "model": {"context": 8},
                "data": {
                    "vocabulary": 400,
                    "sources": [
                        {"name": "book", "text": [str(text)], "weight": 3.0},
                        {"name": "lines", "text": [str(tmp_path / "more.jsonl")]},
                    ],
                },
            },
            "test",
        )
    )
    assert list(prepared.sources) == ["book", "lines"]
    book, lines = prepared.sources.values()
    assert (book.weight, lines.weight) == (3.0, 1.0)
    assert prepared.train is book.train["text"] and prepared.validation is book.validation["text"]
    assert documents(prepared, book.train["text"]) + documents(
        prepared, book.validation["text"]
    ) == text.read_text().strip().split("\n\n")
    assert documents(prepared, lines.validation["text"]) == [
        f"line {i} of another corpus" for i in (38, 39)
    ]


def test_parallel_text_is_two_streams_with_equal_numbers(tmp_path):
    english = [f"This is line {i} ." for i in range(60)]
    german = [f"Das ist Zeile {i} ." for i in range(60)]
    german[7] = " "
    (tmp_path / "train.en").write_text("\n".join(english))
    (tmp_path / "train.de").write_text("\n".join(german) + "\n")
    lines = []
    settings = config(tmp_path / "train.en", target=[str(tmp_path / "train.de")])
    prepared = prepare(settings, lines.append)
    source = prepared.sources["corpus"]
    assert list(source.train) == ["source", "target"] == list(source.validation)
    assert documents(prepared, source.train["source"]) == [*english[:7], *english[8:57]]
    assert documents(prepared, source.train["target"]) == [*german[:7], *german[8:57]]
    assert documents(prepared, source.validation["target"]) == german[57:]
    assert [line for line in lines if "1 empty document(s); first line 8: empty" in line]
    assert prepared.manifest["sources"][0]["left_out"][str(tmp_path / "train.de")]["empty"] == 1
    entropies = prepared.manifest["sources"][0]["unigram_entropy"]
    assert prepared.unigram_entropy == entropies["target"]


def test_broken_lines_stop_or_are_skipped_as_chosen(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": f"a document with the number {i}"}) for i in range(50)]
    rows[3], rows[20] = '{"text": "cut', '{"title": "no text"}'
    path.write_text("\n".join(rows))
    with pytest.raises(UserError) as caught:
        prepare(config(path), lambda line: None)
    assert str(caught.value).startswith(f"{path}, line 4: it is not JSON (")
    assert 'set data.on_error = "skip"' in str(caught.value)
    lines = []
    prepared = prepare(config(path, on_error="skip", context=8), lines.append)
    assert prepared.manifest["sources"][0]["documents"] == 48
    assert prepared.manifest["sources"][0]["left_out"][str(path)]["broken"] == 2
    (said,) = [line for line in lines if "left out" in line]
    assert "left out 2 broken place(s)" in said and "line 4: " in said and "line 21: " in said


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "characters"])
def test_every_kind_of_tokenizer(text, kind):
    prepared = prepare(config(text, tokenizer=kind, normalise=["nfkc", "lowercase"], sentinels=3))
    entry = prepared.manifest["tokenizer"]
    assert entry["kind"] == kind and entry["sentinels"] == 3
    steps = [step["type"] for step in entry["normaliser"]["normalizers"]]
    assert steps[:2] == ["NFKC", "Lowercase"]
    ids = prepared.train.read(0, len(prepared.train))
    assert (ids == prepared.tokenizer.end).sum() == len(prepared.train.documents)
    first = prepared.tokenizer.decode(ids[: int(prepared.train.documents[1]) - 1])
    assert first.replace(" ", "").startswith("number0:")


def test_a_tokenizer_of_ones_own(text, tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer.train([text.read_text()], 300, special=["mask"]).save(path)
    content = path.read_bytes() + b"\n"
    path.write_bytes(content)
    prepared = prepare(config(text, tokenizer=str(path)))
    assert (prepared.folder / "tokenizer.json").read_bytes() == content
    assert prepared.manifest["tokenizer"]["kind"] == "loaded"
    with pytest.raises(UserError, match=r"do not fit into data\.vocabulary = 257; set data\.voc"):
        prepare(config(text, tokenizer=str(path), vocabulary=257))
    with pytest.raises(UserError, match=r"missing\.json does not exist; give the path of a"):
        prepare(config(text, tokenizer=str(tmp_path / "missing.json")))
    with pytest.raises(UserError, match=r"text\.txt can't be read .*give a tokenizer\.json of"):
        prepare(config(text, tokenizer=str(text)))
    first = prepared.folder
    path.write_bytes(content + b"\n")
    assert prepare(config(text, tokenizer=str(path))).folder != first


def test_a_tokenizer_learns_from_evenly_chosen_documents_of_a_large_corpus(text, monkeypatch):
    monkeypatch.setattr(making, "_LEARNT", 5000)
    prepared = prepare(config(text))
    assert prepared.manifest["tokenizer"]["every"] == 3
    chosen = text.read_text().split("\n\n")[:95:3]
    Tokenizer.train(chosen, 400).save(text.with_name("expected.json"))
    expected = text.with_name("expected.json").read_bytes()
    assert (prepared.folder / "tokenizer.json").read_bytes() == expected


def test_a_bar_on_a_terminal(text, cache):
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", CODE, str(text), ""],
        stdout=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # the terminal's other side is closed
                break
            if not block:
                break
            shown += block
        assert process.wait() == 0
    os.close(ours)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "━" in shown and "100/100 documents" in shown
    assert "training a tokenizer of 400 ids on 95 documents" in shown


def test_plain_lines_in_a_log(text, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    prepare(config(text))
    shown = capsys.readouterr().out
    assert "━" not in shown
    assert "\ntokenising: 64 of 100 documents\n" in shown
