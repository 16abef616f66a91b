"""`mdistiller predict EXPORT IMAGE…`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mdistiller.deploy.predict import load_export
from mdistiller.errors import ConfigError
from mdistiller.methods import load_plugin


@dataclass(frozen=True)
class PredictCommand:
    """The likeliest classes of images, by an exported student. One unreadable image fails them all."""

    export: tyro.conf.Positional[Path]
    """A folder that `mdistiller export` wrote. A torch-export file may hold code: trust its source."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    top: int = 5
    """Classes to name for each image."""
    device: str = "auto"
    """auto (a GPU if there is one; ONNX: the CPU), cpu, cuda or cuda:N."""
    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Python file that registers methods, models and data sets (code: it is run). May be given again."""
    json: bool = False
    """Print classes and probabilities as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Run `mdistiller predict`."""
    c = tyro.cli(PredictCommand, args=args, prog="mdistiller predict")
    if not c.images:
        raise ConfigError("predict needs at least one image; see mdistiller predict --help")
    for path in c.plugin:
        load_plugin(path)
    found = load_export(c.export, c.device).predict(c.images, c.top)
    if c.json:
        rows = [
            {"image": str(path), "classes": [p._asdict() for p in predictions]}
            for path, predictions in zip(c.images, found, strict=True)
        ]
        print(json.dumps(rows))
        return
    for path, predictions in zip(c.images, found, strict=True):
        print(path)
        for name, probability in predictions:
            print(f"  {100 * probability:6.2f} %  {name}")
