"""One run, fully described: what recipes return, flags override and `config.json` holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import tyro
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import Method, MethodConfig, NoneConfig, get_method, load_plugin
from mdistiller.models import ModelConfig

SELF = "self"
"""The teacher's name where the student learns from its own moving average."""
DETECTION = "coco"
"""The kind of data that tells a detection run's config from a classification run's."""


class OptimConfig(BaseModel):
    """Optimizer, learning-rate schedule, and what happens to the gradient."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: float = Field(default=0.05, gt=0)
    """Learning rate at its highest."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of it."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay: added to the gradient by SGD, decoupled in AdamW."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """How the learning rate falls."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Where `step` multiplies the rate by gamma, as fractions of training (epochs 150, 180, 210 of 240)."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """Factor at each milestone."""
    lr_warmup: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of training over which the rate first rises linearly from zero."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient."""
    dot_delta: float | None = Field(default=None, gt=0)
    """DOT (Zhao et al., ICCV 2023): the task's gradient gets momentum less this, the distillation's
    momentum plus this."""
    accumulate: int = Field(default=1, ge=1)
    """Pass each batch in this many parts, to save memory. The gradient is that of the whole batch, but
    batch norm and losses that relate samples see one part at a time."""

    @field_validator("milestones")
    @classmethod
    def _ordered_fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(value) or not all(0 < v < 1 for v in value):
            raise ValueError("milestones are rising fractions of training, each between 0 and 1")
        return value

    @model_validator(mode="after")
    def _dot_fits(self) -> OptimConfig:
        if self.dot_delta is None:
            return self
        if self.name != "sgd" or self.nesterov or self.clip_norm is not None:
            raise ValueError("dot_delta: DOT is a form of plain SGD: no adamw, nesterov or clip_norm")
        if not self.dot_delta <= min(self.momentum, 0.999999 - self.momentum):
            raise ValueError(
                f"dot_delta: got {self.dot_delta}; momentum less and plus it must lie in [0, 1), "
                f"and momentum is {self.momentum}"
            )
        return self


class TrainConfig(BaseModel):
    """A training run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: ClassVar[str] = "mdistiller train"
    """The command that trains by such a config."""
    figures: ClassVar[tuple[str, ...]] = ("top1", "top5", "loss")
    """What an evaluation gives; the first is compared, and the higher the better."""

    recipe: Annotated[str, tyro.conf.Suppress] = ""
    """Where the defaults came from."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    student: ModelConfig
    teacher: ModelConfig | None = None
    more_teachers: tuple[str, ...] = ()
    """Further teachers, each as MODEL=CHECKPOINT."""
    ensemble: Literal["logits", "losses"] = "logits"
    """With several teachers: distil from the mean of their logits, or average the losses of all."""
    method: SerializeAsAny[MethodConfig] = NoneConfig()
    optim: OptimConfig = OptimConfig()

    teacher_batch: int | None = Field(default=None, ge=1)
    """Images in one pass of the teacher, which runs ahead of the student by whole batches. None: one batch
    on a CPU; on a GPU as many as have the pixels of 1,024 images of 32 x 32, but at least one batch."""
    teacher_table: Path | None = None
    """A folder that keeps the teacher's logits for every crop and flip of every training image. The first
    run with a teacher computes them, and later ones need no pass of it. Methods that read features, or
    several views, go on with the teacher itself. None: no table."""

    epochs: int = Field(default=240, ge=1)
    """Passes over the training set. Schedules are fractions of training and stretch along."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps, if that is sooner; schedules then end there."""
    batch_size: int = Field(default=64, ge=1)
    """Images per optimizer step, over all processes together."""
    drop_last: bool = False
    """Leave out an epoch's last batch if it is smaller (batch norm cannot train on a single image)."""
    eval_batch_size: int = Field(default=500, ge=1)
    """Images per evaluation batch and process."""
    eval_every: int = Field(default=1, ge=1)
    """Evaluate after every so many epochs, and after the last."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the student, which is evaluated and saved too."""
    keep_epochs: tuple[int, ...] = ()
    """Keep the student as it is after these epochs, as student-eEPOCH.safetensors in the run folder."""
    keep_best: bool = False
    """Keep the student of the best evaluation, as student-best.safetensors in the run folder. It is picked on
    the test set: to ship, not to compare methods by."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision; float16 comes with loss scaling. Losses are computed in float32."""
    channels_last: bool = True
    """Memory format of images and weights."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time. CPUs always do."""
    compile: bool = False
    """Run teacher and learner through torch.compile."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """On a GPU, capture the whole step in a CUDA graph and replay it. auto: where that can be, which is not
    with several processes, float16, DOT, streamed images, plug-ins or `deterministic`. on: with plug-ins and
    `deterministic` too; whatever else is in the way is an error."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, the order of the samples and the augmentation."""
    log_every: int = Field(default=50, ge=1)
    """Steps averaged into one training line of metrics.jsonl."""
    diagnostics: bool = True
    """With each evaluation, compare student and teacher on the test images and 1,000 training images: TCKD
    and NCKD, confidence, logit gap, agreement, calibration."""
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.UseAppendAction] = ()
    """Where else the figures go: TensorBoard, Weights & Biases. May be given again."""
    plugins: Annotated[tuple[Path, ...], tyro.conf.Suppress] = ()
    """Python files that are run first: their @register and @register_model calls add methods and models."""
    out: Path | None = None
    """The run folder. None: the first free one of runs/RECIPE-sSEED, -2, -3, …"""

    @model_validator(mode="before")
    @classmethod
    def _load_plugins(cls, values: Any) -> Any:
        if isinstance(values, dict):
            plugins = values.get("plugins")
            for path in plugins if isinstance(plugins, list | tuple) else ():
                if isinstance(path, str | Path):  # anything else is refused with the other fields
                    load_plugin(path)
        return values

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        if isinstance(value, dict):
            name = value.get("name", "none")
            if not isinstance(name, str):
                raise ValueError(f"name: got {name!r}; allowed is the name of a method")
            return cls.method_class(name).Config.model_validate(value)
        return value

    @classmethod
    def method_class(cls, name: str) -> type[Method]:
        """The class of a method's name.

        Raises:
            UnknownNameError: no such method.
        """
        return get_method(name)

    def absolute(self) -> Self:
        """The same with absolute paths, so that it repeats from any folder."""

        def model(m: ModelConfig | None) -> ModelConfig | None:
            if m is None or m.checkpoint is None:
                return m
            return m.model_copy(update={"checkpoint": m.checkpoint.absolute()})

        def teacher(text: str) -> str:
            name, _, checkpoint = text.partition("=")
            return f"{name}={Path(checkpoint).absolute()}"

        return self.model_copy(
            update={
                "data": self.data.model_copy(update={"root": self.data.root.absolute()}),
                "student": model(self.student),
                "teacher": model(self.teacher),
                "more_teachers": tuple(map(teacher, self.more_teachers)),
                "teacher_table": self.teacher_table and self.teacher_table.absolute(),
                "out": self.out and self.out.absolute(),
            }
        )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.optim.accumulate > self.batch_size:
            raise ValueError(
                f"optim.accumulate: got {self.optim.accumulate} parts for a batch of {self.batch_size}"
            )
        if self.optim.dot_delta is not None and self.precision == "float16":
            raise ValueError("optim.dot_delta: DOT takes precision float32 or bfloat16; got float16")
        if self.teacher is not None and self.teacher.name == SELF and self.ema is None:
            raise ValueError("ema: a student that learns from its own average needs the average's decay")
        for text in self.more_teachers:
            if not all(text.partition("=")[::2]):
                raise ValueError(f"more_teachers: got {text!r}; each is MODEL=CHECKPOINT")
        if self.more_teachers and (self.teacher is None or self.teacher.name == SELF):
            raise ValueError("more_teachers: the first one goes into teacher")
        return self


Kind = TypeVar("Kind", bound=TrainConfig)


def explain(
    error: ValidationError,
    what: str,
    prefix: str = "",
    values: Any = None,
    kind: type[BaseModel] = TrainConfig,
) -> ConfigError:
    """Pydantic's report as one message: each field's dotted name, what is wrong, what was given.

    Args:
        error: the report.
        what: where the values came from.
        prefix: put before each field's name, `--` for flags.
        values: a config's, as they were given: an unknown field then gets its nearest names.
        kind: the config's class.
    """
    lines = []
    for e in error.errors():
        # A key may be any text, line breaks too.
        field = ".".join(part if (part := str(p)).isprintable() else ascii(part) for p in e["loc"])
        if prefix.startswith("--"):
            field = field.replace("_", "-")
        message = " ".join(e["msg"].removeprefix("Value error, ").split())
        cause = e.get("ctx", {}).get("error")
        if isinstance(cause, UnknownNameError):
            message = cause.for_command()
        if e["type"] == "extra_forbidden" and values is not None:
            near = UnknownNameError("field", str(e["loc"][-1]), _fields_beside(e["loc"], values, kind))
            message += ", " + str(near).partition("; ")[2]
        given = e["input"]
        plain = all(isinstance(v, _PLAIN) for v in (given if isinstance(given, list | tuple) else [given]))
        shown = f" (got {_clip(repr(given))})" if plain else ""
        lines.append(f"{prefix}{field}: {message}{shown}" if field else message)
    return ConfigError(f"{what}: " + "; ".join(lines))


_PLAIN = (str, int, float, bool, type(None), Path)


def _clip(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


def _fields_beside(loc: tuple[int | str, ...], values: Any, whole: type[BaseModel]) -> Iterable[str]:
    """The known fields of the config that an unknown field, at `loc` in the whole one, was given for."""
    model: type[BaseModel] = whole
    for part in loc[:-1]:
        if issubclass(model, TrainConfig) and part == "method":
            model = model.method_class(values["method"].get("name", "none")).Config
            continue
        annotation = model.model_fields[str(part)].annotation
        kinds = (annotation, *get_args(annotation))
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return model.model_fields


def load_config(path: Path) -> TrainConfig:
    """Read a `config.json`, or one of the same form; see `load_kind`."""
    return load_kind(TrainConfig, path)


def load_kind(kind: type[Kind], path: Path) -> Kind:
    """Read a `config.json` of a kind of run, or a file of the same form.

    Raises:
        ConfigError: the file is missing, is no JSON, is of another kind, or has a field that is unknown or
            wrong.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    data = values.get("data") if isinstance(values, dict) else None
    given = data.get("kind") if isinstance(data, dict) else None
    command = "mdistiller detect train" if given == DETECTION else TrainConfig.command
    if isinstance(given, str) and command != kind.command:
        raise ConfigError(f"{path} has data.kind {given!r}, so it is for `{command}`")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise explain(error, str(path), values=values, kind=kind) from error
