"""The two backends are twins: the same files, classes and functions in the same order, so that
they can be read side by side. Both are parsed, neither is imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKENDS = ("torch_backend", "tf_backend")

# What the frameworks or their ways force apart: TensorFlow's word → torch's word.
EQUIVALENTS = {
    "call": "forward",
    "reduce": "reduce_in_place",  # torch's buffers can be overwritten, a tf.Tensor cannot
}
# Keras makes its weights in build, and wants names and shapes; torch has no such thing.
EXEMPT_METHODS = {"build", "get_config"}
EXEMPT_ARGUMENTS = {"__init__": {"name"}}


def files(backend: str) -> set[str]:
    return {path.name for path in (ROOT / backend).glob("*.py")}


def arguments(function: ast.FunctionDef) -> list[str]:
    spec = function.args
    names = [a.arg for a in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]]
    exempt = EXEMPT_ARGUMENTS.get(function.name, set())
    return [name for name in names if name not in exempt]


def functions(body: list[ast.stmt]) -> list[tuple[str, list[str]]]:
    """Public functions (and constructors) in order, with the names of their arguments."""
    return [
        (EQUIVALENTS.get(node.name, node.name), arguments(node))
        for node in body
        if isinstance(node, ast.FunctionDef)
        and node.name not in EXEMPT_METHODS
        and (not node.name.startswith("_") or node.name == "__init__")
    ]


def classes(path: Path) -> dict[str, ast.ClassDef]:
    """Public classes in order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }


PAIRS = sorted(files("torch_backend") | files("tf_backend"))


def test_the_same_files():
    assert files("torch_backend") == files("tf_backend")


@pytest.fixture(params=PAIRS)
def pair(request) -> tuple[Path, Path]:
    paths = tuple(ROOT / backend / request.param for backend in BACKENDS)
    for path in paths:
        assert path.exists(), f"{path.relative_to(ROOT)} has no twin of this name"
    return paths


def test_the_same_functions_in_the_same_order(pair):
    one, two = (functions(ast.parse(path.read_text(encoding="utf-8")).body) for path in pair)
    assert one == two


def test_the_same_classes_in_the_same_order(pair):
    one, two = (list(classes(path)) for path in pair)
    assert one == two


def test_the_same_methods_in_the_same_order(pair):
    one, two = (
        {name: functions(node.body) for name, node in classes(path).items()} for path in pair
    )
    for name in one.keys() & two.keys():
        assert one[name] == two[name], name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("protocol", ["Communicator", "Engine", "Backend"])
def test_the_protocol_is_fulfilled(backend, protocol):
    wanted = functions(classes(ROOT / "horovod_lm" / "backend.py")[protocol].body)
    found = dict(functions(classes(ROOT / backend / f"{protocol.lower()}.py")[protocol].body))
    for name, names in wanted:
        assert found.get(name) == names, name
