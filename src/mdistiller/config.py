"""Configuration of one run: what recipes return, flags change and `config.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, SerializeAsAny, field_validator, model_validator

from mdistiller.errors import ConfigError, MDistillerError
from mdistiller.methods import Method, MethodConfig, get_method
from mdistiller.methods.changes import open_weights, unset
from mdistiller.methods.compose import method_config, needs_teacher
from mdistiller.methods.none import NoneConfig
from mdistiller.models import ModelConfig
from mdistiller.models.external import is_pretrained
from mdistiller.settings import Settings, unflatten
from mdistiller.types import Metric

SELF = "self"
"""Name of the teacher of a student that learns from its own moving average."""


class TeacherConfig(ModelConfig):
    """A further teacher of a run."""

    method: SerializeAsAny[MethodConfig] | None = None
    """Method of this teacher, without a task loss, which belongs to the run's method. None: the run's."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of the losses of a teacher with a method of its own."""
    cache_taps: tuple[str, ...] = ()
    """Features of this teacher to store in the run's `teacher_cache`, beside its logits."""


Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Settings):
    """Optimizer, learning-rate schedule and treatment of the gradient."""

    name: Literal["sgd", "adamw", "dot", "deepkd"] = "sgd"
    """Optimizer. `dot` is SGD with separate momenta for task and distillation (Zhao et al., ICCV 2023);
    `deepkd` has a third one, for distillation of the target class (Huang et al. 2025)."""
    lr: float = Field(default=0.05, gt=0)
    """Highest learning rate."""
    momentum: Momentum = 0.9
    """Momentum of SGD and DOT."""
    nesterov: bool = False
    """Use Nesterov momentum in SGD."""
    delta: float = Field(default=0.075, gt=0)
    """DOT: momentum minus delta for the task's gradient, momentum plus delta for the distillation's."""
    deltas: tuple[float, float, float] = (-0.075, -0.075, 0.05)
    """DeepKD: added to the momentum for the task's gradient, that of the target class (losses `tckd`) and
    that of all other distillation. The defaults are those with which the authors' code ran."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay: added to the gradient by SGD and DOT, decoupled in AdamW."""
    schedule: Literal["step", "cosine", "poly", "constant"] = "step"
    """Schedule of the learning rate after its warm-up. poly: (1 - fraction done) to the power 0.9."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Fractions of training at which `step` multiplies the rate by gamma (epochs 150, 180, 210 of 240)."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """Factor at each milestone."""
    lr_warmup: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of training over which the rate first rises linearly from zero."""
    lr_warmup_steps: int | None = Field(default=None, ge=1)
    """Steps over which the rate first rises, at most half of training. None: see `lr_warmup`."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient."""
    accumulate: int = Field(default=1, ge=1)
    """Split each batch into this many parts, to save memory. The gradient is that of the whole batch, but
    batch norm and losses that relate samples see one part at a time."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW: decay of the running means of the gradient and of its square."""
    min_lr: float = Field(default=0.0, ge=0, le=1)
    """Lowest learning rate of `cosine`, `poly` and `step`, as a fraction of lr."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from a layer to the layer before it. The classifier is the last layer, each
    block of a stage is one, the stem is the first; models of timm have timm's own layers. 1: one rate."""
    head_lr: float = Field(default=1.0, gt=0)
    """Factor of the learning rate of the classifier and of the method's own layers."""
    probe_lr: float | None = Field(default=None, gt=0)
    """Highest learning rate of the classifier in a probe. None: lr times head_lr, as afterwards."""
    norm_decay: bool = True
    """Apply weight decay to norms and biases too."""

    @property
    def momenta(self) -> dict[str, float]:
        """Added to the momentum for the gradient of each part of the loss; {}: there is one momentum."""
        if self.name == "dot":
            return {"task": -self.delta, "distillation": self.delta}
        names = ("task", "target", "distillation") if self.name == "deepkd" else ()
        return dict(zip(names, self.deltas, strict=False))

    def is_renamed_by(self, changes: Mapping[str, object]) -> bool:
        """Returns False: another optimizer keeps the other fields."""
        return False

    @field_validator("milestones")
    @classmethod
    def _ordered_fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(value) or not all(0 < v < 1 for v in value):
            raise ValueError("milestones are rising fractions of training, each between 0 and 1")
        return value

    @model_validator(mode="after")
    def _check_dot(self) -> OptimConfig:
        if self.momenta and (self.nesterov or self.clip_norm is not None):
            raise ValueError(f"name: {self.name!r} takes neither nesterov nor clip_norm")
        if not all(0 <= self.momentum + delta < 1 for delta in self.momenta.values()):
            is_dot = self.name == "dot"
            field, how = ("delta", "minus and plus delta") if is_dot else ("deltas", "plus each")
            raise ValueError(
                f"{field}: got {getattr(self, field)}; momentum {how} must lie in [0, 1), and momentum is "
                f"{self.momentum}"
            )
        return self


CompileMode = Literal["off", "default", "reduce-overhead"]
"""Modes of `torch.compile`, and off."""


class RunConfig(Settings):
    """One training run, whatever its task. A task's own config adds data and augmentation."""

    hidden_flags: ClassVar[tuple[str, ...]] = (
        *("task", "recipe", "plugins", "teacher_weight"),
        *(f"student.{name}" for name in ("mean", "std", "image_size", "images")),
    )

    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of an evaluation's metrics; the first one picks the best epoch, and more is better."""
    headline: ClassVar[Metric | None] = None
    """Presentation of the first metric. None: a plain number under its name."""

    task: str
    """Name of the task."""
    recipe: str = ""
    """Recipe from which the values came."""
    student: ModelConfig
    teacher: ModelConfig | None = None
    method: SerializeAsAny[MethodConfig] = NoneConfig()
    more_teachers: tuple[TeacherConfig, ...] = ()
    """Further teachers; on the command line NAME=CHECKPOINT each. In a file each may have a method, a weight
    and images of its own: the losses of all teachers are then added."""
    teacher_weight: float = Field(default=1.0, ge=0)
    """Factor of the first teacher's losses, where another teacher has a method of its own."""
    teacher_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a teacher's losses are left out of a step, of several teachers with losses each; at
    least one teacher stays."""
    optim: OptimConfig = OptimConfig()

    epochs: int = Field(default=240, ge=1)
    """Passes over the training set. Schedules are fractions of training and stretch with it."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps, if that is sooner; schedules then end there."""
    progress: Literal["exact", "floor", "ceil"] = "exact"
    """Granularity of a method's schedules, such as its warm-up. exact: with every step. floor: once an epoch,
    by the epochs done. ceil: the same with the current epoch included, as in the published code of DKD."""
    batch_size: int = Field(default=64, ge=1)
    """Images per optimizer step, over all processes together."""
    drop_last: bool = False
    """Leave out an epoch's last batch if it is smaller (batch norm cannot train on a single image)."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    """Images per evaluation batch and process. None: those of two million pixels, at most 500."""
    eval_every: int = Field(default=1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    save_minutes: float | None = Field(default=5.0, gt=0)
    """Minutes between saves of the state within an epoch, from which a killed run resumes; evaluations save
    it too. None: only evaluations do."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the student, which is evaluated and saved too."""
    save_epochs: tuple[int, ...] = ()
    """Epochs after which the student is saved as student-eEPOCH.safetensors in the run folder."""
    save_best: bool = False
    """Save the student of the best evaluation as student-best.safetensors in the run folder. It is picked on
    the test set: use it to ship, not to compare methods."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Autocast precision; float16 comes with loss scaling. Losses are computed in float32. auto: float32 or
    bfloat16, whichever takes less time in a few steps before the first; config.json has the choice."""
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Memory format of images and weights. auto: measured as for `precision`. Compiled runs and those of
    fewer than 400 steps are not measured: contiguous on a CPU, channels_last on a GPU."""
    compile: CompileMode = "off"
    """Run teacher and student through torch.compile. reduce-overhead: on a GPU, also replay the student's
    passes as CUDA graphs, which pays for small images; not tried on hardware."""
    deterministic: bool = False
    """On a GPU: use only kernels that give the same bits each time. CPUs always do."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps (Apple; not tried on hardware)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, the order of the samples and the augmentation."""
    log_every: int = Field(default=50, ge=1)
    """Steps averaged into one training line of metrics.jsonl."""
    log: tuple[Literal["mlflow", "tensorboard", "wandb"], ...] = ()
    """Loggers beside metrics.jsonl: MLflow, TensorBoard, Weights & Biases. May be given again."""
    plugins: tuple[Path, ...] = ()
    """Python files that registered methods, models, detectors and data sets: a record, which runs none."""
    out: Path | None = None
    """Run folder. None: the first free one of runs/RECIPE-sSEED, -2, -3, …"""
    probe_epochs: int = Field(default=0, ge=0)
    """First epochs in which only the classifier and the method's own layers train (a linear probe), on a
    student in evaluation mode. They and the later epochs have a whole learning-rate schedule each."""
    freeze: tuple[str, ...] = ()
    """Parts of the student that do not train and keep their running statistics: canonical names (stem,
    stage1, …) or module paths, separated by commas or spaces."""
    norm_eval: bool = False
    """Keep the student's batch norms in evaluation mode: running statistics stay those of the pretraining,
    scale and shift train."""
    patience: int | None = Field(default=None, ge=1)
    """End the run after this many epochs without a better evaluation of the student or of its moving average,
    the epochs of the probe not counted. The student of the best evaluation is saved as with save_best.
    None: never."""
    gradient_checkpointing: bool = False
    """Compute the activations within each block of the student again in the backward pass, with the same
    result. A step takes about a third more time and less memory."""
    ema_warmup: bool = False
    """Let the decay of the moving average rise: step n has min(ema, (1 + n) / (10 + n)). Short runs need
    it, whose average would hold mostly the first weights."""

    @field_validator("method", mode="before")
    @classmethod
    def _find_method(cls, value: object) -> object:
        if isinstance(value, str):
            return cls.method_named(value)
        if not isinstance(value, Mapping):
            return value
        name = value.get("name", "none")
        if not isinstance(name, str):
            raise ValueError(f"name: got {name!r}; allowed is the name of a method")
        return method_config(name, cls.method_class, **value)

    @field_validator("more_teachers", mode="before")
    @classmethod
    def _find_methods(cls, value: object) -> object:
        return tuple(map(cls._with_method, value)) if isinstance(value, list | tuple) else value

    @classmethod
    def _with_method(cls, teacher: object) -> object:
        values = dict(teacher) if isinstance(teacher, ModelConfig) else teacher
        if not isinstance(values, Mapping) or (given := values.get("method")) is None:
            return values
        if isinstance(given, Mapping) and given.get("task_weight"):
            raise ValueError("method.task_weight: the task loss belongs to the run's method; allowed: 0")
        found = cls._find_method(given)
        if isinstance(found, MethodConfig):
            if isinstance(given, Mapping):  # with the task's defaults beside them
                fields = {name: value for name, value in given.items() if name != "name"}
                found = cls.method_named(found.method_name).replace(**fields)
            found = found.replace(task_weight=0.0)
            if name := next(iter(open_weights(found)), None):
                raise ValueError(f"method.{name}: auto is measured for the run's method; allowed: a number")
        return {**values, "method": found}

    @field_validator("freeze")
    @classmethod
    def _split_commas(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(part for word in value for part in word.split(",") if part)

    @classmethod
    def main_metric(cls) -> Metric:
        """Returns the metric that picks the best epoch, with its presentation."""
        return cls.headline or Metric(cls.metrics[0])

    @property
    def data_settings(self) -> Settings | None:
        """Settings of the data set; None for a task whose configs have no settings in a field `data`."""
        found = getattr(self, "data", None)
        return found if isinstance(found, Settings) else None

    @property
    def teachers(self) -> list[ModelConfig]:
        """The teachers, the first one first; none for a run without a teacher other than itself."""
        return [self.teacher, *self.more_teachers] if self.teacher is not None and self.has_teacher else []

    @property
    def blends_teachers(self) -> bool:
        """Whether several teachers act as one, by the mean of their logits."""
        return False

    @property
    def has_own_methods(self) -> bool:
        """Whether a further teacher has a method of its own."""
        return any(teacher.method is not None for teacher in self.more_teachers)

    def by_teacher(self) -> list[tuple[Self, float]]:
        """Returns a config for each teacher, with that one alone, and the factor of its losses.

        It is this config where there is one teacher, or several that act as one.
        """
        if not self.more_teachers or not self.has_teacher or self.blends_teachers:
            return [(self, 1.0)]
        share = 1 / (1 + len(self.more_teachers))
        weights = [self.teacher_weight, *(teacher.weight for teacher in self.more_teachers)]
        found = [self.model_copy(update={"more_teachers": ()}), *map(self.with_teacher, self.more_teachers)]
        own = self.has_own_methods
        return [(part, weight if own else share) for part, weight in zip(found, weights, strict=True)]

    def with_teacher(self, teacher: TeacherConfig) -> Self:
        """Returns the run's config as if this further teacher were the only one."""
        update = {"teacher": teacher, "method": teacher.method or self.method, "more_teachers": ()}
        return self.model_copy(update=update)

    @property
    def learns_from_average(self) -> bool:
        """Whether the teacher is the student's own moving average."""
        return self.teacher is not None and self.teacher.name == SELF

    @property
    def has_teacher(self) -> bool:
        """Whether the run has a teacher other than its student's average."""
        needed = needs_teacher(self.method.method_name, self.method_class)
        return self.teacher is not None and self.teacher.name != SELF and needed

    @classmethod
    def method_class(cls, name: str) -> type[Method]:
        """Finds the class of a method for this task.

        Raises:
            UnknownNameError: no such method.
        """
        return get_method(name)

    @classmethod
    def method_named(cls, name: str) -> MethodConfig:
        """Returns a method's config with the task's defaults; errors as `method_class`."""
        return method_config(name, cls.method_class)

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether the task takes a method, by its name."""
        try:
            return bool(cls.method_class(name))
        except ConfigError:
            return False

    @classmethod
    def known_fields(cls, values: Mapping[str, object]) -> dict[str, type[BaseModel] | None]:
        method = values.get("method")
        name = method.get("name", "none") if isinstance(method, Mapping) else "none"
        try:
            kind = cls.method_class(name).Config if isinstance(name, str) else None
        except MDistillerError:  # an error of its own
            kind = None
        return {**super().known_fields(values), "method": kind}

    @model_validator(mode="after")
    def _check_fields(self) -> RunConfig:
        if self.optim.accumulate > self.batch_size:
            raise ValueError(
                f"optim.accumulate: got {self.optim.accumulate} parts for a batch of {self.batch_size}"
            )
        if self.optim.momenta and self.precision == "float16":
            raise ValueError(
                f"optim.name: {self.optim.name!r} takes precision float32 or bfloat16; got float16"
            )
        measured = open_weights(self.method)
        if measured and (self.learns_from_average or not self.method.task_weight):
            lack = "a teacher other than itself" if self.learns_from_average else "a task_weight above 0"
            raise ValueError(f"method.{measured[0]}: auto needs {lack}; allowed otherwise is a number")
        if name := next(iter(self.student.own_fields), None):
            raise ValueError(
                f"student.{name}: a student's images are the data's; allowed: None, and data.{name}"
            )
        if self.learns_from_average and self.teacher is not None and self.teacher.own_fields:
            raise ValueError(
                f"teacher.{self.teacher.own_fields[0]}: the teacher is the student's average and sees the "
                "student's images; allowed: None"
            )
        if self.probe_epochs >= self.epochs:
            raise ValueError(
                f"probe_epochs: got {self.probe_epochs}; allowed with epochs {self.epochs}: fewer than these"
            )
        if self.optim.momenta and self.probe_epochs:
            raise ValueError(f"probe_epochs: optim.name {self.optim.name!r} takes 0; got {self.probe_epochs}")
        self._check_teachers()
        if self.learns_from_average and self.ema is None:
            raise ValueError("ema: a student that learns from its own average needs the average's decay")
        return self

    def _check_teachers(self) -> None:
        more = self.more_teachers
        if more and (self.teacher is None or self.teacher.name == SELF):
            raise ValueError("more_teachers: the first one goes into teacher")
        for teacher in more:
            if teacher.name == SELF or not (
                teacher.checkpoint is not None or teacher.is_given or is_pretrained(teacher.options)
            ):
                raise ValueError(
                    "more_teachers: each needs a checkpoint, or an option for pretrained weights"
                )
            if teacher.cache_taps and "teacher_cache_taps" not in type(self).model_fields:
                raise ValueError("more_teachers: cache_taps: this task caches no teacher; allowed: none")
        if not self.has_own_methods and (
            self.teacher_weight != 1 or any(teacher.weight != 1 or teacher.cache_taps for teacher in more)
        ):
            raise ValueError(
                "more_teachers: weight, cache_taps and teacher_weight go with a method for one of them"
            )


MEASURED = ("precision", "layout")
"""Fields whose value `auto` is replaced by a measured choice when a run starts, beside a method's weights."""


def open_fields(config: RunConfig) -> list[str]:
    """Lists the fields, by dotted name, whose value `auto` is replaced by a measured one."""
    found = [name for name in MEASURED if getattr(config, name) == "auto"]
    return found + [f"method.{name}" for name in open_weights(config.method)]


def find_field(config: Settings, name: str) -> Any:
    """Returns the value of a field by its dotted name; None if there is no such field."""
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def with_choices(config: RunConfig, choices: Mapping[str, str | float]) -> RunConfig:
    """Returns a config with choices, by dotted name, in place of `auto`; other values stay."""
    found = {name: choices[name] for name in open_fields(config) if name in choices}
    return config.replace(**unflatten(found)) if found else config


def with_choices_of(config: RunConfig, other: RunConfig) -> RunConfig:
    """Returns a config with the values of another one in place of `auto`, and of a method's None."""
    names = [*open_fields(config), *(f"method.{name}" for name in unset(config.method))]
    found = {name: value for name in names if (value := find_field(other, name)) is not None}
    return config.replace(**unflatten(found)) if found else config
