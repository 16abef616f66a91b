"""Interface between the training loop and a task, and the tasks by name."""

import difflib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar, cast

from torch import Tensor, nn

from mdistiller.config import RunConfig
from mdistiller.distiller import Distiller
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.losses import TaskLoss
from mdistiller.methods import Method, recorded_plugins
from mdistiller.methods.compose import build_method
from mdistiller.models import ModelConfig
from mdistiller.models.external import is_pretrained
from mdistiller.models.layers import classifier_paths
from mdistiller.models.weights import find_weights
from mdistiller.runs.config_file import read_values
from mdistiller.settings import validate
from mdistiller.teacher import Teacher
from mdistiller.training.batches import BatchSource
from mdistiller.training.deployment import Deployment
from mdistiller.training.distributed import World
from mdistiller.training.trainer import Evaluator
from mdistiller.types import AnyBatch, DataInfo, Line


class Data(Protocol):
    """The data of a task, as `Task.load_data` returns it."""

    @property
    def description(self) -> str:
        """One line about the data for people."""


C = TypeVar("C", bound=RunConfig)
D = TypeVar("D", bound=Data)
B = TypeVar("B", bound=AnyBatch)


class Task(ABC, Generic[C, D, B]):
    """One kind of problem, such as classification: config, data, models, loss, batches, metrics, metadata.

    The loop, run folders, recipes and commands reach a task through this class alone. `data` is the value of
    `load_data`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[RunConfig]]
    metadata_keys: ClassVar[tuple[str, ...]] = ()
    """Entries of `metadata` that `load_student` needs."""
    pretrained_flag: ClassVar[str] = "--teacher.pretrained"
    """Flag by which a teacher gets the weights of its library, for an error without any."""
    fixed_shapes: ClassVar[bool] = True
    """Whether batches have one shape, so that cuDNN's search for algorithms pays."""
    notes: ClassVar[Mapping[str, str]] = {}
    """Sentences below the list of the task's `methods`, and of its `models`."""
    auto_ratio: ClassVar[float] = 1.0
    """Norm of the gradient of a loss whose weight is `auto`, as a multiple of the norm of the task loss's."""
    shows_strength: ClassVar[bool] = False
    """Whether a plan compares the gradients of method and task on the first batch."""

    # Data and models

    def resolve(self, config: C) -> C:
        """Fills in fields left open that follow from others; `config.json` has the result."""
        return config

    def settle(self, config: C, student: nn.Module) -> C:
        """Fills in the method's settings that depend on the kind of student, as `config.json` has them."""
        return config

    def check(self, config: C) -> None:
        """Checks models and checkpoints by name, before the data is read.

        Raises:
            ConfigError: a teacher without weights: neither a checkpoint nor the option for pretrained ones.
            CheckpointError: no such checkpoint.
        """
        teacher = config.teacher if config.has_teacher else None
        if teacher is not None and not (
            teacher.checkpoint is not None or teacher.is_given or is_pretrained(teacher.options)
        ):
            raise ConfigError(
                f"teacher.checkpoint: the teacher {teacher.name} has no weights; give --teacher RUN, or "
                f"--teacher.checkpoint FILE, or {self.pretrained_flag} (in Python a run folder, a model, or "
                f'teacher={{"name": "{teacher.name}", "checkpoint": FILE}})'
            )
        for model in (config.student, teacher):
            if model is not None and model.checkpoint is not None:
                find_weights(model.checkpoint)

    @abstractmethod
    def load_data(self, config: C) -> D:
        """Reads the training and the test set."""

    def identify(self, config: C, data: D) -> dict[str, str]:
        """Returns hashes by name of the data, by which a resumed run knows it."""
        return {}

    @abstractmethod
    def build_model(self, config: C, model: ModelConfig, data: D) -> nn.Module:
        """Builds a model for the data, with its checkpoint loaded if it names one."""

    def build_student(self, config: C, data: D) -> nn.Module:
        """Builds the student of a run as it starts; torch's generator is seeded."""
        return self.build_model(config, config.student, data)

    def build_teacher(self, config: C, data: D) -> nn.Module:
        """Builds the teacher of a run that has one; torch's generator is seeded."""
        assert config.teacher is not None
        return self.build_model(config, config.teacher, data)

    def head(self, student: nn.Module) -> tuple[str, ...]:
        """Returns the module paths of the student's classifier, the part that a linear probe trains.

        Raises:
            ConfigError: it has none.
        """
        paths = classifier_paths(student)
        if not paths:
            raise ConfigError(
                "probe_epochs: the student has no linear classifier to train alone; allowed is 0"
            )
        return paths

    def data_info(self, config: C, data: D) -> DataInfo:
        """Describes the training data to the method; used by `build_method`."""
        raise NotImplementedError

    def build_method(self, config: C, student: nn.Module, teacher: nn.Module | None, data: D) -> Method:
        """Builds the method of a run."""
        return build_method(config.method, student, teacher, self.data_info(config, data))

    def check_models(
        self, config: C, student: nn.Module, teacher: nn.Module | None, method: Method, data: D
    ) -> None:
        """Checks models and method against the data, before any step."""

    # Training

    def task_loss(self, config: C, data: D) -> TaskLoss:
        """Returns the task loss, which `method.task_weight` weighs; used by `build_distiller`."""
        raise NotImplementedError

    def build_distiller(
        self, config: C, student: nn.Module, teacher: Teacher | None, method: Method, data: D
    ) -> Distiller:
        """Builds the module that trains; the student is as `method.extend_student` returned it."""
        return Distiller(student, teacher, method, task_loss=self.task_loss(config, data))

    @abstractmethod
    def make_batches(self, config: C, data: D, world: World) -> BatchSource[B]:
        """Builds the source of prepared batches, which lays out a batch."""

    def batch_metrics(self, batch: B, logits: Tensor) -> dict[str, Tensor]:
        """Sums over a batch's samples that are shown while training, beside the losses."""
        return {}

    def check_step(self, config: C, distiller: Distiller, source: BatchSource[B], data: D) -> None:
        """Checks a run on its device before the first step."""

    # Evaluation

    @abstractmethod
    def make_evaluator(
        self, config: C, data: D, source: BatchSource[B], teacher: nn.Module | None, world: World
    ) -> Evaluator:
        """Builds the function that computes `config.metrics` (and more) of a model on the test set.

        `teacher` is compared with the student: a model, a `ModuleList` of several, or None if there is none
        or it changes.
        """

    def evaluate(self, config: C, model: ModelConfig, world: World, predictions: Path | None = None) -> Line:
        """Computes the metrics of a stored model on a config's test set, and `images`, their number.

        The config's student and method have no part in it. `predictions` is a file to write for the
        predictions, of tasks that have a format for them.

        Raises:
            ConfigError: the task evaluates its runs only while they train, or has no format of predictions.
        """
        raise ConfigError(f"task {self.name!r} does not evaluate stored models")

    def format_metrics(self, metrics: Line) -> list[str]:
        """Returns metrics from `evaluate` as lines of text."""
        return ["  ".join(f"{name} {metrics[name]:.4f}" for name in self.Config.metrics)]

    # Files

    @abstractmethod
    def metadata(self, config: C, data: D, *, is_extended: bool) -> Line:
        """Returns everything from which `load_student` builds the student of a file again.

        `model`, `options` and `classes` are among it. `is_extended`: the method made another model of the
        student.
        """

    def load_student(self, file: Path, metadata: Line) -> nn.Module:
        """Builds the student in a file from the file's metadata, in evaluation mode on the CPU."""
        raise ConfigError(f"{file}: a student of task {self.name!r} cannot be loaded by itself")

    def check_model(self, name: str) -> None:
        """Checks the name of a model of this task.

        Raises:
            UnknownNameError: no such model.
            ConfigError: a library that is not installed, or the task does not find models by name.
        """
        raise UnknownNameError("model", name, ())

    def list_models(self) -> list[Line]:
        """Lists the models that the task finds by name, with their properties, `name` first.

        Raises:
            ConfigError: the task has no such list.
        """
        raise ConfigError(f"task {self.name!r} lists no models")

    def list_methods(self) -> list[Line]:
        """Lists the methods that the task takes, with their properties, `name` first; errors as above."""
        raise ConfigError(f"task {self.name!r} lists no methods")

    def deployment(self) -> Deployment:
        """Returns the export of the task's students and prediction with them.

        Raises:
            ConfigError: the task has neither.
        """
        raise ConfigError(f"task {self.name!r} has neither export nor prediction of its students")


def try_single_image(config: RunConfig, distiller: Distiller, batch: AnyBatch) -> None:
    """Tries a step on a batch of one image; raises ConfigError where that cannot be trained on."""
    try:
        distiller.try_step(batch)
    except ValueError as error:
        raise ConfigError(
            "drop_last: an epoch's last batch has a single image, which cannot be trained on; give "
            f"--drop-last, or another --batch-size than {config.batch_size} ({error})"
        ) from error


DEFAULT_TASK = "classification"
AnyTask = Task[RunConfig, Data, AnyBatch]
_TASKS: dict[str, AnyTask] = {}


@cache
def _built_in() -> list[str]:
    """Lists the packages in `mdistiller.tasks`, each of which registers the task of its name."""
    return [module.name for module in pkgutil.iter_modules(import_module("mdistiller.tasks").__path__)]


def register_task(task: Task[C, D, B]) -> Task[C, D, B]:
    """Makes a task known by its name.

    Raises:
        ConfigError: another class has the name.
    """
    known = _TASKS.get(task.name)
    if known is not None and type(known).__qualname__ != type(task).__qualname__:
        raise ConfigError(f"task {task.name!r} is registered already, by {type(known).__module__}")
    _TASKS[task.name] = cast(AnyTask, task)
    return task


def get_task(name: str) -> AnyTask:
    """Returns a task by its name; raises UnknownNameError where there is none."""
    if name not in _TASKS and name in _built_in():
        import_module(f"mdistiller.tasks.{name}")
    if name not in _TASKS:
        raise UnknownNameError("task", name, {*_built_in(), *_TASKS})
    return _TASKS[name]


def task_of_model(name: str) -> AnyTask:
    """Returns the first task that has a model of this name.

    Raises:
        UnknownNameError: no task has it.
        ConfigError: the model's library is not installed.
    """
    errors = []
    for task in map(get_task, dict.fromkeys([*_built_in(), *_TASKS])):
        try:
            task.check_model(name)
        except UnknownNameError as error:
            errors.append(error)
        else:
            return task
    raise max(errors, key=lambda error: _likeness(name, error.nearest))


def _likeness(name: str, nearest: list[str]) -> float:
    return difflib.SequenceMatcher(None, name, nearest[0]).ratio() if nearest else 0.0


def load_config(path: Path, *, whole: bool = False) -> RunConfig:
    """Reads the `config.json` of a run of any task; a file that names no task is of classification.

    It runs no plug-in. The result names those that are loaded; `whole` requires all of them.

    Raises:
        ConfigError: the file is missing, is no JSON, has a field that is unknown or wrong, or needs a plug-in
            that is not loaded.
    """
    values = read_values(path)
    name = values.get("task", DEFAULT_TASK)
    if not isinstance(name, str):
        raise ConfigError(f"{path}: task: got {name!r}; allowed is the name of a task")
    loaded, absent = recorded_plugins(values.get("plugins"))
    if absent and whole:
        raise ConfigError(f"{path}: plugins: {absent}")
    try:
        config = validate(get_task(name).Config, values, str(path))
    except ConfigError as error:
        if not absent:
            raise
        raise ConfigError(f"{error}. {absent}") from error
    return config.model_copy(update={"plugins": tuple(loaded)})
