"""`horovod-lm doctor`: what is installed, what will go wrong, and the mend."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict

import click

from horovod_lm.checks import CHECKS, Check, Finding

_COLOURS = {"ok": "green", "note": "blue", "warning": "yellow", "error": "red"}


def examine(fix: bool = False, as_json: bool = False) -> int:
    """Run every check and print what it finds; with `fix`, do the safe mends and look again.

    Returns 0 if training would work, 1 if there is an error.
    """
    found: list[Finding] = []
    for check in CHECKS:
        new = _look(check, found, as_json)
        repairs = [finding.fix for finding in new if finding.fix]
        if fix and repairs and all(_repair(command) for command in repairs):
            new = _look(check, found, as_json)
        found += new
    errors = sum(finding.level == "error" for finding in found)
    if as_json:
        findings = [{**asdict(finding), "fix": list(finding.fix)} for finding in found]
        click.echo(json.dumps({"works": not errors, "findings": findings}, indent=2))
    else:
        _print_verdict(found, errors, fix)
    return 1 if errors else 0


def _look(check: Check, found: list[Finding], quiet: bool) -> list[Finding]:
    new = []
    for finding in check(found):
        new.append(finding)
        if not quiet:
            _print(finding)
    return new


def _repair(command: tuple[str, ...]) -> bool:
    """Run a fix, with its output on stderr, so that `--json` stays clean."""
    click.echo(f"         doing it: {' '.join(command)}", err=True)
    done = subprocess.run(command, stdout=sys.stderr.fileno()).returncode == 0
    importlib.invalidate_caches()
    return done


def _print(finding: Finding) -> None:
    level = f"{finding.level:8}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        level = click.style(level, fg=_COLOURS[finding.level])
    for name, text in ((level, finding.text), (" " * 8, finding.mend)):
        if text:
            first, *more = text.splitlines()
            head = f"{finding.check:12}" if text is finding.text else f"{'':10}->"
            click.echo(f"{name} {head} {first}")
            for line in more:
                click.echo(f"{'':22}{line}")
    sys.stdout.flush()


def _print_verdict(found: list[Finding], errors: int, fixed: bool) -> None:
    warnings = sum(finding.level == "warning" for finding in found)
    if not errors:
        verdict = "Training works here."
    else:
        verdict = f"Training would not work here: {errors} error{'s' * (errors > 1)}."
        if not fixed and any(finding.fix for finding in found):
            verdict += " horovod-lm doctor --fix mends what can be mended safely."
    if warnings:
        verdict += f" {warnings} warning{'s' * (warnings > 1)}."
    click.echo(f"\n{verdict}")
