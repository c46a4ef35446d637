import hashlib
import os
import subprocess
import sys

import pytest

from horovod_lm.data import documents
from horovod_lm.data.documents import Corpus, file_digest, find_files
from horovod_lm.data.readers import Faults
from horovod_lm.errors import UserError
from tests.helpers import open_to_others


def whole(path, kind):
    """The documents of a file, pieces joined."""
    result, current = [], ""
    for text, ends, stream in Corpus((path,), kind).pieces():
        assert stream == 0
        current += text
        if ends:
            result.append(current)
            current = ""
    assert not current
    return result


TEXT = "\n\nOne\ntwo\n \t\n\nthree\r\n\r\n\r\n four \nfive"


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("paragraph", ["One\ntwo", "three", " four \nfive"]),
        ("line", ["One", "two", "three", " four ", "five"]),
        ("file", ["\n\nOne\ntwo\n \t\n\nthree\n\n\n four \nfive"]),
    ],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_what_a_document_is(tmp_path, kind, expected, bom, end):
    path = tmp_path / "text.txt"
    path.write_bytes(bom + (TEXT + end).encode())
    assert whole(path, kind) == expected


@pytest.mark.parametrize("kind", ["paragraph", "line", "file"])
@pytest.mark.parametrize("content", ["", "\n", " \n\n\t\n"])
def test_blanks_are_no_document(tmp_path, kind, content):
    path = tmp_path / "text.txt"
    path.write_text(content)
    assert whole(path, kind) == []


@pytest.mark.parametrize("kind", ["paragraph", "line", "file"])
@pytest.mark.parametrize("piece", [1, 3, 4, 5, 8, 11])
def test_large_documents_come_in_pieces(tmp_path, monkeypatch, kind, piece):
    text = "abcd\nefgh\nij\n\nkléö\n\n\nmnopqrstuvw\nx"
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    expected = whole(path, kind)
    monkeypatch.setattr(documents, "PIECE", piece)
    pieces = list(Corpus((path,), kind).pieces())
    assert max(len(text) for text, _, _ in pieces) <= 2 * piece
    # A piece boundary after a line feed keeps that line feed.
    assert [document.rstrip("\n") for document in whole(path, kind)] == expected


def test_files_come_from_files_folders_and_globs_once_and_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.md", ".hidden", ".git/x", "e[1].txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    def names(*patterns):
        found = find_files([str(tmp_path / pattern) for pattern in patterns])
        return [path.relative_to(tmp_path).as_posix() for path in found]

    assert names("b.txt", "a.txt") == ["b.txt", "a.txt"]
    assert names("") == ["a.txt", "b.txt", "deep/d.md", "deep/er/c.txt", "e[1].txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt", "e[1].txt"]
    assert names("deep", "*") == ["deep/d.md", "deep/er/c.txt", "a.txt", "b.txt", "e[1].txt"]
    assert names("e[1].txt") == ["e[1].txt"]


@pytest.mark.parametrize("pattern", ["missing.txt", "*.text", "empty"])
def test_a_pattern_without_a_file_is_refused(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r'no file matches ".*' + pattern.replace("*", r"\*")):
        find_files([str(tmp_path / pattern)])


@pytest.mark.parametrize(
    "content, offset, what",
    [
        (b"text\0more", 4, "a NUL byte"),
        (b"caf\xe9 au lait", 3, "byte 0xe9"),
        ("a\u00e9\u20ac".encode() + b"\xff", 6, "byte 0xff"),
        (b"\xff\xfea\0", 0, "byte 0xff"),  # UTF-16 with its mark
        (b"a\0b\0", 1, "a NUL byte"),  # and without
        (b"\xe2\x82", 0, "byte 0xe2"),
        (b"ok \xe2\x82", 3, "byte 0xe2"),
        (b"\xe2\x82\0", 0, "byte 0xe2"),
        (b"\xed\xa0\x80", 0, "byte 0xed"),  # a surrogate
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 3, 4, 1 << 20])
@pytest.mark.parametrize("kind", ["paragraph", "line", "file"])
def test_what_is_not_text_is_named_with_its_line_and_offset(
    tmp_path, monkeypatch, content, offset, what, piece, kind
):
    monkeypatch.setattr(documents, "PIECE", piece)
    path = tmp_path / "picture.png"
    path.write_bytes(b"one\ntwo\r\n" + content)
    with pytest.raises(
        UserError, match=rf"picture\.png, line 3: at byte {offset} of the line it has {what}"
    ):
        whole(path, kind)


@pytest.mark.parametrize("piece", [4, 1 << 20])
@pytest.mark.parametrize(
    "kind, expected",
    [
        ("paragraph", ["one\nthree", "five"]),
        ("line", ["one", "three", "five"]),
        ("file", ["one\nthree\n\nfive"]),
    ],
)
def test_broken_lines_are_left_out_and_counted(tmp_path, monkeypatch, kind, expected, piece):
    monkeypatch.setattr(documents, "PIECE", piece)
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\nt\xffo\nthree\n\n\0\nfive")
    faults = Faults(skip=True)
    found = "".join(
        text + "|" * ends for text, ends, _ in Corpus((path,), kind).pieces(faults)
    ).split("|")[:-1]
    assert [document.rstrip("\n") for document in found] == expected
    assert faults.found[path].broken == 2
    assert faults.found[path].first[1] == "line 5: at byte 0 of the line it has a NUL byte"


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_the_digest_is_of_the_bytes(tmp_path, monkeypatch, block):
    path = tmp_path / "text.txt"
    path.write_text("aé€\U0001f642 " * 5, encoding="utf-8")
    monkeypatch.setattr(documents, "_BLOCK", block)
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_pipes_and_dangling_links_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("pipe", "is not a regular file"), ("link", "can't be read: No such")):
        corpus = Corpus(find_files([str(tmp_path / name)]), "line")
        with pytest.raises(UserError, match=f"{name} {message}"):
            corpus.stamps()


@pytest.mark.parametrize("locked", ["text.txt", "folder"])
def test_what_may_not_be_read_is_named(tmp_path, locked):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner.txt").write_text("inner")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / locked).chmod(0)
    # In a process of its own, which gives up root's right to read everything.
    code = (
        "import os, sys\n"
        "from horovod_lm.data.documents import file_digest, find_files\n"
        "from horovod_lm.errors import UserError\n"
        "os.geteuid() or os.seteuid(65534)\n"
        "try:\n    [file_digest(path) for path in find_files([sys.argv[1]])]\n"
        "except UserError as error:\n    print(error)"
    )
    open_to_others(tmp_path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
    finally:
        (tmp_path / locked).chmod(0o755)
    assert f"{tmp_path / locked} can't be read: Permission denied" in done.stdout
