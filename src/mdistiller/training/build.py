"""Trainers from configs: data, models, method, prepared batches, step and evaluation."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.config import RunConfig
from mdistiller.errors import ConfigError
from mdistiller.models.checkpointing import checkpoint_blocks
from mdistiller.models.quantize import train_rounded
from mdistiller.training.batches import BatchSource
from mdistiller.training.distributed import World
from mdistiller.training.phases import Phases
from mdistiller.training.precision import lay_out, memory_format
from mdistiller.training.step import TrainStep
from mdistiller.training.task import Task
from mdistiller.training.trainer import Trainer


def read_data(task: Task, config: RunConfig, world: World) -> Any:
    """Checks a config, then reads its data.

    Raises:
        ConfigError, CheckpointError: a config that cannot work, as `Task.check`; the data is not read.
    """
    if config.batch_size % world.size:
        raise ConfigError(f"batch_size: {config.batch_size} does not divide among {world.size} processes")
    task.check(config)
    return task.load_data(config)


def build_run(task: Task, config: RunConfig, world: World, data: Any = None) -> tuple[Trainer, BatchSource]:
    """Builds the trainer of a run and its batches; `data` is the value of `read_data`, or None to read it."""
    data = read_data(task, config, world) if data is None else data
    torch.backends.cudnn.benchmark = (
        task.fixed_shapes and world.device.type == "cuda" and not config.deterministic
    )
    teacher = None
    if config.has_teacher:
        torch.manual_seed(config.seed)
        teacher = task.build_teacher(config, data)
    source = task.make_batches(config, data, world)
    size = getattr(source.loader, "size", config.batch_size)
    if config.batch_size > size and world.is_main:
        warnings.warn(
            f"batch_size: got {config.batch_size} for {size:,} training images; each epoch is one step on "
            "all of them, so that schedules and norms see few steps. A smaller --batch-size gives more",
            stacklevel=2,
        )
    # Seeded here, so that every method's student starts from the same weights.
    torch.manual_seed(config.seed)
    trainer = build_trainer(task, config, data, task.build_student(config, data), teacher, source, world)
    task.check_step(config, trainer.learner, source, data)
    return trainer, source


def build_trainer(
    task: Task,
    config: RunConfig,
    data: Any,
    student: nn.Module,
    teacher: nn.Module | None,
    source: BatchSource,
    world: World,
) -> Trainer:
    """Builds the trainer of a run, which the source of prepared batches then serves.

    The student is trained in place, unless its method works on a copy. Without a teacher, it learns from the
    labels, or from its own moving average.
    """
    ema = None
    if config.learns_from_average and teacher is None:
        ema = AveragedModel(student, use_buffers=True).eval()
        teacher = ema.module
    method = task.build_method(config, student, teacher, data)
    extended = method.extend_student(student)
    if config.student.qat:
        train_rounded(extended)
    if extended is not student and ema is not None:
        raise ConfigError(f"method {config.method.method_name!r} needs a teacher other than itself")
    if config.ema is not None and ema is None:
        ema = AveragedModel(extended, use_buffers=True).eval()
    task.check_models(config, extended, teacher, method, data)
    # The student's own average changes with every step.
    fixed = ema is None or teacher is not ema.module
    source.serve(method, teacher, fixed=fixed)
    student_parameters = sum(p.numel() for p in student.parameters())
    learner = task.student_with_method(config, extended, method, data).to(world.device)
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    # A method that extends the student works on a copy, which has the student's class.
    own = next((m for m in extended.modules() if type(m) is type(student)), extended)
    head = task.head(student) if config.probe_epochs else ()
    phases = Phases(own, config.freeze, head, norm_eval=config.norm_eval)
    if config.gradient_checkpointing:
        if config.compile != "off":
            raise ConfigError("gradient_checkpointing: it does not go with compile; switch one of them off")
        checkpoint_blocks(own)
    if ema is not None:
        ema.to(world.device)
    for module in (learner, ema):  # an average of another layout would be slow to follow
        if module is not None:
            lay_out(module, memory_format(config.layout))
    step = TrainStep(config, learner, ema, world, task.batch_metrics, student=own)
    return Trainer(
        config,
        world,
        description=data.description,
        metadata={"task": task.name, **task.metadata(config, data, is_extended=extended is not student)},
        student=extended,
        step=step,
        phases=phases,
        ema=ema,
        steps=len(source.loader),
        evaluator=task.make_evaluator(config, data, source, teacher if fixed else None, world),
        parameters={
            "student_parameters": student_parameters,
            "method_parameters": trained - student_parameters,
        },
    )
