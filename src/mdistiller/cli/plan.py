"""Plan of a run, printed before its first step: models, data, method, steps, cache and output."""

import math
import textwrap
from collections.abc import Iterator

import torch
from torch import nn

from mdistiller.config import MEASURED, RunConfig, open_fields, with_choices
from mdistiller.deploy.measure import count_macs
from mdistiller.errors import ConfigError
from mdistiller.models import ModelConfig
from mdistiller.models.own_input import without_own_input
from mdistiller.recipes.describe import describe_length, describe_source, method_lines
from mdistiller.runs.folder import CONFIG, free_folder
from mdistiller.runs.progress import ProgressDisplay
from mdistiller.taps import without_storage
from mdistiller.training.balance import first_strengths
from mdistiller.training.batches import AnySource
from mdistiller.training.build import build_run, read_data
from mdistiller.training.cached_teacher import CachedTeacher
from mdistiller.training.choose import candidates, put_back
from mdistiller.training.distributed import process_group
from mdistiller.training.task import get_task
from mdistiller.training.trainer import Trainer

_COLUMN = 11  # of the texts, after their subjects
_VALUES = 6  # hyperparameters of a method that are shown


class PlannedDisplay(ProgressDisplay):
    """Progress on the screen, after the plan of the run."""

    def built(self, trainer: Trainer, source: AnySource) -> None:
        super().built(trainer, source)
        self.show(plan_lines(trainer, source))

    def show(self, lines: list[str]) -> None:
        """Prints the lines of a plan, folded in a terminal."""
        for line in lines:
            width = self.console.width if self.console.is_terminal else len(line) + 1
            folded = textwrap.wrap(
                line, width, subsequent_indent=" " * _COLUMN, break_on_hyphens=False, break_long_words=False
            )
            self.note("\n".join(folded))


def print_plan(config: RunConfig, display: PlannedDisplay) -> None:
    """Builds a run, without its folder, and prints its plan.

    Raises:
        MDistillerError: as the run itself would before its first step.
    """
    if config.out is not None and (config.out / CONFIG).exists():
        raise ConfigError(f"out: {config.out} holds a run already; choose another folder")
    task = get_task(config.task)
    config = task.resolve(config)
    with process_group(config.device) as world:
        data = read_data(task, config, world)
        # What is measured before the first step has no part in the plan, and any value serves.
        values: dict[str, str | float] = {n: 1.0 for n in open_fields(config) if n not in MEASURED}
        values.update(candidates(config, world.device)[0])
        chosen = with_choices(config, values)
        trainer, source = build_run(task, chosen, world, data)
        if world.is_main:
            display.show(plan_lines(trainer, source, config))


def plan_lines(trainer: Trainer, source: AnySource, config: RunConfig | None = None) -> list[str]:
    """Returns the plan of a run that is built, a line a subject; `config` may leave choices open."""
    config = config or trainer.config
    precision = "precision by measurement" if config.precision == "auto" else config.precision
    processes = f", {trainer.world.size} processes" if trainer.world.size > 1 else ""
    student = _model(config.student, trainer.student, source)
    lines = [
        ("data", trainer.description),
        ("model" if config.method.method_name == "none" else "student", student),
        *((f"teacher {number}".strip(), text) for number, text in _teachers(config, trainer, source)),
        ("method", "; ".join([_method(config), *_strengths(config, trainer, source)])),
        ("steps", _steps(trainer)),
        ("compute", f"{trainer.world.device}, {precision}" + processes),
    ]
    asked = trainer.distiller.asked
    for cache in () if asked is None else asked.members:
        if isinstance(cache, CachedTeacher):
            folder = getattr(config, "teacher_cache", "")
            lines.append(("cache", f"{folder}, {short(cache.full_bytes())}B when full"))
    out = trainer.run.path if trainer.run is not None else config.out
    lines.append(("output", str(out or free_folder(f"{config.recipe or 'run'}-s{config.seed}"))))
    return [f"{name + ':':<{_COLUMN}}{text}" for name, text in lines]


def _teachers(config: RunConfig, trainer: Trainer, source: AnySource) -> Iterator[tuple[str, str]]:
    if config.learns_from_average:
        yield "", "the student's moving average"
    given, parts, networks = config.teachers, config.by_teacher(), trainer.distiller.teachers
    if len(parts) == 1 and networks:
        networks = getattr(networks[0], "members", networks)
    for number, (model, network) in enumerate(zip(given, networks, strict=False), 1):
        text = _model(model, network, source)
        if len(parts) > 1:
            part, weight = parts[number - 1]
            text += f", {part.method.method_name} times {weight:g}"
        yield (str(number) if len(given) > 1 else "", text)


def _model(config: ModelConfig, model: nn.Module, source: AnySource) -> str:
    """Returns name, parameters, multiply-accumulates and origin of the weights of a model."""
    count = sum(p.numel() for p in model.parameters())
    text = f"{config.name}, {short(count)} parameters"
    if source.shape is not None:
        channels, size, _ = source.shape
        macs = _macs(model, channels, config.image_size or size)
        text += f", {short(macs)} MACs an image" if macs else ""
    pretrained = any(config.options.get(name) for name in ("pretrained", "weights"))
    start = "pretrained backbone" if config.options.get("backbone_weights") else "random weights"
    return f"{text}, {config.checkpoint or ('pretrained' if pretrained else start)}"


def _macs(model: nn.Module, channels: int, size: int) -> int:
    """Counts multiply-accumulates on a copy without storage; 0 where the model does not run on one."""
    try:
        copy = without_storage(without_own_input(model)).eval()
        return count_macs(copy, torch.zeros(1, channels, size, size, device="meta"))
    except Exception:  # a model that branches on values; the plan is the poorer, and the run goes on
        return 0


def _method(config: RunConfig) -> str:
    name = config.method.method_name
    if name == "none":
        return "none: trained on the labels alone"
    source = describe_source(config)
    values = [line for line in method_lines(config.method.model_dump(), "") if "task_weight" not in line]
    text = f"{name}: {', '.join(values[:_VALUES])}{', …' * (len(values) > _VALUES)}" if values else name
    return f"{text}; settings: {source}" if source else text


def _strengths(config: RunConfig, trainer: Trainer, source: AnySource) -> Iterator[str]:
    """Yields a text about each method's gradient, with a warning where it is far from the task's."""
    is_open = trainer.step or any(name not in MEASURED for name in open_fields(config))
    # One process prints the plan, and a measurement needs all of them.
    if is_open or trainer.world.size > 1 or trainer.distiller.asked is None:
        return
    if not get_task(config.task).shows_strength:
        return
    with put_back(trainer):
        found = first_strengths(trainer, source)
    for name, ratio in found.items():
        size = f"{name}'s gradient is {float(f'{ratio:.2g}'):g} times the task's"
        far = ratio and not 0.1 <= ratio <= 10
        yield size + " (warning: outside the usual 0.1 to 10; try another weight)" * bool(far)


def _steps(trainer: Trainer) -> str:
    config = trainer.config
    epochs = math.ceil(trainer.total / trainer.steps)
    text = f"{trainer.total:,} of batch {config.batch_size} in {epochs:,} epoch{'s' * (epochs != 1)}"
    length = describe_length(config)
    return f"{text}; {length}" if length else text


def short(count: float) -> str:
    """Returns a count with three digits and a unit, such as `1.23 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
