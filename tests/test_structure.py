"""Imports go downwards only, and the public names stay."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from loss_checks import signature

import mdistiller
from mdistiller import functional
from mdistiller.methods import get_method, list_methods

SOURCE = Path(mdistiller.__file__).parent

# Of the package's parts, lowest first. A part imports from its own layer or from lower ones.
LAYERS = [
    {"errors", "types"},
    {"models", "data", "taps"},
    {"methods", "functional"},
    {"engine", "detection"},
    {"recipes", "analysis"},
    {"cli"},
]
# The package's own face and the entry point see everything.
ABOVE = {"__init__", "__main__"}


def layer(part):
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mdistiller"):
            names = (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module == "mdistiller"
                else [node.module]
            )
            yield from names
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("mdistiller"))


def part(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if part(path) not in ABOVE]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_downwards(path):
    own = layer(part(path))
    for name in imports(path):
        parts = name.split(".")
        if parts[1] == "__version__":
            continue
        assert layer(parts[1]) <= own, f"{path} imports {name}"


def test_files_are_short_enough_to_read():
    assert not [str(p) for p in SOURCE.rglob("*.py") if len(p.read_text().splitlines()) > 450]


def test_every_loss_has_its_signature_pinned_and_its_shapes_checked():
    tests = "".join(
        path.read_text() for path in sorted((Path(__file__).parent / "methods").glob("test_*.py"))
    )
    for name in functional.__all__:
        assert re.search(rf'check_signature\(\s*"{name}"', tests), name
        assert re.search(rf'check_shapes\(\s*"{name}"', tests) or name == "ofd_margin", name


def test_public_names_stay():
    assert set(mdistiller.__all__) >= {
        "Distiller",
        "Method",
        "MethodConfig",
        "create_model",
        "register_method",
        "tap",
    }
    assert all(hasattr(mdistiller, name) for name in mdistiller.__all__)
    assert mdistiller.__all__ == sorted(mdistiller.__all__)
    assert functional.__all__ == sorted(functional.__all__)
    assert signature(mdistiller.tap) == "(model, names)"
    assert list(inspect.signature(mdistiller.Distiller).parameters)[:3] == ["student", "teacher", "method"]
    assert list(inspect.signature(mdistiller.create_model).parameters)[:2] == ["name", "num_classes"]


BUILT_IN = [n for n in list_methods() if get_method(n).__module__.startswith("mdistiller.")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_says_what_it_is_and_documents_its_fields(name):
    method = get_method(name)
    assert method.__doc__
    assert method.paper
    card = Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md"
    assert card.is_file()
    for field in method.Config.model_fields:
        assert f"`{field}`" in card.read_text(), f"{card} does not explain {field}"
