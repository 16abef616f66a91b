"""The base of detection and segmentation: fields of configs, splits, checks and the task."""

from __future__ import annotations

import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar, cast

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from mdistiller.checks import class_order
from mdistiller.config import RunConfig, find_field
from mdistiller.data.cores import Workers
from mdistiller.data.encoded import as_encoded
from mdistiller.data.identity import COMPARED, hash_all
from mdistiller.data.labels import stratified_cut
from mdistiller.data.loader import Order, WorkerLoader
from mdistiller.errors import ConfigError, DataError, MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.models.backbone import is_backbone
from mdistiller.models.weights import read_metadata
from mdistiller.settings import Settings
from mdistiller.training.batches import BatchSource
from mdistiller.training.deployment import Deployment, Model
from mdistiller.training.distributed import World
from mdistiller.training.precision import lay_out, memory_format, torch_dtype
from mdistiller.training.task import Task
from mdistiller.training.trainer import Evaluator
from mdistiller.types import AnyBatch, Line

Split = Literal["train", "test"]
M = TypeVar("M", bound=ModelConfig)
_WEIGHTS = ("backbone_weights", "weights", "config")  # options of models, names or files


class DenseDataConfig(Settings):
    """Part of a data set of images with objects or masks."""

    relative_paths: ClassVar[tuple[str, ...]] = (
        "train_annotations",
        "test_annotations",
        "train_images",
        "test_images",
    )

    root: Path
    train_annotations: Path | None = None
    """Objects: file, relative to root: COCO's JSON, or VOC's list of images or folder of XML files. None:
    annotations/instances_train2017.json, instances_train.json, train/_annotations.coco.json; of VOC the list
    ImageSets/Main/train.txt or trainval.txt, or the folder train."""
    test_annotations: Path | None = None
    """The same of the test images. None: the usual names with val in place of train, then valid, validation
    and test."""
    train_images: Path | None = None
    """Objects: folder of COCO's or YOLO's images, relative to root. None: train2017 or images; of YOLO what
    data.yaml says, or images/train or train/images."""
    test_images: Path | None = None
    """The same of the test images. None: the usual names with val in place of train, then valid, validation
    and test."""
    val_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of the training images to evaluate on in place of a test set, chosen by seed, of objects
    within the rarest category of each image."""
    train_limit: int | None = Field(default=None, ge=1)
    """Use at most this many training images, chosen by seed."""
    test_limit: int | None = Field(default=None, ge=1)
    """Use at most this many test images, chosen by seed."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of val_fraction and the limits."""
    workers: Workers = "auto"
    """Processes that read images. 0: the main process reads them. `auto`: one for each core that the process
    may use, at most 16."""
    on_error: Literal["raise", "skip"] = "raise"
    """Missing or unreadable image files: stop, or leave them out and warn."""

    def source(self, split: Split) -> Split:
        """Returns the split whose files are read for a split."""
        return split if self.val_fraction is None else "train"

    def choose(self, labels: Sequence[int], split: Split) -> list[int]:
        """Chooses images of a split by `seed`, as many as the limit allows, and returns their positions.

        `labels` has a number for each image of its source, within which `val_fraction` is cut.
        """
        whole = torch.arange(len(labels))
        if self.val_fraction is not None:
            parts = stratified_cut(torch.tensor(labels), self.val_fraction, self.seed)
            whole = parts[split == "test"]
        limit = self.train_limit if split == "train" else self.test_limit
        if limit is not None and limit < len(whole):
            order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(self.seed))
            whole = whole[order[:limit].sort().values]
        return [int(i) for i in whole]


class DenseConfig(RunConfig):
    """A run of a task with images of several sizes."""

    teacher_images: ClassVar[str]
    """Reason for which a teacher's images have no fields of their own."""
    refused: ClassVar[dict[str, tuple[object, str]]]
    """Fields with one value that is allowed, and the reason."""

    data: DenseDataConfig
    eval_batch_size: int = Field(default=1, ge=1)
    """Images per evaluation batch and process. A detector's are padded to one size, which changes predictions
    a little, so runs compare at one size. A segmentation model's run together where they have one size."""

    @staticmethod
    @abstractmethod
    def check_name(name: str) -> None:
        """Raises UnknownNameError for a name that is none of the task's models."""

    def absolute(self) -> Self:
        whole = super().absolute()
        update: dict[str, object] = {"student": _absolute(whole.student)}
        if whole.teacher is not None:
            update["teacher"] = _absolute(whole.teacher)
        update["more_teachers"] = tuple(map(_absolute, whole.more_teachers))
        return whole.model_copy(update=update)

    def data_facts(self) -> Line:
        """Returns facts about the data set, for the card of an exported student."""
        facts = self.data.model_dump(include={"kind", "train_limit", "test_limit", "seed"})
        return facts | {"name": self.data.root.name}

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        self.method_class(self.method.method_name)
        for teacher in (self.teacher, *self.more_teachers):
            if teacher is None or is_backbone(teacher.name, self.check_name):
                continue
            if teacher.own_fields:
                raise ValueError(f"teacher.{teacher.own_fields[0]}: {self.teacher_images}; allowed: None")
        for name, (allowed, reason) in self.refused.items():
            if find_field(self, name) != allowed:
                raise ValueError(f"{name}: {reason}; allowed: {allowed}")
        return self


def _absolute(model: M) -> M:
    """Returns a model whose options have absolute paths of weights; others are names."""
    given = {name: Path(model.options[name]) for name in _WEIGHTS if model.options.get(name) is not None}
    files = {name: str(path.absolute()) for name, path in given.items() if path.exists()}
    return model.model_copy(update={"options": model.options | files})


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("allowed are two rising factors above 0")
    return value


Factors = Annotated[tuple[float, float], AfterValidator(_rising)]
"""Lowest and highest factor of a random scale."""


def check_apart(root: Path, train: Sequence[Path], test: Sequence[Path]) -> None:
    """Raises a DataError where an image is in both splits."""
    if both := sorted({*train} & {*test}):
        raise DataError(
            f"{root}: {len(both)} of {len(test)} test images are training images too, such as "
            f"{both[0].name}; to split one set of images: --data.val-fraction 0.2"
        )


Data = TypeVar("Data", bound=DenseDataConfig)


def check_fraction(config: Data, train: Sequence[Path], read_test: Callable[[Data], Sequence[Path]]) -> None:
    """Raises a ConfigError where a data set that `val_fraction` cuts has other test images of its own."""
    if config.val_fraction is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            test = read_test(config.replace(val_fraction=None))
        except MDistillerError:
            return
    if not {*train} & {*test}:
        raise ConfigError(
            f"val_fraction: got {config.val_fraction}; {config.root} has {len(test)} test images of its own, "
            f"such as {test[0].name}; allowed is None"
        )


class DenseSet(Protocol):
    """Images with objects or masks."""

    classes: Sequence[str]

    @property
    def files(self) -> Sequence[Path]:
        """The files of images, then those of masks."""

    @property
    def labels(self) -> Iterator[object]:
        """Facts beside the files, as plain values: sizes, boxes and classes, or the values of masks."""


Images = TypeVar("Images")
S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class DenseSplits(Generic[Images]):
    """Training and test set; `description` is one line for people."""

    train: Images
    test: Images
    description: str


class DenseLoader(WorkerLoader[list[S]]):
    """Batches of images with objects or masks, the same for any number of worker processes.

    Args:
        images: the set.
        config: settings of the run, from which seed, batch size and workers are taken.
        world: this process, which reads its share of the images.
        read: reads a sample by its position and the seed of the view.
        training: the batches of training, in random order; otherwise those of evaluation.
    """

    def __init__(
        self,
        images: Any,
        config: DenseConfig,
        world: World,
        read: Callable[[int, int], S],
        *,
        training: bool,
    ) -> None:
        order = Order(device=world.device, shuffle=training, rank=world.rank, world_size=world.size)
        size = config.eval_batch_size
        if training:
            size = config.batch_size // world.size
            order["seed"], order["drop_last"] = config.seed, config.drop_last
        workers = config.data.workers
        super().__init__(len(images), size, read, list, on_error=images.on_error, workers=workers, **order)


class DenseDeployment(Deployment):
    """Export of models of images of any size, measured on the test set, one image at a time."""

    batches = (1,)
    checked: ClassVar[tuple[tuple[int, ...], ...]]
    """Shapes of the random inputs on which an exported file is compared."""
    load_split: ClassVar[Callable[..., Any]]
    """Function that reads a split of a config of data."""
    loader: ClassVar[Callable[..., Any]]
    """Class of the loader of a set."""
    measure: ClassVar[Callable[..., Line]]
    """Function that computes the metrics of a model from batches, their set, this process and a precision."""
    module: ClassVar[type[nn.Module]]
    """Class of the module of a `Model` that `measure` takes."""

    def card_fields(self, metadata: Line, config: RunConfig | None) -> Line:
        fields: Line = {name: metadata[name] for name in ("classes", "mean", "std") if name in metadata}
        facts = config.data_facts() if isinstance(config, DenseConfig) else None
        return fields | {"resize": metadata.get("short_side"), "data": facts}

    def check_inputs(self, metadata: Line) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.rand(shape, generator=generator) for shape in self.checked]

    def load_test_set(self, config: RunConfig) -> DenseSplits[Any]:
        assert isinstance(config, DenseConfig)
        images = self.load_split(config.data, "test")
        return DenseSplits(train=images, test=images, description="")

    def evaluator(self, config: DenseConfig, images: Any, world: World) -> Callable[..., Line]:
        """Returns a function that computes a model's metrics, and with `count` the images that it scored."""
        loader, precision = self.loader(images, config, world, training=False), torch_dtype(config.precision)

        def evaluate(model: nn.Module, is_student: bool = True, count: bool = False, **options: Any) -> Line:
            found = self.measure(model, loader.epoch(0), images, world, precision=precision, **options)
            return found | ({"images": len(images) - sum(world.gather(loader.left_out))} if count else {})

        return evaluate

    def evaluate(
        self, models: Sequence[Model], config: RunConfig, data: DenseSplits[Any], device: torch.device
    ) -> list[Line]:
        assert isinstance(config, DenseConfig)
        float32 = config.model_copy(update={"precision": "float32"})
        evaluate = self.evaluator(float32, data.test, World(device))
        return [{**evaluate(self.module(model), count=True), "agreement": None} for model in models]


C = TypeVar("C", bound=DenseConfig)
B = TypeVar("B", bound=AnyBatch)


class DenseTask(Task[C, DenseSplits[Images], B]):
    """A task with images of several sizes, whose models are found by `Config.check_name`."""

    Config: ClassVar[type[DenseConfig]]
    build: ClassVar[Callable[..., nn.Module]]
    """Function that builds a `ModelConfig` for a number of classes, with its checkpoint loaded."""
    exports: ClassVar[DenseDeployment]
    writes_predictions: ClassVar[bool] = False

    @abstractmethod
    def reorder(self, model: nn.Module, places: Sequence[int] | None) -> None:
        """Gives a model the outputs of its classes at these places; None leaves them as they are."""

    def identify(self, config: C, data: DenseSplits[Images]) -> dict[str, str]:
        train, test = (cast(DenseSet, images) for images in (data.train, data.test))
        labels = hashlib.sha256(repr(train.classes).encode())
        for label in chain(train.labels, test.labels):
            labels.update(repr(label).encode())
        parts = {"training images": train.files, "test images": test.files}
        workers = config.data.workers
        found = {
            name: hash_all(as_encoded(files), workers)
            for name, files in parts.items()
            if len(files) <= COMPARED
        }
        return {"labels": labels.hexdigest(), **found}

    def make_evaluator(
        self,
        config: C,
        data: DenseSplits[Images],
        source: BatchSource[B],
        teacher: nn.Module | None,
        world: World,
    ) -> Evaluator:
        return cast(Evaluator, self.exports.evaluator(config, data.test, world))

    def evaluate(self, config: C, model: ModelConfig, world: World, predictions: Path | None = None) -> Line:
        if predictions is not None and not self.writes_predictions:
            hint = "allowed: a detector. `mdistiller predict --draw DIR` writes masks"
            raise ConfigError(f"predictions: got a model of task {self.name!r}; {hint}")
        self.check_model(model.name)  # a wrong name must not wait for the data
        assert model.checkpoint is not None
        trained = read_metadata(model.checkpoint).get("classes", ())
        images = self.exports.load_split(config.data, "test")
        where, advice = f"data: {model.checkpoint}", ": evaluate it on data of its own"
        places = class_order(trained, images.classes, where, error=ConfigError, advice=advice)
        network = self.build(model, images.num_classes)
        self.reorder(network, places)
        network.to(world.device)
        lay_out(network, memory_format(config.layout))
        evaluate = self.exports.evaluator(config, images, world)
        file = {} if predictions is None else {"predictions": predictions}
        return evaluate(network, count=True, **file)

    def load_student(self, file: Path, metadata: Line) -> nn.Module:
        model = ModelConfig(name=metadata["model"], options=metadata["options"], checkpoint=file)
        background = "num_classes" in metadata  # of a detector, beside its classes
        return self.build(model, len(metadata["classes"]) + background).eval()

    def check_model(self, name: str) -> None:
        self.Config.check_name(name)

    def deployment(self) -> Deployment:
        return self.exports
