"""Types that one training step passes around.

They are named tuples because DDP, `torch.compile` and `torch.export` traverse those.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypedDict

import torch
from torch import Tensor

Line = dict[str, Any]
"""Values by name, as a line of metrics or the metadata of a file holds them in JSON."""

IGNORED = -100
"""Label of an image without a class, which PyTorch's losses and those of `functional` ignore by default."""


Inputs = Any
"""A student's input: images [B, C, H, W], a mapping of keyword arguments, or a list of images."""
Targets = Any
"""Values that a task loss compares with: labels [B] or [B, …], or the objects of each image."""
LogitsOf = str | int | Callable[[Any], Tensor] | None
"""Entry of a model's result that holds the logits: a key, an index, or a function of the result."""


class Batch(NamedTuple):
    """Batch of samples.

    Attributes:
        image: Float [B, C, H, W], normalized; before augmentation uint8 [B, H, W, C].
        label: Class ids, int64 [B], -100 for an image without a class; or float [B, classes], rows that sum
            to one (mixup, CutMix; less with a part without a class), or several classes each, in [0, 1].
        index: Position of each sample in the training set, int64 [B], read by memory banks.
        rows: Number of each sample's row in the teacher's cache, int64 [B]; None without a cache.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    rows: Tensor | None = None

    @classmethod
    def join(cls, batches: "Sequence[Batch]") -> "Batch":
        """Concatenates batches of the same kind."""
        image, label, index = (torch.cat(parts) for parts in zip(*(b[:3] for b in batches), strict=True))
        rows = [batch.rows for batch in batches if batch.rows is not None]
        return cls(image, label, index, torch.cat(rows) if rows else None)

    def split(self, count: int, num_views: int = 1) -> "list[Batch]":
        """Splits the batch into at most `count` parts, each with the same samples of every view."""
        return [Batch(*part) for part in zip(*(split(x, count, num_views) for x in self[:3]), strict=True)]


class AnyBatch(Protocol):
    """A batch of any task: inputs, targets and positions come first, in this order."""

    @property
    def image(self) -> Inputs:
        """The images, as the student takes them."""

    @property
    def index(self) -> Tensor:
        """Position of each sample in the training set, int64 [B]."""

    def __getitem__(self, field: SupportsIndex, /) -> Any: ...

    def split(self, count: int, num_views: int = 1) -> "Sequence[AnyBatch]":
        """Splits the batch into at most `count` parts, each with the same samples of every view."""


def with_shapes(value: object) -> str:
    """Returns a value as text, a tensor as its shape; of named tuples and dicts, each value."""
    if isinstance(value, Tensor):
        return repr(value.detach()) if value.ndim == 0 else f"{list(value.shape)}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {with_shapes(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        fields = (f"{name}={with_shapes(inner)}" for name, inner in value._asdict().items())
        return f"{type(value).__name__}({', '.join(fields)})"
    return repr(value)


class Outputs(NamedTuple):
    """Outputs of a tapped model: logits [B, classes] and tapped features by name."""

    logits: Tensor
    features: dict[str, Tensor]

    def __repr__(self) -> str:
        return with_shapes(self)

    def promote(self, dtype: torch.dtype) -> "Outputs":
        """Returns the outputs with values of lower precision converted to a floating point type."""
        values = {name: x.to(torch.promote_types(x.dtype, dtype)) for name, x in self.features.items()}
        return Outputs(self.logits.to(torch.promote_types(self.logits.dtype, dtype)), values)

    def split(self, count: int, num_views: int = 1) -> "list[Outputs]":
        """Splits the outputs like `Batch.split`."""
        parts = zip(
            *(split(x, count, num_views) for x in (self.logits, *self.features.values())), strict=True
        )
        return [Outputs(logits, dict(zip(self.features, part, strict=True))) for logits, *part in parts]


@dataclass(frozen=True)
class Metric:
    """Presentation of a metric. Names that are left out follow from its field's name.

    name: its field in an evaluation.
    unit: `%` for a percentage, whose differences are percentage points; empty for a plain number.
    title, sentence, axis: its names in a heading, in a sentence, and on an axis.
    result, short: its names in the line at the end of a run, and in the line of an evaluation.
    """

    name: str
    unit: str = ""
    title: str = ""
    sentence: str = ""
    axis: str = ""
    result: str = ""
    short: str = ""

    def __post_init__(self) -> None:
        for field in ("title", "short"):
            object.__setattr__(self, field, getattr(self, field) or self.name)
        for field in ("sentence", "axis", "result"):
            object.__setattr__(self, field, getattr(self, field) or f"test {self.name}")

    @property
    def spec(self) -> str:
        """Format of its values: two digits of a percentage, four of any other number."""
        return ".2f" if self.unit else ".4g"

    def text(self, value: object, spec: str = "") -> str:
        """Returns a value with its unit, in another format if `spec` is given and it is a percentage."""
        number = format(value, spec if spec and self.unit else self.spec)
        return f"{number} {self.unit}" if self.unit else number

    def head(self, name: str) -> str:
        """Returns a name with the unit, as a heading or an axis has it: `last, %`."""
        return f"{name}, {self.unit}" if self.unit else name

    def gain(self, value: float) -> str:
        """Returns a difference of two values, with its sign."""
        return format(value, f"+{self.spec}").replace("-", "−")


class DataInfo(NamedTuple):
    """Facts about the training data that a method can use when it is built.

    Attributes:
        input_shape: (C, H, W) of one image, or an example of the models' inputs, a tensor or a mapping.
        labels: Class of every training image by `Batch.index`, int64 [N] on the CPU, -100 for none, or float
            [N, classes] of several classes each; None if unknown.
        batch_size: Images per step over all processes together; None if unknown.
        logits_of: Entry of the models' results that holds the logits; None: it is found.
        taps: Default taps of feature methods, the student's and the teacher's; None: each method's own.
        are_maps: Features are maps [B, C, H, W], whatever their shape looks like.
        only_labeled: Means over samples leave out those without a class, for methods that read no label too.
        are_embeddings: The models return embeddings [B, D] as their logits.
        images: Yields every training image once, prepared as for evaluation; None if they are not at hand.
    """

    input_shape: tuple[int, ...] | Tensor | Mapping[str, object]
    labels: Tensor | None = None
    batch_size: int | None = None
    logits_of: LogitsOf = None
    taps: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    are_maps: bool = False
    only_labeled: bool = False
    images: Callable[[], Iterable[Batch]] | None = None
    are_embeddings: bool = False


def split(x: Tensor, count: int, num_views: int) -> list[Tensor]:
    """Splits [num_views · B, …], view after view, into parts with the same samples of every view."""
    return [torch.cat(part) for part in zip(*(v.chunk(count) for v in x.chunk(num_views)), strict=True)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates tensors; a single one is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Summary(TypedDict, total=False):
    """The end of a run; `last` and `best` are metrics by name, after the last and the best epoch."""

    kind: str
    step: int
    epochs: int
    last: dict[str, float]
    best: dict[str, float]
    probe: dict[str, float]
    stopped_early: bool
    seconds: float
    ms_per_step: float
    student_parameters: int
    method_parameters: int
