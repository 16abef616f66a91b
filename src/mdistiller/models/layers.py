"""Layers of a model in order, its classifier, and its stages: for rates by layer and for freezing."""

from collections.abc import Iterable

from torch import nn

from mdistiller.errors import UnknownNameError
from mdistiller.models.external import tap_points

_NO_STAGES = ("last_map", "pooled")


def classifier_paths(model: nn.Module) -> tuple[str, ...]:
    """Returns the module paths of a model's classifier: two in models with a distillation token."""
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):  # timm's
        heads = get_classifier()
        heads = heads if isinstance(heads, tuple) else (heads,)
        found = tuple(path for path, m in model.named_modules() if any(m is head for head in heads))
        if any(True for path in found for _ in model.get_submodule(path).parameters()):
            return found
    pooled = tap_points(model).get("pooled")
    return () if pooled is None else (pooled.removesuffix(":input"),)


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """Maps the name of each parameter to the number of its layer.

    Layer 0 is the stem; each block of each stage is one layer, and the classifier is the last one. Layers
    between two blocks count with the next block, those behind the last block with the last one. A timm
    model keeps timm's own numbers (`group_matcher`). A model without known stages has two layers, the
    classifier and the rest.
    """
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        from timm.models import group_parameters

        return dict(group_parameters(model, matcher(coarse=False), reverse=True))
    order = _Order(model)
    stem = order.stages().get("stem")
    paths = block_paths(model)
    ends = [order.end(path) for path in paths]
    first = order.position[paths[0]] if paths else len(order.paths)
    stem_end = order.end(stem) if stem is not None else first - 1
    heads = classifier_paths(model)
    numbers = {}
    for name, _ in model.named_parameters():
        path = name.rpartition(".")[0]
        position = order.position[path]
        if any(_is_below(path, head) for head in heads):
            numbers[name] = len(ends) + 1
        elif not ends or position <= stem_end:
            numbers[name] = 0
        else:
            numbers[name] = 1 + next((i for i, end in enumerate(ends) if position <= end), len(ends) - 1)
    return numbers


def block_paths(model: nn.Module) -> list[str]:
    """Returns the module paths of the blocks of all stages, in order; none without known stages."""
    stages = _Order(model).stages()
    return [block for name, path in stages.items() if name != "stem" for block in _blocks(model, path)]


def undecayed(model: nn.Module) -> set[str]:
    """Returns the names of norms and biases (at most one dimension), and of what a model of timm lists so."""
    listed = getattr(model, "no_weight_decay", None)
    names = set(listed()) if callable(listed) else set()
    return names | {name for name, p in model.named_parameters() if p.ndim <= 1}


def parts(model: nn.Module, names: Iterable[str]) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """Returns the modules and the parameters in parts of a model.

    A name is canonical (`stem`, `stage1` …: all modules behind the stage before, up to the stage's end) or a
    module path (that module with all below it).

    Raises:
        UnknownNameError: the model has no such part.
    """
    order = _Order(model)
    stages = order.stages()
    chosen: set[int] = set()
    for name in names:
        if name in stages:
            position = list(stages).index(name)
            before = -1 if position == 0 else order.end(list(stages.values())[position - 1])
            chosen |= set(range(before + 1, order.end(stages[name]) + 1))
        elif name and name in order.position:
            chosen |= set(range(order.position[name], order.end(name) + 1))
        else:
            raise UnknownNameError("part", name, [*stages, *(path for path in order.paths if path)])
    modules = dict(model.named_modules())
    # A container that also holds what is behind the stage is no part of it; its own parameters are.
    whole = [modules[p] for p in order.paths if p and {order.position[p], order.end(p)} <= chosen]
    own = [p for i, path in enumerate(order.paths) if i in chosen for p in modules[path].parameters(False)]
    return whole, own


class _Order:
    """Positions of a model's modules in the order of registration; a module precedes all below it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = [path for path, _ in model.named_modules()]
        self.position = {path: i for i, path in enumerate(self.paths)}

    def end(self, path: str) -> int:
        """Returns the position of the last module in the module of a path."""
        return max(i for i, p in enumerate(self.paths) if _is_below(p, path))

    def stages(self) -> dict[str, str]:
        """Maps `stem`, `stage1` … to module paths; without a path of a stem, `stem` is left out."""
        table = {
            name: path.removesuffix(":input")
            for name, path in tap_points(self.model).items()
            if name not in _NO_STAGES and not name.endswith(".preact")
        }
        return table if all(path in self.position for path in table.values()) else {}


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _blocks(model: nn.Module, path: str) -> list[str]:
    """Returns the blocks of a stage: a container's children with parameters, or the stage itself."""
    stage = model.get_submodule(path)
    if not isinstance(stage, nn.Sequential | nn.ModuleList):
        return [path]
    children = [
        f"{path}.{name}" for name, child in stage.named_children() if any(True for _ in child.parameters())
    ]
    return children or [path]
