"""Compares every loss with its authors' code: values and the student's gradients on equal random inputs.

    python benchmarks/official_losses.py --references DIR --clone | sh     # clones what is missing in DIR
    python benchmarks/official_losses.py --references DIR --out results/official_losses

DIR holds one clone per repository, named OWNER+NAME or NAME. The commits are those of
src/mdistiller/recipes/published/sources.toml; `OTHERS` names the repositories that no recipe comes from. The
cases, with their settings and inputs, are in official_cases.py.

The authors' file is imported by its path. Packages around the loss that are not installed (mmcv, yacs) become
stubs; the loss and the layers that it trains never do. Without a GPU, `.cuda()` returns its tensor. Inputs
are float64 where the authors' code allows it. A relative difference is the largest absolute difference over
the largest absolute value of the authors'. Exit status 1: a difference above 1e-10 in float64 or 1e-5 in
float32, or above the bound that its row states with the reason; an authors' file that does not run; no clone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.util
import io
import json
import subprocess
import sys
import tomllib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from official_cases import CASES, NOT_COMPARED, Case
from torch import Tensor

from mdistiller.runs.environment import environment

BOUNDS = {"float64": 1e-10, "float32": 1e-5}
# Repositories that are no source of recipes.
OTHERS = {
    "CRLD": "arcaninez/CRLD@fe42473",
    "OFA": "Hao840/OFAKD@f7bb896",
    "DeiT": "facebookresearch/deit@7e160fe",
    "SRD": "roymiles/Simple-Recipe-Distillation@31e8477",
    "SRRL": "jingyang2017/KD_SRRL@d2e802f",
    "L2D": "penghui-yang/L2D@ea7fa55",
    "CWD": "irfanICMLL/TorchDistiller@78bac7c",
    "SKD": "irfanICMLL/structure_knowledge_distillation@ce208e1",
    "CIRKD": "winycg/CIRKD@dab64db",
    "MGD": "yzd-v/MGD@2c9da0b",
    "FGD": "yzd-v/FGD@c03a6cf",
    "PKD": "open-mmlab/mmrazor@90c7af1",
    "CrossKD": "jbwang1997/CrossKD@87e156a",
    "BCKD": "TinyTigerPan/BCKD@121c9aa",
}
# Packages that files of losses import for other purposes; those that are not installed become stubs.
AROUND = (
    "mmcls",
    "mmcv",
    "mmdet",
    "mmengine",
    "mmrazor",
    "six",
    "tensorboardX",
    "timm",
    "tqdm",
    "turtle",
    "yacs",
)
STUBS = tuple(name for name in AROUND if importlib.util.find_spec(name) is None)


class Anything:
    """Value of any name in a stub: a decorator that returns what it gets, a registry, an empty base class."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        return given[0] if len(given) == 1 and not options and callable(given[0]) else self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Stub(ModuleType):
    """Stub of a package around a loss, and of all modules in it."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stub for every module of `STUBS`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STUBS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def clone_first(root: Path) -> Iterator[None]:
    """Context in which imports find stubs and the clone's own modules; its end forgets them."""
    before, finder = set(sys.modules), StubFinder()
    sys.path.insert(0, str(root))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.path.remove(str(root))
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            if (
                isinstance(module, Stub)
                or str(getattr(module, "__file__", None) or "").startswith(str(root))
                or name.startswith("_authors")
            ):
                del sys.modules[name]


def load(root: Path, file: str) -> ModuleType:
    """Imports a file of a clone; relative imports work, and no `__init__.py` above it runs."""
    name = "_authors"
    with clone_first(root), contextlib.redirect_stdout(io.StringIO()):
        folder = root
        for part in ("", *Path(file).parent.parts):
            folder, name = folder / part, f"{name}.{part}" if part else name
            package = ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
        return importlib.import_module(f"{name}.{Path(file).stem}")


def repositories() -> dict[str, str]:
    """Returns OWNER/NAME@COMMIT of each repository by its short name."""
    text = (files("mdistiller.recipes.published") / "sources.toml").read_text()
    return {**tomllib.loads(text)["repositories"], **OTHERS}


def clone_of(references: Path, source: str) -> Path | None:
    """Returns the folder of a clone."""
    owner, name = source.split("@")[0].split("/")
    return next((p for p in (references / f"{owner}+{name}", references / name) if p.is_dir()), None)


def commit_of(root: Path) -> str:
    """Returns the commit of a clone, seven digits, or `unknown`."""
    command = ["git", "-C", str(root), "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True) if (root / ".git").exists() else None
    return done.stdout.strip() if done and done.returncode == 0 else "unknown"


def flat(given: Any) -> Iterator[Tensor]:
    """Yields the tensors of nested sequences."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Sequence):
        for part in given:
            yield from flat(part)


def difference(theirs: Tensor, ours: Tensor) -> float:
    """Returns the largest absolute difference over the largest absolute value of theirs; NaN counts."""
    largest = (theirs - ours).abs().max() / theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)
    return largest.nan_to_num(nan=float("inf")).item()


class Row(NamedTuple):
    """Row of the table; `gradient` is None for a comparison without one."""

    method: str
    source: str
    function: str
    dtype: str
    value: float
    gradient: float | None
    inputs: int
    bound: float
    note: str

    @property
    def passed(self) -> bool:
        """Whether value and gradient are within the bound."""
        return max(self.value, self.gradient or 0.0) <= self.bound


def compare(case: Case, root: Path, source: str) -> Row:
    """Runs both losses on every input of a case."""
    torch.set_default_dtype(getattr(torch, case.dtype))
    torch.manual_seed(0)
    official = getattr(load(root, case.file), case.function)
    if case.also:
        file, function = case.also.split(":")
        official = official, getattr(load(root, file), function)
    values, gradients = [], []
    for given in case.inputs():
        students = [x for x in flat(given) if x.requires_grad]
        with contextlib.redirect_stdout(io.StringIO()):  # the authors' code prints
            theirs, ours = case.run(official, *given)
        values.append(difference(theirs.detach(), ours.detach().reshape(theirs.shape)))
        if theirs.requires_grad:
            pair = [torch.autograd.grad(x.sum(), students, materialize_grads=True) for x in (theirs, ours)]
            gradients += [difference(a, b) for a, b in zip(*pair, strict=True)]
    where = f"{source.split('@')[0]}@{commit_of(root)}:{case.file}"
    bound = BOUNDS[case.dtype] if case.bound is None else case.bound
    largest = max(gradients) if gradients else None
    function = ", ".join(filter(None, (case.function, case.also)))
    return Row(case.method, where, function, case.dtype, max(values), largest, len(values), bound, case.note)


def write_table(rows: Sequence[Row], left: dict[str, str]) -> str:
    """Returns the table in Markdown, and after it the methods without a comparison."""
    lines = ["| method | authors' code | function | value | gradient | dtype | settings and notes |"]
    lines.append("| --- | --- | --- | ---: | ---: | --- | --- |")
    for r in rows:
        gradient = "–" if r.gradient is None else f"{r.gradient:.0e}"
        notes = "; ".join(filter(None, [r.note, "" if r.passed else f"**above {r.bound:.0e}**"]))
        numbers = f"{r.value:.0e} | {gradient} | {r.dtype}"
        lines.append(f"| `{r.method}` | `{r.source}` | `{r.function}` | {numbers} | {notes} |")
    lines += ["", "Not compared:", "", *(f"- `{method}`: {why}" for method, why in left.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compares all cases, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--references", type=Path, required=True, help="folder of the authors' repositories")
    parser.add_argument("--out", type=Path, help="folder for table.json and table.md")
    parser.add_argument("--methods", nargs="*", help="only these methods")
    parser.add_argument("--clone", action="store_true", help="print the commands that clone what is missing")
    given = parser.parse_args()
    sources = repositories()
    cases = [case for case in CASES if not given.methods or case.method in given.methods]
    if given.clone:
        for name in dict.fromkeys(case.repository for case in cases):
            repository, commit = sources[name].split("@")
            folder = given.references / repository.replace("/", "+")
            if clone_of(given.references, sources[name]) is None:
                print(
                    f"git clone https://github.com/{repository} {folder} && git -C {folder} checkout {commit}"
                )
        return
    warnings.simplefilter("ignore")  # the authors' code uses deprecated arguments
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *given, **options: self  # type: ignore[method-assign]
    rows: list[Row] = []
    left: dict[str, str] = {} if given.methods else dict(NOT_COMPARED)
    failed = False
    for case in cases:
        root = clone_of(given.references, sources[case.repository])
        if root is None:
            left[case.method] = f"no clone of {sources[case.repository]} in the folder"
            continue
        try:
            rows.append(compare(case, root.resolve(), sources[case.repository]))
        except Exception as error:
            traceback.print_exc()
            left[case.method] = f"{case.file} of {sources[case.repository]} failed: {error}"
            failed = True
    table = write_table(rows, left)
    print(table)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        env = environment(0)
        del env["command"]  # it has paths; how to run this is in the first lines
        result = {"environment": env, "bounds": BOUNDS, "rows": [row._asdict() for row in rows], "left": left}
        (given.out / "table.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        (given.out / "table.md").write_text(table)
    sys.exit(failed or not rows or not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
