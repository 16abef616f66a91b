"""Published runs as configs: the method's fields of a pair, and the run's optimizer, length and views."""

from mdistiller.methods import MethodConfig, method_config
from mdistiller.methods.compose import WrapperConfig
from mdistiller.methods.dkd import DKDConfig
from mdistiller.recipes.published import PublishedRun, run_of
from mdistiller.runs.config_file import Config
from mdistiller.types import Line


def tune(data: str, config: MethodConfig, pair: str, beta: float | None = None) -> MethodConfig:
    """Returns a method's config with the published values of a pair, or those for all pairs.

    Parts of a composed method get their own values, except for fields that the whole has set. A wrapper has
    the task_weight of its base. Values published for the composed method come last.

    Args:
        data: name of a file of published runs.
        config: the method's default config.
        pair: TEACHER_STUDENT.
        beta: DKD's β of the pair. None: that of the file.
    """
    config = _tune_parts(data, config, pair, beta)
    if isinstance(config, WrapperConfig):
        base = tune(data, method_config(config.base.method_name), pair, beta)
        config = config.model_copy(update={"task_weight": base.task_weight})
    return config.replace(**_values(data, config, pair, beta))


def _tune_parts(data: str, config: MethodConfig, pair: str, beta: float | None) -> MethodConfig:
    parts = {name: _tune_part(data, part, pair, beta) for name, part in config.parts().items()}
    return config.model_copy(update=parts)


def _tune_part(data: str, config: MethodConfig, pair: str, beta: float | None) -> MethodConfig:
    tuned, default = _tune_parts(data, config, pair, beta), method_config(config.method_name)
    return tuned.replace(**_unset(config, default, _values(data, config, pair, beta)))


def _values(data: str, config: MethodConfig, pair: str, beta: float | None) -> Line:
    run = run_of(data, config.method_name, pair)
    values = dict(run.method_fields)
    if "base" in values and "warmup" in values and "warmup" not in type(config).model_fields:
        values["base"] = values["base"] | {"warmup": values.pop("warmup")}
    if isinstance(config, DKDConfig):
        published = values.get("beta", 8.0) if beta is None else beta
        # A factor, because a wrapper of DKD may have raised both weights.
        values["beta"] = config.beta if isinstance(config.beta, str) else config.beta * published / 8.0
    return values


def _unset(config: MethodConfig, default: MethodConfig, values: Line) -> Line:
    """Returns the values of fields that the whole has left at the part's defaults.

    DKD's β is a factor already.
    """
    left: Line = {}
    for name, value in values.items():
        now, usual = getattr(config, name), getattr(default, name)
        if isinstance(now, MethodConfig):
            left[name] = _unset(now, usual, value)
        elif now == usual or (isinstance(config, DKDConfig) and name == "beta"):
            left[name] = value
    return left


def train_as(config: Config, run: PublishedRun) -> Config:
    """Returns a config with the optimizer, length, batch and views of a published run."""
    assert run.epochs is not None
    optim: Line = {"name": run.optimizer, "lr": run.lr, "momentum": run.momentum}
    optim |= {"nesterov": run.nesterov, "weight_decay": run.weight_decay, "norm_decay": run.norm_decay}
    optim |= {"clip_norm": run.clip_norm, "milestones": tuple(drop / run.epochs for drop in run.drops)}
    optim |= {"schedule": run.schedule, "lr_warmup": run.lr_warmup / run.epochs}
    optim |= {"min_lr": run.min_lr / run.lr}
    optim |= {} if run.delta is None else {"delta": run.delta}
    optim |= {} if run.deltas is None else {"deltas": run.deltas}
    changes: Line = {"optim": optim, "epochs": run.epochs, "batch_size": run.batch_size}
    changes |= {"augment": {"strong_policy": run.augment}} if run.augment else {}
    return config.replace(**changes)
