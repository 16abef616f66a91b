"""The structure of the package: imports, public names, and the files that name a method."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loss_checks import signature

import mdistiller
from mdistiller import functional
from mdistiller.methods import get_method, list_methods, method_config, registry

SOURCE = Path(mdistiller.__file__).parent
ROOT = Path(__file__).parents[1]

# The package's parts, lowest first. A part imports from its own layer or from lower ones.
LAYERS = [
    {"errors", "types", "settings", "seeding"},
    {"models", "data", "taps"},
    {"methods", "functional"},
    {"checks", "config", "distiller", "losses", "stored", "teacher"},
    {"runs"},
    {"training"},
    {"recipes"},
    {"report"},
    {"tasks"},
    {"deploy"},
    {"api", "arguments"},
    {"integrations"},
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


TASKS = {path.parent.name for path in (SOURCE / "tasks").glob("*/__init__.py")}
ABOVE_TASKS = [path for path in FILES if part(path) in ("recipes", "cli")]


@pytest.mark.parametrize("path", ABOVE_TASKS, ids=lambda p: str(p.relative_to(SOURCE)))
def test_recipes_and_commands_name_no_task(path):
    tree = ast.parse(path.read_text())
    assert not [name for name in imports(path) if name.startswith("mdistiller.tasks.")]
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not texts & TASKS


def module_of(path):
    return ".".join(["mdistiller", *path.relative_to(SOURCE).with_suffix("").parts])


def test_no_import_is_circular():
    """Of imports that run when a module is imported, without the packages' own `__init__`."""
    edges = {module_of(path): set() for path in FILES if path.name != "__init__.py"}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and module_of(path) in edges:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                edges[module_of(path)] |= set(names) & edges.keys()
    while leaves := {name for name, found in edges.items() if not found}:
        edges = {name: found - leaves for name, found in edges.items() if name not in leaves}
    assert not edges


def test_files_are_short_enough_to_read():
    assert not [str(p) for p in SOURCE.rglob("*.py") if len(p.read_text().splitlines()) > 450]


PUBLIC = [
    "Batch",
    "DataInfo",
    "DetectionDistiller",
    "DetectorAdapter",
    "DetectorPass",
    "Distiller",
    "ImageSet",
    "Level",
    "Method",
    "MethodConfig",
    "Metric",
    "Outputs",
    "Run",
    "RunConfig",
    "Splits",
    "StoredTeacher",
    "Task",
    "create_model",
    "distill",
    "get_recipe",
    "list_methods",
    "list_models",
    "list_recipes",
    "load_export",
    "load_student",
    "register_dataset",
    "register_detector",
    "register_method",
    "register_model",
    "register_task",
    "save_student",
    "tap",
    "train",
]


def test_public_names_stay():
    assert mdistiller.__all__ == PUBLIC
    assert all(hasattr(mdistiller, name) for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(mdistiller))
    assert functional.__all__ == sorted(functional.__all__)
    assert signature(mdistiller.tap) == "(model, names)"
    assert list(inspect.signature(mdistiller.Distiller).parameters)[:3] == ["student", "teacher", "method"]
    assert list(inspect.signature(mdistiller.create_model).parameters)[:2] == ["name", "num_classes"]
    assert signature(mdistiller.train) == "(config, *, resume=False, reporter=None, plugins=(), **changes)"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mdistiller.nothing


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.py")),
]


def test_pages_import_from_the_top():
    """From submodules only where a page is about the inside: decisions, and own methods with their parts."""
    allowed = r"from mdistiller\.(functional|integrations|methods|errors|taps|types|models)\b"
    for page in PAGES:
        if "decisions" in page.parts:
            continue
        for line in page.read_text().splitlines():
            if re.match(r"\s*(from|import) mdistiller\.", line):
                is_public = "functional" in line or "integrations" in line
                assert page.suffix == ".py" or is_public, f"{page}: {line}"
                assert re.match(r"\s*" + allowed, line), f"{page}: {line}"


def test_functional_needs_torch_pydantic_and_jaxtyping_only():
    blocked = ("torchvision", "timm", "sklearn", "scipy", "rich", "safetensors", "PIL")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "from mdistiller.functional import dkd_loss\nimport torch\n"
    code += "print(dkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1])).item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0.0\n"), done.stderr


def test_it_imports_and_locks_folders_without_fcntl(tmp_path):
    code = "import sys\nsys.modules['fcntl'] = None\nimport mdistiller\n"
    code += "[getattr(mdistiller, name) for name in mdistiller.__all__]\n"
    code += "from pathlib import Path\nfrom mdistiller.runs.lock import FolderLock\n"
    code += f"FolderLock(Path({str(tmp_path)!r})).release()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


BUILT_IN = [n for n in list_methods() if get_method(n).__module__.startswith("mdistiller.")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_says_what_it_is_and_documents_its_fields(name):
    method = get_method(name)
    assert method.__doc__
    assert method.card.paper
    card = Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md"
    assert card.is_file()
    for field in method_config(name).field_infos():
        assert f"`{field}`" in card.read_text(), f"{card} does not explain {field}"


# Files that name a method

FREE = {"kd", "dkd", "none"}
# Methods that stand for a kind of method in other tests and in the documentation.
EXAMPLES = {
    "at": "features, without layers",
    "binary_kd": "images of several classes",
    "crd": "a memory of all images",
    "fitnet": "features, with layers, also of detectors",
    "lskd": "a wrapper",
    "mlkd": "two views",
    "reviewkd": "features with a schedule, also of detectors",
    "simkd": "an extended student",
    "tokens": "features without labels",
}
# The tables of papers, and what they consist of; pages about all methods; pages that `make docs` writes.
TABLES = ("src/mdistiller/recipes/", "tests/recipes/", "docs/results/", "docs/experiments.md")
TABLES += ("src/mdistiller/cli/reproduce.py", "src/mdistiller/tasks/classification/")
TABLES += (
    "tests/methods/test_promises.py",
    "benchmarks/official_cases.py",
    "docs/choosing.md",
    "docs/migration.md",
    "docs/generated/",
)


def repository():
    folders = ("src", "tests", "docs", "examples", "benchmarks")
    files = [f for folder in folders for kind in ("py", "md") for f in (ROOT / folder).rglob(f"*.{kind}")]
    for file in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        name = file.relative_to(ROOT).as_posix()
        if file.is_file() and not name.startswith(TABLES) and file != Path(__file__):
            yield name, file.read_text()


def names_in(text):
    """Identifiers, and the parts of quoted names such as `lskd-dkd+at` or "cifar100.dkd.vgg13_vgg8"."""
    quoted = re.findall(r"[\"'`]([\w.+\-/=]+)[\"'`]", text)
    parts = {part for name in quoted for part in re.split(r"[+\-.]", name)}
    return parts, set(re.findall(r"\w+", text))


def test_a_built_in_method_is_named_in_five_files_beside_its_own_three():
    found = {file: names_in(text) for file, text in repository()}
    losses = {name: getattr(functional, name).__module__ for name in functional.__all__}
    for name in set(BUILT_IN) - FREE - set(EXAMPLES):
        method = registry._METHODS[name]
        module = inspect.getmodule(method.Config).__name__
        identifiers = {method.Config.__name__, *(loss for loss, home in losses.items() if home == module)}
        own = {
            f"src/{module.replace('.', '/')}.py",
            f"tests/methods/test_{name}.py",
            f"docs/methods/{name}.md",
        }
        named = {f for f, (parts, words) in found.items() if name in parts or identifiers & words} - own
        assert len(named) <= 5, f"{name}: {sorted(named)}"
        assert all((ROOT / file).is_file() for file in own), name
