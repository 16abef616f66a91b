"""Trainers from configs: data, models, method, prepared batches, step and evaluation."""

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.config import RunConfig
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.methods.several import Several
from mdistiller.models.checkpointing import checkpoint_blocks
from mdistiller.teacher import Teacher, Teachers
from mdistiller.training.batches import AnySource
from mdistiller.training.distributed import World
from mdistiller.training.phases import Phases
from mdistiller.training.precision import lay_out, memory_format, torch_dtype
from mdistiller.training.task import AnyTask, Data
from mdistiller.training.trainer import Trainer
from mdistiller.training.update import Update


def read_data(task: AnyTask, config: RunConfig, world: World) -> Data:
    """Checks a config, then reads its data.

    Raises:
        ConfigError, CheckpointError: a config that cannot work, as `Task.check`; the data is not read.
    """
    if config.batch_size % world.size:
        raise ConfigError(f"batch_size: {config.batch_size} does not divide among {world.size} processes")
    parts = config.by_teacher()
    if config.teacher_dropout and len(parts) == 1:
        raise ConfigError(
            "teacher_dropout: it leaves out one of several teachers, each with losses of its own; allowed "
            "otherwise: 0"
        )
    for part, _ in parts:
        task.check(part)
    return task.load_data(config)


def build_run(
    task: AnyTask, config: RunConfig, world: World, data: Data | None = None
) -> tuple[Trainer, AnySource]:
    """Builds the trainer of a run and its batches; `data` is the value of `read_data`, or None to read it."""
    data = read_data(task, config, world) if data is None else data
    torch.backends.cudnn.benchmark = (
        task.fixed_shapes and world.device.type == "cuda" and not config.deterministic
    )
    teacher = None
    if config.has_teacher:
        torch.manual_seed(config.seed)
        teacher = [task.build_teacher(part, data) for part, _ in config.by_teacher()]
    source = task.make_batches(config, data, world)
    size = getattr(source.loader, "size", config.batch_size)
    if config.batch_size > size and world.is_main:
        warnings.warn(
            f"batch_size: got {config.batch_size} for {size:,} training images; each epoch is one step on "
            "all of them, so that schedules and norms see few steps. A smaller batch_size gives more",
            stacklevel=2,
        )
    # Seeded here, so that every method's student starts from the same weights.
    torch.manual_seed(config.seed)
    trainer = build_trainer(task, config, data, task.build_student(config, data), teacher, source, world)
    task.check_step(config, trainer.distiller, source, data)
    return trainer, source


def build_trainer(
    task: AnyTask,
    config: RunConfig,
    data: Data,
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    source: AnySource,
    world: World,
) -> Trainer:
    """Builds the trainer of a run, which the source of prepared batches then serves.

    The student is trained in place, unless its method works on a copy. Without a teacher, it learns from the
    labels, or from its own moving average. Of several teachers, each has its part of `config.by_teacher()`.
    """
    config, ema = task.settle(config, student), None
    if config.learns_from_average and teacher is None:
        ema = AveragedModel(student, use_buffers=True).eval()
        teacher = ema.module
    parts = config.by_teacher()
    teachers = [teacher] if isinstance(teacher, nn.Module | None) else teacher
    built = []
    for (part, _), given in zip(parts, teachers, strict=True):
        model = given.model if isinstance(given, Teacher) else given
        built.append((part, given, model, task.build_method(part, student, model, data)))
    method: Method = built[0][3]
    if len(built) > 1:
        weights = [weight for _, weight in parts]
        method = Several([own for *_, own in built], weights, config.teacher_dropout)
    extended = method.extend_student(student)
    if extended is not student and ema is not None:
        raise ConfigError(f"method {config.method.method_name!r} needs a teacher other than itself")
    if config.ema is not None and ema is None:
        ema = AveragedModel(extended, use_buffers=True).eval()
    # The student's own average changes with every step.
    fixed = ema is None or teacher is not ema.module
    source.num_views = method.needs.views
    asked: list[Teacher] = []
    for part, given, model, own in built:
        task.check_models(part, extended, model, own, data)
        if given is not None:
            asked.append(source.teacher_for(own, given, part, fixed=fixed))
    whole = Teachers(asked) if len(asked) > 1 else next(iter(asked), None)
    student_parameters = sum(p.numel() for p in student.parameters())
    distiller = task.build_distiller(config, extended, whole, method, data).to(world.device)
    trained = sum(p.numel() for p in distiller.parameters() if p.requires_grad)
    # A method that extends the student works on a copy, which has the student's class.
    inner = next((m for m in extended.modules() if type(m) is type(student)), extended)
    head = task.head(student) if config.probe_epochs else ()
    phases = Phases(inner, config.freeze, head, norm_eval=config.norm_eval)
    if config.gradient_checkpointing:
        if config.compile != "off":
            raise ConfigError("gradient_checkpointing: it does not go with compile; switch one of them off")
        checkpoint_blocks(inner)
    if ema is not None:
        ema.to(world.device)
    trainer = Trainer(
        config=config,
        world=world,
        description=data.description,
        identify=partial(task.identify, config, data),
        student=extended,
        distiller=distiller,
        phases=phases,
        ema=ema,
        steps=len(source.loader),
        parameters={
            "student_parameters": student_parameters,
            "method_parameters": trained - student_parameters,
        },
        is_extended=extended is not student,
    )
    arrange(task, config, data, trainer, source)
    return trainer


def arrange(task: AnyTask, config: RunConfig, data: Data, trainer: Trainer, source: AnySource) -> None:
    """Puts a built run into the precision and memory format of a config, with a new optimizer.

    The config differs from that of the build in these fields and in weights of losses alone.
    """
    distiller, world, layout = trainer.distiller, trainer.world, memory_format(config.layout)
    source.arrange(torch_dtype(config.precision), layout, distiller.asked)
    for module in (distiller, trainer.ema, distiller.asked):  # an average of another layout is slow to follow
        if module is not None:
            lay_out(module, layout)
    trainer.config = config
    trainer.metadata = {"task": task.name}
    trainer.metadata |= task.metadata(config, data, is_extended=trainer.is_extended)
    trainer.update = Update(
        config, distiller, trainer.ema, world, task.batch_metrics, student=trainer.phases.student
    )
    ahead = distiller.asked if not config.learns_from_average else None
    # Those that run on test images.
    members = [t.model for t in ahead.members if not t.needs_index] if ahead is not None else []
    teacher = nn.ModuleList(members) if len(members) > 1 else next(iter(members), None)
    trainer.evaluator = task.make_evaluator(config, data, source, teacher, world)
