"""Base class of feature methods, their default taps, and helpers for feature maps."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from typing_extensions import TypeVar

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Method, MethodConfig, Needs, not_negative, promote
from mdistiller.methods.gather import gather
from mdistiller.models.external import tap_points
from mdistiller.models.layouts import AXES, Layout, image_size
from mdistiller.taps import logits_if_any, probe, tap_layouts
from mdistiller.types import DataInfo, Outputs

Maps = list[Float[Tensor, "b _ _ _"]]
"""Feature maps [B, C, H, W], one per stage."""
Vectors = Float[Tensor, "b _"]
"""Embeddings [B, D]."""
TapPair = tuple[tuple[str, ...], tuple[str, ...]]
"""Tap names of the student and of the teacher."""
Weight = Annotated[float | Literal["auto"], AfterValidator(not_negative)]
"""Weight of a method's only loss, ≥ 0. `auto` is replaced by a measured number when a run starts."""


class FeatureConfig(MethodConfig):
    """Settings of every feature method."""

    student_taps: tuple[str, ...] = Field(default=())
    """Taps of the student, shallow to deep: canonical names or module paths. Empty: the method's default."""
    teacher_taps: tuple[str, ...] = Field(default=())
    """Taps of the teacher, one for each tap of the student. Empty: the method's default."""


FeatureConfigT = TypeVar("FeatureConfigT", bound=FeatureConfig, default=FeatureConfig, covariant=True)


class FeatureMethod(Method[FeatureConfigT]):
    """Base class of methods that compare the student's features with the teacher's, pair by pair.

    A subclass may override `default_taps`. `student_shapes` and `teacher_shapes` are the shapes of the
    features that `read` returns, for a batch of two; `student_layouts` and `teacher_layouts` are the layouts
    of the taps by name. `weight` is the config's, 1 for a config without one.
    """

    Config = FeatureConfig
    taps_by_default: ClassVar[Literal["stages", "last stage", "last_map", "embedding", "pooled"]] = "stages"
    """Taps of a config without any. `embedding`: `pooled`, or a transformer's last stage."""
    sequences: ClassVar[bool] = False
    """Whether the method takes features without a second axis in space, those of text or sound."""
    in_pairs: ClassVar[bool] = True
    """Whether each tap of the student belongs to one of the teacher."""
    needs = Needs(one_class=False, logits=False)

    @property
    def weight(self) -> float:
        """Weight of the loss."""
        return getattr(self.config, "weight", 1.0)

    def __init__(
        self, config: FeatureConfigT, student: nn.Module, teacher: nn.Module, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        if getattr(config, "weight", None) == "auto":
            raise ConfigError(
                f"weight: method {self.name!r} got 'auto', which mdistiller.train measures before the first "
                "step; allowed in one's own loop: a number, 0 or more"
            )
        given = config.student_taps, config.teacher_taps
        defaults = given if all(given) else data.taps or self.default_taps(student, teacher)
        self.student_taps, self.teacher_taps = given[0] or defaults[0], given[1] or defaults[1]
        if self.in_pairs and len(self.student_taps) != len(self.teacher_taps):
            raise ConfigError(
                f"method {self.name!r} compares features in pairs; got student_taps "
                f"{list(self.student_taps)} and teacher_taps {list(self.teacher_taps)}"
            )
        found = data
        if not data.are_embeddings:
            found = data._replace(logits_of=partial(logits_if_any, where=data.logits_of))
        probed = probe(student, self.student_taps, found), probe(teacher, self.teacher_taps, found)
        self.student_layouts, self.teacher_layouts = (
            tap_layouts(model, outputs.features, data)
            for model, outputs in zip((student, teacher), probed, strict=True)
        )
        for name, layout in (self.student_layouts | self.teacher_layouts).items():
            if layout.kind in ("sequence", "signal") and not self.sequences:
                raise ConfigError(
                    f"method {self.name!r} compares maps [B, C, H, W]; tap {name!r} is a {layout.kind} "
                    f"{AXES[layout.kind]}: take a method of logits or of embeddings"
                )
        features = self.read(*probed, data.input_shape)
        self.student_shapes, self.teacher_shapes = ([tuple(x.shape) for x in found] for found in features)

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        """Returns the taps of a config without any; stages of both models are matched."""
        if self.taps_by_default == "pooled":
            return ("pooled",), ("pooled",)
        if self.taps_by_default == "last_map":
            for model in (student, teacher):
                check_last_map(model)
            return ("last_map",), ("last_map",)
        if self.taps_by_default == "embedding":
            return embedding_tap(student), embedding_tap(teacher)
        first, second = match_stages(student, teacher)
        return (first, second) if self.taps_by_default == "stages" else (first[-1:], second[-1:])

    def read(
        self, student: Outputs, teacher: Outputs, inputs: object = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the tapped features of both models in the order of the taps, as maps (see `to_map`).

        Args:
            student: the student's outputs.
            teacher: the teacher's.
            inputs: `batch.image`, from which the grid of tokens follows.
        """
        ours = [to_map(student.features[n], self.student_layouts[n], inputs) for n in self.student_taps]
        theirs = [to_map(teacher.features[n], self.teacher_layouts[n], inputs) for n in self.teacher_taps]
        return ours, theirs

    def embeddings(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Returns every tapped feature averaged over its positions, [B, D], without prefix tokens."""
        ours = [self.student_layouts[name].mean(student.features[name]) for name in self.student_taps]
        return ours, [self.teacher_layouts[name].mean(teacher.features[name]) for name in self.teacher_taps]

    def gathered(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the `embeddings` of the samples of all processes."""
        first, second = self.embeddings(student, teacher)
        return [*map(gather, first)], [*map(gather, second)]


def sum_pairs(loss: Callable[..., Tensor], *arguments: Iterable[object]) -> Tensor:
    """Sums a loss over the taps; each of the arguments has one entry per tap."""
    return torch.stack([loss(*entries) for entries in zip(*arguments, strict=True)]).sum()


def stages(model: nn.Module) -> tuple[str, ...]:
    """Returns the canonical names `stage1` … that a model has.

    Raises:
        ConfigError: the model has none.
    """
    names = tuple(name for name in tap_points(model) if re.fullmatch(r"stage\d+", name))
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no tap named stageN: give module paths in "
            "method.student_taps and method.teacher_taps"
        )
    return names


def embedding_tap(model: nn.Module) -> tuple[str, ...]:
    """Returns the tap whose mean over space is the embedding: `pooled`, or a transformer's last stage."""
    points = tap_points(model)
    names = [name for name in points if re.fullmatch(r"stage\d+", name)]
    return ("pooled",) if "last_map" in points or not names else (names[-1],)


def preactivations(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the tap before the last ReLU of each stage, or the stage itself where there is none."""
    points = tap_points(model)
    return tuple(f"{name}.preact" if f"{name}.preact" in points else name for name in names)


def spread(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Returns at most `count` of the names, evenly spaced, always with the last one."""
    count = min(count, len(names))
    return tuple(names[math.ceil((i + 1) * len(names) / count) - 1] for i in range(count))


def match_stages(student: nn.Module, teacher: nn.Module) -> TapPair:
    """Returns as many stages of both models as the shallower one has, evenly spaced in the deeper one.

    Three stages meet the blocks 4, 8 and 12 of a transformer with twelve.
    """
    first, second = stages(student), stages(teacher)
    return spread(first, len(second)), spread(second, len(first))


def to_map(feature: Tensor, layout: Layout, inputs: object) -> Tensor:
    """Converts a feature to [B, C, H, W], a sequence to [B, C, L, 1]; returns a vector [B, D] unchanged.

    Raises:
        ConfigError: tokens that are not those of the inputs' images.
    """
    if layout.kind == "vector":
        return feature
    if not layout.is_spatial:
        return (feature.mT if layout.kind == "sequence" else feature)[..., None]
    return layout.as_map(feature, image_size(inputs) if layout.kind == "tokens" else ())


def smaller_size(first: Sequence[int], second: Sequence[int]) -> tuple[int, int]:
    """Returns the smaller height and the smaller width of two shapes [B, C, H, W] or two sizes [H, W]."""
    return min(first[-2], second[-2]), min(first[-1], second[-1])


def pool_to(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages a map [B, C, H, W] to a size (H, W)."""
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)


def pool_to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Averages two maps [B, C, H, W] to the smaller height and width of both."""
    size = smaller_size(first.shape, second.shape)
    return pool_to(first, size), pool_to(second, size)


def check_shapes(
    student: Tensor, teacher: Tensor, shape: str, names: str = "student and teacher features"
) -> None:
    """Raises a ConfigError for tensors that do not both have a shape such as `B, C, H, W`."""
    if student.shape != teacher.shape or student.ndim != len(shape.split()):
        raise ConfigError(
            f"{names} must have one shape [{shape}]; got {list(student.shape)} and {list(teacher.shape)}"
        )


def check_channels(student: Tensor, teacher: Tensor) -> None:
    """Raises a ConfigError for features that are not maps [B, C, H, W] with one B and C."""
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2]:
        raise ConfigError(
            f"student and teacher features must be maps [B, C, H, W] with one B and C; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )


def vector_as_map(feature: Tensor) -> Tensor:
    """Converts a vector [B, D] to a map [B, D, 1, 1]; returns a map unchanged."""
    return feature[:, :, None, None] if feature.ndim == 2 else feature


def classifier(model: nn.Module) -> nn.Linear:
    """Returns the linear layer that turns `pooled` into logits.

    Raises:
        ConfigError: the model has no such layer, or only a part of it, as of a model sharded by FSDP2.
    """
    path = tap_points(model).get("pooled", "").removesuffix(":input")
    # Published checkpoints may have the layer in a container.
    layers = [m for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)] if path else []
    if len(layers) != 1:
        raise ConfigError(
            f"{type(model).__name__} has no linear classifier that could be found, which the method reads: "
            "take a method of logits or of feature maps"
        )
    if hasattr(layers[0].weight, "full_tensor"):  # a DTensor
        raise ConfigError(
            f"the method reads the classifier of {type(model).__name__}, which is sharded: build the "
            "Distiller before fully_shard"
        )
    return layers[0]


def probe_as(model: nn.Module, name: str, kind: Literal["map", "vector"], data: DataInfo) -> Outputs:
    """Computes the outputs of a tap as `probe` does; raises a ConfigError for a tap of another layout."""
    outputs = probe(model, (name,), data)
    (layout,) = tap_layouts(model, outputs.features, data).values()
    if layout.kind != kind:
        raise ConfigError(
            f"tap {name!r} of {type(model).__name__} must be a {kind} {AXES[kind]}; it is a {layout.kind} "
            f"{list(outputs.features[name].shape)}"
        )
    return outputs


def check_last_map(model: nn.Module) -> None:
    """Raises a ConfigError for a model without the tap `last_map`, such as a vision transformer."""
    if "last_map" not in tap_points(model):
        raise ConfigError(
            f"{type(model).__name__} has no tap 'last_map', a feature map whose mean feeds the classifier"
        )


def last_map(model: nn.Module, data: DataInfo) -> tuple[int, int, int]:
    """Returns the shape (D, H, W) of the tap `last_map`; errors as `check_last_map`."""
    check_last_map(model)
    shape = probe_as(model, "last_map", "map", data).features["last_map"].shape
    assert shape[1] == classifier(model).in_features
    return shape[1], shape[2], shape[3]


def float_pairs(
    student_features: list[Tensor], teacher_features: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Checks two lists of features and returns them as pairs in at least float32.

    Raises:
        ConfigError: empty lists, lists of different lengths, or a pair of different batch sizes.
    """
    if len(student_features) != len(teacher_features) or not student_features:
        raise ConfigError(
            f"student and teacher features must be lists of one length, at least 1; "
            f"got {len(student_features)} and {len(teacher_features)}"
        )
    pairs = list(zip(student_features, teacher_features, strict=True))
    for s, t in pairs:
        if len(s) != len(t):
            raise ConfigError(
                f"features of different batch sizes: student {list(s.shape)}, teacher {list(t.shape)}"
            )
    return [(promote(s), promote(t)) for s, t in pairs]


def map_pairs(student_features: list[Tensor], teacher_features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns the `float_pairs` of two lists of maps, averaged to the smaller size of both.

    Raises:
        ConfigError: as `float_pairs`, or features that are no maps.
    """
    pairs = float_pairs(student_features, teacher_features)
    for s, t in pairs:
        if s.ndim != 4 or t.ndim != 4:
            raise ConfigError(
                f"features must be maps [B, C, H, W]; got student {list(s.shape)}, teacher {list(t.shape)}"
            )
    return [pool_to_smaller(s, t) for s, t in pairs]
