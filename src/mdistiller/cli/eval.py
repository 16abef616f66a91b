"""`mdistiller eval MODEL`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from pydantic import ValidationError

from mdistiller.cli.options import parse_command
from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data, make_loader
from mdistiller.engine.config import explain
from mdistiller.engine.distributed import world
from mdistiller.engine.evaluate import evaluate
from mdistiller.engine.teachers import build_model
from mdistiller.methods import load_plugin
from mdistiller.models import ModelConfig, create_model
from mdistiller.models.registry import Options
from mdistiller.models.weights import find_weights


@dataclass(frozen=True)
class EvalCommand:
    """Top-1 and top-5 accuracy and cross-entropy of a model on a test set."""

    model: tyro.conf.Positional[str]
    """A name from `mdistiller list models`, or timm/NAME, or torchvision/NAME."""
    checkpoint: Path
    """Its weights: a .safetensors or torch file, or a run folder."""
    data: DataConfig = field(default_factory=DataConfig)
    options: Options = field(default_factory=dict)
    """Further arguments of the model function."""
    batch_size: int = 500
    """Images at a time."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose @register and @register_model calls add methods and models (code: it is run). May
    be given again."""
    json: bool = False
    """Print the figures as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Run `mdistiller eval`."""
    c = parse_command(EvalCommand, args, prog="mdistiller eval")
    for path in c.plugin:
        load_plugin(path)
    with world(c.device) as here:
        try:
            config = ModelConfig(name=c.model, checkpoint=c.checkpoint, options=c.options)
        except ValidationError as error:
            raise explain(error, "options", "--") from error
        # A typo should not wait for the data, or for its download.
        create_model(c.model, **{k: v for k, v in c.options.items() if k not in ("pretrained", "weights")})
        find_weights(c.checkpoint)
        # Of the training images no more is read than has to be.
        splits = load_data(c.data.model_copy(update={"train_limit": 1, "label_noise": 0.0}))
        model = build_model(config, splits.num_classes)
        model.to(here.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loader = make_loader(
            splits.test,
            c.batch_size,
            device=here.device,
            shuffle=False,
            rank=here.rank,
            world_size=here.size,
            workers=c.data.workers,
        )
        prepare = Augment(AugmentConfig(), splits.mean, splits.std, splits.num_classes).to(here.device).eval()
        figures = evaluate(model, loader.epoch(0), prepare, here, precision=getattr(torch, c.precision))
    if not here.is_main:
        return
    figures["images"] = len(splits.test)
    if c.json:
        print(json.dumps({"model": c.model, "checkpoint": str(c.checkpoint), **figures}))
        return
    print(
        f"top-1 {figures['top1']:.2f} %  top-5 {figures['top5']:.2f} %  loss {figures['loss']:.4f}  "
        f"({figures['images']:,} images)"
    )
