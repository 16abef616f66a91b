"""Run folders written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mdistiller.tasks.classification.config import ClassificationConfig

ENV = {
    "seed": 0,
    "versions": {"torch": "2.6.0", "mdistiller": "0.1.0"},
    "cpu": "A CPU <of> 1994 & later",
    "threads": 2,
    "gpus": [],
    "commit": "0123456789abcdef",
}


@pytest.fixture
def write_run(tmp_path):
    """`write_run(name, top1s, ...)` writes a run folder and gives its path."""

    def write(
        name: str,
        top1s: Sequence[float],
        *,
        seed: int = 0,
        method: str = "dkd",
        finished: bool = True,
        ms: float = 10.0,
        seconds: float = 3.0,
        method_parameters: int | None = None,
        diagnostics: Sequence[dict[str, Any]] | None = None,
        **fields: Any,
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        values = {
            "student": {"name": "resnet8"},
            "teacher": None if method == "none" else {"name": "resnet20"},
            "method": {"name": method},
            "data": {"kind": "digits"},
            "seed": seed,
            "out": str(path),
            **fields,
        }
        config = ClassificationConfig.model_validate(values)
        (path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
        (path / "env.json").write_text(json.dumps(ENV))
        lines: list[dict[str, Any]] = []
        for epoch, top1 in enumerate(top1s, 1):
            best = max(top1s[:epoch])
            step = 10 * epoch
            lines.append({"kind": "train", "step": step, "epoch": epoch - 1, "lr": 0.1, "loss": 1 / epoch})
            lines.append(
                {"kind": "eval", "epoch": epoch, "step": step, "top1": top1, "top5": 99.0, "loss": 0.5}
                | {"train": {"loss": 1 / epoch, "top1": 50.0}, "best_top1": best}
                | {"ms_per_step": 2 * ms, "seconds": seconds * epoch / len(top1s)}
                | ({} if diagnostics is None else {"diagnostics": diagnostics[epoch - 1]})
            )
        if finished:
            extra = {} if method_parameters is None else {"method_parameters": method_parameters}
            summary = {"kind": "summary", "step": step, "ms_per_step": ms, "student_parameters": 78042}
            lines.append(summary | extra)
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write
