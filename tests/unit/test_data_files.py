"""Which files patterns stand for, where links and odd names are about."""

import pytest

from horovod_lm.data.documents import find_files


@pytest.fixture
def names(tmp_path):
    def find(*patterns):
        found = find_files([str(tmp_path / pattern) for pattern in patterns])
        return [path.relative_to(tmp_path).as_posix() for path in found]

    return find


@pytest.fixture(autouse=True)
def tree(tmp_path):
    for name in ("a/one.txt", "a/deep/two.txt", "elsewhere/three.txt", "a[1]/b*/four.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_a_file_counts_once_by_whatever_name(tmp_path, names):
    (tmp_path / "a" / "link.txt").symlink_to("one.txt")
    assert names("a") == ["a/deep/two.txt", "a/link.txt"]
    assert names("a/one.txt", "a/deep/../one.txt", "a/link.txt") == ["a/one.txt"]
    assert names("a/link.txt", "a/*.txt") == ["a/link.txt"]


def test_links_to_folders_are_followed(tmp_path, names):
    (tmp_path / "a" / "more").symlink_to(tmp_path / "elsewhere")
    assert names("a") == ["a/deep/two.txt", "a/more/three.txt", "a/one.txt"]
    assert names("a/**/*.txt") == names("a")
    (tmp_path / "start").symlink_to(tmp_path / "a")
    assert names("start") == ["start/deep/two.txt", "start/more/three.txt", "start/one.txt"]


def test_links_that_lead_back_are_no_endless_way(tmp_path, names):
    (tmp_path / "a" / "deep" / "back").symlink_to(tmp_path / "a")
    assert sorted(names("a")) == ["a/deep/two.txt", "a/one.txt"]
    assert len(names("a/**/*.txt")) == 2


def test_a_folder_with_brackets_in_its_name(tmp_path, names):
    assert names("a[1]/b*/*.txt") == ["a[1]/b*/four.txt"]
    assert names("a[1]/**/*.txt") == ["a[1]/b*/four.txt"]
    assert names("a[1]/b[*]/four.txt") == ["a[1]/b*/four.txt"]
    assert names("[a-b]/*.txt") == ["a/one.txt"]


def test_patterns_may_be_relative(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path / "a")
    for pattern in ("*.txt", "./*.txt", "deep/../*.txt", "../a/*.txt"):
        (found,) = find_files([pattern])
        assert found.is_absolute() and found.samefile("one.txt")
