"""What feature methods share: which taps they read by default, their shapes, and tokens as maps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Method, MethodConfig, promote
from mdistiller.models.external import tap_points
from mdistiller.taps import probe
from mdistiller.types import DataInfo, Outputs


class FeatureConfig(MethodConfig):
    """Settings that every feature method has."""

    student_taps: tuple[str, ...] = Field(default=())
    """What is read from the student, shallow to deep: canonical names or module paths. Empty: the method's
    own choice."""
    teacher_taps: tuple[str, ...] = Field(default=())
    """What is read from the teacher, one for each of the student's. Empty: the method's own choice."""


class FeatureMethod(Method):
    """A method that compares the student's features with the teacher's, pair by pair.

    A subclass may override `default_taps`. `student_shapes` and `teacher_shapes` hold the shapes of the
    features, for a batch of two, as `read` gives them.
    """

    kind: ClassVar[Literal["task", "logit", "feature", "relation"]] = "feature"
    config: FeatureConfig

    def __init__(
        self, config: FeatureConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        assert teacher is not None
        self.student_taps, self.teacher_taps = config.student_taps, config.teacher_taps
        if not (self.student_taps and self.teacher_taps):
            defaults = self.default_taps(student, teacher)
            self.student_taps = self.student_taps or defaults[0]
            self.teacher_taps = self.teacher_taps or defaults[1]
        if len(self.student_taps) != len(self.teacher_taps):
            raise ConfigError(
                f"method {self.name!r} compares features in pairs; got student_taps "
                f"{list(self.student_taps)} and teacher_taps {list(self.teacher_taps)}"
            )
        probed = (
            probe(student, self.student_taps, data.input_shape),
            probe(teacher, self.teacher_taps, data.input_shape),
        )
        student_features, teacher_features = self.read(*probed)
        self.student_shapes = [tuple(f.shape) for f in student_features]
        self.teacher_shapes = [tuple(f.shape) for f in teacher_features]

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The stages of both models, matched; or as a subclass likes."""
        return match_stages(student, teacher)

    def read(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """The tapped features of both, in order; tokens as maps."""
        return (
            [as_map(student.features[name]) for name in self.student_taps],
            [as_map(teacher.features[name]) for name in self.teacher_taps],
        )


def stages(model: nn.Module, suffix: str = "") -> tuple[str, ...]:
    """The canonical names `stage1` …, each with `suffix` ("" or ".preact"), that a model has.

    Raises:
        ConfigError: it has none.
    """
    pattern = re.compile(r"stage\d+" + re.escape(suffix))
    names = tuple(name for name in tap_points(model) if pattern.fullmatch(name))
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no tap named stageN{suffix}: name module paths in "
            "method.student_taps and method.teacher_taps"
        )
    return names


def preactivations(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Of each stage the tap before its last ReLU, if the model has one, else the stage itself."""
    points = tap_points(model)
    return tuple(f"{name}.preact" if f"{name}.preact" in points else name for name in names)


def spread(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """At most `count` of the names, evenly spaced, the last always among them."""
    count = min(count, len(names))
    return tuple(names[math.ceil((i + 1) * len(names) / count) - 1] for i in range(count))


def match_stages(
    student: nn.Module, teacher: nn.Module, suffix: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As many stages of each as the shallower one has, evenly spaced in the deeper, the last always there.

    So three stages meet the blocks 4, 8 and 12 of a transformer of twelve.
    """
    both = stages(student, suffix), stages(teacher, suffix)
    count = min(map(len, both))
    return spread(both[0], count), spread(both[1], count)


def as_map(feature: Tensor) -> Tensor:
    """A feature as [B, C, H, W] or [B, D].

    Tokens [B, N, C] become a square map, without what precedes the patches (class and register tokens);
    [B, H, W, C] with H = W ≠ C (Swin) is turned around.
    """
    if feature.ndim == 3:
        side = math.isqrt(feature.shape[1])
        patches = feature[:, feature.shape[1] - side * side :]
        return patches.transpose(1, 2).unflatten(2, (side, side))
    if feature.ndim == 4 and feature.shape[1] == feature.shape[2] != feature.shape[3]:
        return feature.permute(0, 3, 1, 2)
    return feature


def smaller_size(first: Sequence[int], second: Sequence[int]) -> tuple[int, int]:
    """The smaller height and the smaller width of two shapes [B, C, H, W] or two sizes [H, W]."""
    return min(first[-2], second[-2]), min(first[-1], second[-1])


def pool_to(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [B, C, H, W] averaged to `size`; as it is where it has that size."""
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)


def pool_to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, H, W], both averaged to the smaller height and width."""
    size = smaller_size(first.shape, second.shape)
    return pool_to(first, size), pool_to(second, size)


def embedding(feature: Tensor) -> Tensor:
    """A feature as one vector a sample, [B, D]: the mean over space of a map, a vector as it is."""
    return as_map(feature).mean((2, 3)) if feature.ndim > 2 else feature


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that turns `pooled` into logits.

    Raises:
        ConfigError: the model has no such layer.
    """
    path = tap_points(model).get("pooled", "").removesuffix(":input")
    # It may lie in a container, as published checkpoints have it.
    layers = [m for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)] if path else []
    if len(layers) != 1:
        raise ConfigError(f"{type(model).__name__} has no linear classifier that could be found")
    return layers[0]


def last_map(model: nn.Module, data: DataInfo) -> tuple[int, int, int]:
    """The shape (D, H, W) of the tap `map`, whose mean over space is what the classifier gets.

    Raises:
        ConfigError: the model has no such map (a vision transformer, say).
    """
    if "map" not in tap_points(model):
        raise ConfigError(
            f"{type(model).__name__} has no tap 'map', a feature map whose mean feeds the classifier"
        )
    shape = probe(model, ["map"], data.input_shape).features["map"].shape
    assert shape[1] == classifier(model).in_features
    return shape[1], shape[2], shape[3]


def float_pairs(
    student_features: list[Tensor], teacher_features: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of features in at least float32; the check of every loss over lists.

    Raises:
        ConfigError: lists of different or no length, or a pair of different batch sizes.
    """
    if len(student_features) != len(teacher_features) or not student_features:
        raise ConfigError(
            f"student and teacher features must be lists of one length, at least 1; "
            f"got {len(student_features)} and {len(teacher_features)}"
        )
    for s, t in zip(student_features, teacher_features, strict=True):
        if len(s) != len(t):
            raise ConfigError(
                f"features of different batch sizes: student {list(s.shape)}, teacher {list(t.shape)}"
            )
    return [(promote(s), promote(t)) for s, t in zip(student_features, teacher_features, strict=True)]
