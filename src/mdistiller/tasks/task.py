"""Tasks by name, and the config of a run of any of them."""

from __future__ import annotations

from pathlib import Path

from mdistiller.config import RunConfig, read_config


def load_config(path: Path) -> RunConfig:
    """Reads the `config.json` of a run."""
    from mdistiller.tasks.classification.config import ClassificationConfig

    return read_config(ClassificationConfig, path)
