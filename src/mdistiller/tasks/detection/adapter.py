"""Interface through which distillation reads a detector: levels by stride, predictions, labels, losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from mdistiller.errors import ConfigError, TapError
from mdistiller.methods.base import promote

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

T = TypeVar("T")
Targets = list[dict[str, Tensor]]
Activation = Literal["softmax", "sigmoid"]
Kind = Literal["proposals", "anchors", "points", "set"]
"""Detectors with proposals; dense ones with anchors or with points; and those that predict a set."""


class Level(NamedTuple):
    """A feature map of a detector: pixels of the image from a cell to the next one, and channels."""

    stride: float
    channels: int


class DetectorPass(NamedTuple):
    """Intermediate results of a detector's training pass, in pixels of its own images.

    Logits and labels are None where the adapter's `activation` is.

    images: the padded batch [B, 3, H, W], and each image's (height, width) in it.
    features: the levels by name, [B, C, h, w] each, and of a set what `DetectorAdapter.query_taps` name.
    strides: the stride of each level.
    logits: [rows, classes], before the activation. A row is a sampled proposal, or an anchor or point.
    labels: int64 [rows], 0 for the background, -100 for a row that the detector's own loss leaves out.
    objects: per image the boxes of its objects, [N, 4].
    anchors: per image [A, 4], level after level, the anchors of a position one after another.
    per_position: for each level the number of anchors of a position.
    proposals: per image the sampled proposals [P, 4]; None for a detector without.
    rows: positions of the rows among all B · A anchors; None: all of them.
    offsets: predicted boxes relative to their anchors, [B, A, 4]; None for a detector with proposals.
    held: for each branch of the head the maps of every level that `DetectorAdapter.hold` asks for.
    """

    images: "ImageList"
    features: dict[str, Tensor]
    strides: Mapping[str, float]
    logits: Tensor | None
    labels: Tensor | None
    objects: list[Tensor]
    anchors: list[Tensor]
    per_position: tuple[int, ...]
    proposals: list[Tensor] | None = None
    rows: Tensor | None = None
    offsets: Tensor | None = None
    held: dict[str, list[Tensor]] | None = None


class DetectorAdapter(ABC):
    """Access to a detector for distillation. The detector is not changed.

    torchvision's detectors and subclasses of them have one. For a detector of your own, write a subclass, and
    set the detector's attribute `detector_adapter` to that class.

    Args:
        model: the detector. In evaluation mode it maps a list of images [3, H, W] in [0, 1] to a list of
            dicts with `boxes`, `labels` and `scores`, as torchvision's do.
    """

    activation: ClassVar[Activation | None]
    """`softmax` over classes, the background being class 0; or a `sigmoid` for each class.

    None: rows do not correspond between detectors, like a transformer's queries. Methods that compare
    logits then raise an error.
    """
    has_proposals: ClassVar[bool] = False
    """Whether logits are those of proposals, which the teacher takes from the student; else of anchors."""

    has_points: bool = False
    """Whether a dense detector predicts boxes from points, as FCOS does, rather than from anchors."""

    query_taps: tuple[str, ...] = ()
    """Names of a set's predictions, of L layers and Q queries: `queries.logits` [B, L, Q, C], the log odds of
    each class, and `queries.boxes` [B, L, Q, 4], centers and sizes as fractions of the image. With
    distributions over the sides of a box also `queries.sides` [B, L, Q, 4, bins], logits for left, top, right
    and bottom, and `queries.places`, of that shape, each bin's coordinate as a fraction of the image."""

    names: tuple[str, ...] = ()
    """Levels that a method reads of a backbone; none: its last one. A detector has all of its levels."""

    hold: int | None = None
    """Index of the convolution in each branch of the head whose output a pass keeps. None: keep none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def kind(self) -> Kind:
        """Kind of the detector, which decides the settings that a method leaves open."""
        if self.has_proposals or self.activation is None:
            return "proposals" if self.has_proposals else "set"
        return "points" if self.has_points else "anchors"

    @property
    @abstractmethod
    def levels(self) -> dict[str, Level]:
        """Levels by name, fine to coarse."""

    @abstractmethod
    def train(self, images: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], DetectorPass]:
        """Runs the detector in training mode; returns its losses by name, and what it computed for them.

        Args:
            images: float [3, H, W] each, in [0, 1].
            targets: for each image `boxes` [N, 4] (x1, y1, x2, y2 in pixels) and `labels` int64 [N] from 1.
        """

    @abstractmethod
    def prepare(self, images: list[Tensor]) -> "ImageList":
        """Normalizes, scales and pads images as in evaluation."""

    @abstractmethod
    def features(self, images: "ImageList") -> dict[str, Tensor]:
        """Computes the levels [B, C, h, w] of prepared images, and of a set what `query_taps` name."""

    def anchors(self, images: "ImageList") -> list[Tensor]:
        """Returns for each prepared image its anchors [A, 4], in the order of a pass without proposals.

        Detectors that are compared anchor by anchor need the same ones.
        """
        raise self._lacks("anchors")

    def class_logits(self, features: dict[str, Tensor], images: "ImageList", student: DetectorPass) -> Tensor:
        """Computes the teacher's logits, [rows, classes], at the rows of the student's pass.

        Args:
            features: the teacher's levels.
            images: the teacher's prepared images.
            student: the student's pass; its proposals are in pixels of the student's images.
        """
        raise self._lacks("logits at the rows of another detector")

    def decode(self, student: DetectorPass) -> Tensor:
        """Returns the student's boxes at all anchors, [B · A, 4], in pixels of its images."""
        raise self._lacks("boxes at anchors")

    def boxes(self, features: dict[str, Tensor], images: "ImageList", student: DetectorPass) -> Tensor:
        """Computes the teacher's boxes at all anchors, [B · A, 4], in pixels of its own images."""
        raise self._lacks("boxes at anchors")

    def cross(
        self, features: dict[str, Tensor], images: "ImageList", student: DetectorPass, hold: int
    ) -> tuple[Tensor, Tensor]:
        """Computes the teacher's predictions from the maps that the student's pass holds, with gradients.

        Returns:
            Logits [B · A, classes] and boxes [B · A, 4], in pixels of the teacher's images.
        """
        raise self._lacks("predictions from the maps of another head")

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"{type(self.model).__name__}: {type(self).__name__} gives no {what}")


# Modules whose outputs are coordinates, or from which torchvision computes them.
_COORDINATES = (
    *("backbone", "rpn.head", "head"),
    *(f"roi_heads.{name}_predictor" for name in ("box", "mask", "keypoint")),
)


@contextmanager
def float32_coordinates(model: nn.Module) -> Iterator[None]:
    """Context in which a detector computes coordinates in float32 under autocast.

    torchvision computes anchors and boxes in the dtype of the features and the predicted offsets; in bfloat16
    a coordinate of 1,000 has an error of up to 4. Without autocast nothing changes.
    """
    with ExitStack() as hooks:
        for path in (*_COORDINATES, *getattr(model, "coordinates", ())):
            with suppress(AttributeError):  # no detector has all of these modules
                module = model.get_submodule(path)
                hooks.enter_context(module.register_forward_hook(lambda m, args, out: _promote_all(out)))
        yield


def _promote_all(value: object) -> object:
    if isinstance(value, Tensor):
        return promote(value)
    if isinstance(value, dict):
        return type(value)((key, _promote_all(part)) for key, part in value.items())
    return type(value)(map(_promote_all, value)) if isinstance(value, list | tuple) else value


class Call(NamedTuple):
    """Arguments and result of a call of a module or a function."""

    args: tuple[Any, ...]
    result: Any


class Calls(dict[str, Call]):
    """The last calls of modules and functions, by their paths in a detector."""

    def __missing__(self, path: str) -> Call:
        raise TapError(f"the detector's module {path!r} did not run in this pass")


@contextmanager
def recorded(model: nn.Module, modules: Iterable[str], functions: Iterable[str] = ()) -> Iterator[Calls]:
    """Context that records calls of modules and of methods (`PATH.NAME`); nothing of it stays afterwards."""
    calls = Calls()
    with ExitStack() as undo:
        for path in modules:
            record = lambda m, args, out, path=path: calls.update({path: Call(args, out)})  # noqa: E731
            undo.enter_context(model.get_submodule(path).register_forward_hook(record))
        for path in functions:
            owner_path, _, name = path.rpartition(".")
            owner = model.get_submodule(owner_path)
            attributes = vars(owner)
            undo.callback(attributes.update, {key: attributes[key] for key in attributes if key == name})
            undo.callback(attributes.pop, name)  # first, as the last callback
            attributes[name] = _recorder(calls, path, getattr(owner, name))
        yield calls


def _recorder(calls: Calls, path: str, function: Callable[..., T]) -> Callable[..., T]:
    def call(*args: object, **options: object) -> T:
        result = function(*args, **options)
        calls[path] = Call(args, result)
        return result

    return call
