"""Export of a run's teacher cache as stored outputs, for runs elsewhere."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from mdistiller.errors import ConfigError
from mdistiller.runs.folder import CONFIG
from mdistiller.stored import image_names, write_outputs
from mdistiller.training.build import build_run
from mdistiller.training.cached_teacher import CachedTeacher
from mdistiller.training.distributed import World
from mdistiller.training.row_store import Values
from mdistiller.training.task import get_task, load_config


def export_outputs(run: Path, out: Path, *, view: int | None = None, top: int | None = None) -> int:
    """Writes the outputs in a run's teacher cache to a file that `--teacher-outputs` reads.

    Values are written as the run read them. The run's teacher and data are built as for training.

    Args:
        run: a run folder.
        out: FILE.npz, FILE.parquet, or FILE.safetensors, which stores no file names.
        view: which of an image's augmented views to write, from 0; None where the cache has one view.
        top: write log-probabilities of this many most likely classes instead of all logits.

    Returns:
        The number of rows.

    Raises:
        ConfigError: no cache, several views and none chosen, an unknown view, missing rows, a `top` beyond
            the classes, or another suffix.
    """
    config = load_config(run / CONFIG, whole=True)
    trainer, _ = build_run(get_task(config.task), config, World(torch.device("cpu")))
    teacher = trainer.distiller.asked
    if not isinstance(teacher, CachedTeacher):
        raise ConfigError(f"{run} has no teacher cache; train with --teacher-cache FOLDER")
    teacher.open()
    if teacher.cache is None or not teacher.read:
        raise ConfigError(f"{run}: its teacher has no logits to export")
    views = teacher.rows.slots(0)
    if view is None and views > 1:
        raise ConfigError(
            f"view: the cache of {run} keeps {views} augmented views of each image, and a file of stored "
            f"outputs has one row for each image; choose one of 0 to {views - 1}"
        )
    if not 0 <= (view or 0) < views:
        raise ConfigError(f"view: got {view}; allowed: 0 to {views - 1}")

    def refuse() -> NoReturn:
        raise ConfigError(
            f"the cache of {run} in {teacher.folder} lacks rows of view {view or 0}: the run did not "
            "see each image in it, or teacher, data or settings have changed since"
        )

    taps = [name for name in teacher.live.taps.names if name.isidentifier()]
    if left_out := [name for name in teacher.live.taps.names if name not in taps]:
        warnings.warn(f"left out {', '.join(left_out)}: a feature's name must be one word", stacklevel=2)
    numbers = 1 + np.arange(teacher.rows.images) + (view or 0) * teacher.rows.images
    found = teacher.cache.fill(0, numbers, (*teacher.read, *taps), refuse)
    rows: dict[str, object] = {
        k: v.reshape(-1, *teacher.shapes.get(k, v.shape[1:])) for k, v in found.items()
    }
    if top is not None:
        rows |= _most_likely(found["logits"], top)
        del rows["logits"]
    splits = teacher.rows.splits
    if splits.named:
        rows["classes"] = list(splits.classes)
    if (names := image_names(splits.train)) is not None:
        depths = {len(Path(name).parts) for name in names}
        shared = os.path.commonpath([Path(name).parent for name in names]) if len(depths) == 1 else ""
        rows["names"] = [Path(name).relative_to(shared).as_posix() for name in names]
    write_outputs(out, rows)
    return len(numbers)


def _most_likely(logits: Values, count: int) -> Mapping[str, object]:
    classes = logits.shape[1]
    if not 1 <= count <= classes:
        raise ConfigError(f"top: got {count}; allowed: 1 to {classes}, the number of classes")
    values, ids = torch.from_numpy(logits).log_softmax(1).topk(count)
    return {"top_log_probs": values.numpy(), "top_ids": ids.numpy()}
