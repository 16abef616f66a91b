"""Run folders written by hand, small real runs, and a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdistiller.methods import list_methods
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.launch import train

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


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory) -> list[Path]:
    """Run folders on the digits: the teacher, the student alone, and DKD with two seeds; one epoch each."""
    root = tmp_path_factory.mktemp("real")

    def run(name: str, student: str, **fields) -> Path:
        config = ClassificationConfig.model_validate(
            {
                "data": {"kind": "digits", "train_limit": 200},
                "student": {"name": student},
                "batch_size": 50,
                "epochs": 1,
                "device": "cpu",
                "out": root / name,
                **fields,
            }
        )
        train(config)
        return root / name

    teacher = run("teacher", "resnet14", epochs=3)
    taught = {"teacher": {"name": "resnet14", "checkpoint": teacher}, "method": {"name": "dkd"}}
    return [
        teacher,
        run("alone", "resnet8"),
        *(run(f"dkd-s{seed}", "resnet8", seed=seed, **taught) for seed in (0, 1)),
    ]


@pytest.fixture(scope="session")
def many_rows(real_runs, tmp_path_factory) -> list[Path]:
    """Run folders of forty rows: two teachers, the student alone, and 37 methods with one to three seeds.

    They are copies of the real runs with other metrics.
    """
    root, random = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    config = json.loads((real_runs[0] / "config.json").read_text())
    config |= {"student": {"name": "resnet20"}, "epochs": 1, "out": str(root / "trained")}
    train(ClassificationConfig.model_validate(config))
    trained = {"resnet20": root / "trained", "resnet14": real_runs[0]}
    teachers = {"resnet20": 63.4, "resnet14": 62.8}

    def copy(run: Path, name: str, top1: float, edit: Callable[[dict[str, Any]], object]) -> Path:
        folder = shutil.copytree(run, root / name)
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        evaluation = next(line for line in lines if line["kind"] == "eval")
        lines.remove(evaluation)
        first = [line for line in lines if line["kind"] == "train"]
        later = [{**line, "step": line["step"] + 4, "loss": line["loss"] / 2} for line in first]
        evaluations = [
            {**evaluation, "epoch": epoch, "top1": top1 - 5 / epoch, "best_top1": top1} for epoch in (1, 2, 3)
        ]
        evaluations[-1]["top1"] = top1
        for images in (line["diagnostics"]["test"] for line in evaluations if line.get("diagnostics")):
            if "teacher_top1" in images:
                images["teacher_top1"] = teachers[config["teacher"]["name"]]
        last = [line for line in lines if line["kind"] == "summary"]
        text = "".join(json.dumps(line) + "\n" for line in (*first, *later, *evaluations, *last))
        (folder / "metrics.jsonl").write_text(text)
        return folder

    found = [copy(real_runs[1], "alone", 41.0, lambda config: None)]
    folders = {}
    for model, top1 in teachers.items():
        folders[model] = copy(trained[model], model, top1, lambda config: None)
    methods = ["kd", "dkd", *(m for m in list_methods() if m not in ("none", "kd", "dkd"))]
    pairs = [("resnet20", m) for m in methods[:19]] + [("resnet14", m) for m in methods[:18]]
    for i, (model, method) in enumerate(pairs):
        for seed in range(1 + i % 3):

            def edit(config, model=model, method=method, seed=seed):
                config["teacher"].update(name=model, checkpoint=str(folders[model]))
                config |= {"seed": seed, "method": {"name": method}}

            name = f"{method}-{model}-{seed}"
            found.append(copy(real_runs[2], name, 40 + i / 2 + random.normal(0, 0.5), edit))
    return [*found, *folders.values()]


@pytest.fixture
def copies(real_runs, tmp_path) -> list[Path]:
    """Copies of `real_runs` that may be damaged; their teacher is still the original."""
    return [shutil.copytree(folder, tmp_path / "runs" / folder.name) for folder in real_runs]
