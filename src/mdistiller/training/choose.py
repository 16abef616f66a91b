"""Choice of precision, memory format and weights of losses by measuring the first steps."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice

import torch

from mdistiller.config import MEASURED, RunConfig, find_field, open_fields, with_choices
from mdistiller.methods import Method
from mdistiller.runs.progress import Reporter
from mdistiller.settings import unflatten
from mdistiller.training.balance import describe_weight, measure_weights
from mdistiller.training.batches import AnySource
from mdistiller.training.build import arrange, build_run, read_data
from mdistiller.training.distributed import World
from mdistiller.training.precision import has_fast_bfloat16
from mdistiller.training.task import AnyTask
from mdistiller.training.trainer import Trainer
from mdistiller.types import AnyBatch

_LEAST_STEPS = 400  # of a run in which a measurement takes less time than it can save
_ROUNDS = 4  # the first one warms up
_GAIN = 0.95  # a choice other than the plainest one has to take less than this share of its time


def build_fastest(
    task: AnyTask, config: RunConfig, world: World, reporter: Reporter
) -> tuple[RunConfig, Trainer, AnySource]:
    """Builds a run as `build_run`, with `auto` of precision, layout and weights replaced.

    The run is built once. What is measured on it is put back, so a run with choices has the bits of one whose
    config names them. Weights are measured for every run, precision and layout only for runs that are neither
    short nor compiled.
    """
    choices: list[dict[str, str | float]] = [{**choice} for choice in candidates(config, world.device)]
    data = read_data(task, config, world)
    weights = [name for name in open_fields(config) if name not in MEASURED]
    found: dict[str, str | float] = {**dict.fromkeys(weights, 1.0), **choices[0]}
    trainer, source = build_run(task, with_choices(config, found), world, data)
    config = trainer.config.replace(**unflatten({name: find_field(config, name) for name in found}))

    def switch(choice: Mapping[str, str | float]) -> None:
        found.update(choice)
        chosen = with_choices(config, found)
        _set_weights(trainer, weights, chosen)
        arrange(task, chosen, data, trainer, source)

    if len(choices) > 1 and trainer.total >= _LEAST_STEPS:
        raw, times = list(islice(source.loader.epoch(0), source.lookahead)), []
        for choice in choices:
            with put_back(trainer):
                switch(choice)
                times.append(_measure(trainer, source, raw, world))
        switch(_fastest(choices, times, reporter))
    if weights:
        with put_back(trainer):
            measured = measure_weights(trainer, source, weights, task.auto_ratio)
        for name, weight in measured.items():
            reporter.note(describe_weight(config, name, weight, task.auto_ratio))
        switch(measured)
    return trainer.config, trainer, source


@contextmanager
def put_back(trainer: Trainer) -> Iterator[None]:
    """Context in which a run may train: weights and buffers, and their memory, are put back afterwards."""
    modules = [m for m in (trainer.distiller, trainer.ema, trainer.distiller.asked) if m is not None]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    kept = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.clone()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data, tensor.grad = data, None


def _set_weights(trainer: Trainer, names: Sequence[str], config: RunConfig) -> None:
    """Gives the methods of a run the weights in a config."""
    methods = [m for m in trainer.distiller.modules() if isinstance(m, Method)]
    paths = [part for name in names for part in accumulate(name.split(".")[:-1], "{}.{}".format)]
    for path in dict.fromkeys(paths):
        old, new = (find_field(source, path) for source in (trainer.config, config))
        for method in methods:
            if method.config is old:
                method.config = new


def candidates(config: RunConfig, device: torch.device) -> list[dict[str, str]]:
    """Lists the values of precision and layout that a config leaves open; the first is the rule's choice."""
    layouts = ["channels_last", "contiguous"] if device.type == "cuda" else ["contiguous", "channels_last"]
    precisions = ["float32", "bfloat16"] if has_fast_bfloat16(device) else ["float32"]
    if device.type == "cuda":
        precisions.reverse()
    if config.layout != "auto":
        layouts = [config.layout]
    if config.precision != "auto":
        precisions = [config.precision]
    found = [{"precision": p, "layout": layout} for p in precisions for layout in layouts]
    # Compilation of each candidate would take longer than it can save.
    return found[:1] if config.compile != "off" else found


def _measure(trainer: Trainer, source: AnySource, raw: Sequence[AnyBatch], world: World) -> float:
    """Returns the milliseconds of a step: the least of some rounds, of the processor's time on a CPU."""
    # Other processes stretch the clock's time; which candidate they hit is chance.
    clock = time.process_time if world.device.type == "cpu" else time.perf_counter
    seconds = []
    for _ in range(_ROUNDS):
        start = clock()
        trainer.distiller.train()
        batches = source.prepare(raw, 0)
        outputs = trainer.distiller.ask_ahead(batches)
        for batch, teacher in zip(batches, outputs, strict=True):
            trainer.update(batch, teacher, trainer.learning_rate(0), 0.0)
        if world.device.type != "cpu":
            getattr(torch, world.device.type).synchronize()
        seconds.append(clock() - start)
    # The mean over processes, so that all of them choose the same.
    least = torch.tensor(min(seconds[1:]), device=world.device)
    return 1000 * world.mean(least).item() / len(raw)


def _fastest(
    choices: Sequence[dict[str, str | float]], times: Sequence[float], reporter: Reporter
) -> dict[str, str | float]:
    """Returns the choice that takes the least time, and shows the times."""
    chosen = choices[min(range(len(choices)), key=times.__getitem__)]
    if min(times) >= _GAIN * times[0]:
        chosen = choices[0]
    texts = [f"{c['precision']} {c['layout']} {t:.1f}" for c, t in zip(choices, times, strict=True)]
    reporter.note(f"precision {chosen['precision']}, layout {chosen['layout']}; ms/step: {', '.join(texts)}")
    return chosen
