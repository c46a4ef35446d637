"""horovod_lm never imports a framework, not even inside a function."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "tensorflow", "keras", "horovod")
FILES = sorted((ROOT / "horovod_lm").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


IMPORT_ALL = """
import importlib, json, sys

modules, frameworks, block = json.loads(sys.argv[1])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in frameworks:
            raise ModuleNotFoundError(f"{name} is blocked by the test", name=name)

if block:
    sys.meta_path.insert(0, Blocker())
for module in modules:
    importlib.import_module(module)
print(json.dumps([name for name in frameworks if name in sys.modules]))
"""


@pytest.mark.parametrize("block", [True, False], ids=["frameworks blocked", "frameworks there"])
def test_every_module_imports_without_a_framework(block):
    modules = [module_name(path) for path in FILES if path.name != "__main__.py"]
    assert "horovod_lm.loop" in modules
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps([modules, FRAMEWORKS, block])],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == []


def imported(tree: ast.AST) -> list[str]:
    """The names of all modules that a source imports, also inside functions and by string."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and node.args:
                names.append(str(getattr(node.args[0], "value", "")))
    return names


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_no_source_names_a_framework_in_an_import(path):
    names = imported(ast.parse(path.read_text(encoding="utf-8")))
    forbidden = [
        n for n in names if n.partition(".")[0] in (*FRAMEWORKS, "torch_backend", "tf_backend")
    ]
    assert forbidden == []


def test_the_check_sees_every_form_of_import():
    source = """
def late():
    import torch.nn as nn
    from tensorflow import keras
    importlib.import_module("horovod.torch")
    __import__("keras")
"""
    assert imported(ast.parse(source)) == ["torch.nn", "tensorflow", "horovod.torch", "keras"]
