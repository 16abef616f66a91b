"""Branches of a dense detector's head, cut after one of their convolutions."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError

BRANCHES = ("classification_head", "regression_head")


def _layers(branch: nn.Module) -> list[nn.Module]:
    """Lists the layers of a branch's `conv`, in the order in which they run."""
    return [module for module in branch.get_submodule("conv").modules() if not list(module.children())]


def _cut(layers: list[nn.Module], hold: int) -> int:
    """Returns the position of the activation behind a convolution."""
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    if not 1 <= hold <= len(places):
        raise ConfigError(f"method.hold: got {hold}; allowed in these detectors: 1 to {len(places)}")
    return places[hold - 1]


@contextmanager
def held_maps(head: nn.Module, hold: int) -> Iterator[dict[str, list[Tensor]]]:
    """Context that records each branch's maps, level after level, before the activation of a convolution.

    Raises:
        ConfigError: the branches have fewer convolutions.
    """
    maps: dict[str, list[Tensor]] = {name: [] for name in BRANCHES}
    with ExitStack() as hooks:
        for name, found in maps.items():
            layers = _layers(head.get_submodule(name))
            # A copy, because the activation may work in place.
            keep = lambda module, args, found=found: found.append(args[0].clone())  # noqa: E731
            hooks.enter_context(layers[_cut(layers, hold)].register_forward_pre_hook(keep))
        yield maps


def rest_of_head(branch: nn.Module, hold: int) -> nn.Module:
    """Returns a branch that takes the maps of `held_maps`; it shares all weights."""
    layers = _layers(branch)
    rest = copy.copy(branch)
    rest._modules = dict(branch._modules)
    rest.conv = nn.Sequential(nn.ReLU(), *layers[_cut(layers, hold) + 1 :])
    return rest


def align_scale(student: Tensor, teacher: Tensor) -> Tensor:
    """Gives each channel of a map the mean and the deviation of the teacher's, over batch and positions.

    Raises:
        ConfigError: maps of different channels or sizes.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"the heads of student and teacher must have maps of one shape; got {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    (variance, mean), (their_variance, their_mean) = (
        torch.var_mean(x, dim=(0, 2, 3), keepdim=True) for x in (student, teacher)
    )
    scale = (their_variance + 1e-12).sqrt() / (variance + 1e-12).sqrt()
    return (student - mean) * scale + their_mean
