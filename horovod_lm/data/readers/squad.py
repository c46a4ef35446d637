"""SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018), as distributed: one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from horovod_lm.data.readers import Faults, Record, reading, unfit
from horovod_lm.errors import UserError

FIELDS = ("id", "title", "context", "question", "answer", "impossible")
_LARGEST = 2**28  # bytes: it is read whole


def read(path: Path, fields: tuple[str, ...], faults: Faults) -> Iterator[Record]:
    """By default every context once. With fields of questions, a record for each question, with the
    first one of its answers; "answer" is empty, and "impossible" is "true", where SQuAD 2.0 has
    none."""
    fields = fields or ("context",)
    wrong = [name for name in fields if name not in FIELDS]
    if wrong:
        raise UserError(
            f'data.fields: SQuAD has no "{wrong[0]}"; it has '
            + ", ".join(f'"{name}"' for name in FIELDS)
        )
    questions = not {"title", "context"}.issuperset(fields)
    number = 0
    for article in _articles(path):
        for paragraph in _paragraphs(article):
            number += 1
            try:
                common = {"title": article.get("title", ""), "context": paragraph["context"]}
                found = list(paragraph["qas"]) if questions else [None]
            except (KeyError, TypeError, AttributeError):
                faults.broken(path, f"paragraph {number}", 'it lacks its "context" or "qas"')
                continue
            for entry in found:
                place = f"paragraph {number}"
                try:
                    record = dict(common)
                    if entry is not None:
                        place = f"question {entry['id']} of {place}"
                        record |= _question(entry, paragraph["context"])
                    record = {name: record[name] for name in fields}
                    reasons = [r for text in record.values() if (r := unfit(text))]
                    if reasons:
                        raise ValueError(f"it has {reasons[0]}")
                except (KeyError, TypeError, AttributeError, IndexError):
                    faults.broken(path, place, "it is not as SQuAD has it")
                except ValueError as error:
                    faults.broken(path, place, str(error))
                else:
                    yield Record(place, record)


def _paragraphs(article: Any) -> list[Any]:
    paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
    return paragraphs if isinstance(paragraphs, list) else [None]


def _articles(path: Path) -> list[Any]:
    with reading(path) as stream:
        text = stream.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise UserError(f"{path} is larger than {_LARGEST:,} bytes, too large for a file of SQuAD")
    try:
        values = json.loads(text.decode("utf-8-sig"))
        articles = values["data"]
        if not isinstance(articles, list):
            raise TypeError
        return articles
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is at fault") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: it is not JSON (column {error.colno}: {error.msg})"
        ) from None
    except (KeyError, TypeError, RecursionError):
        raise UserError(f'{path} is not as SQuAD is: an object with a list "data"') from None


def _question(entry: dict[str, Any], context: str) -> dict[str, str]:
    answers, impossible = entry["answers"], entry.get("is_impossible", False)
    answer = "" if impossible else answers[0]["text"]
    start = 0 if impossible else answers[0]["answer_start"]
    if context[start : start + len(answer)] != answer:
        raise ValueError(f"its answer {answer!r:.80} is not at character {start} of its context")
    return {
        "id": entry["id"],
        "question": entry["question"],
        "answer": answer,
        "impossible": "true" if impossible else "false",
    }
