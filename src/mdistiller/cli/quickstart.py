"""Command `mdistiller quickstart`: a teacher, and a small student alone, with KD and with DKD, over seeds.

Digits are easy, so the students' data is made harder to leave room for a teacher's help: 300 images, 40 % of
them with a wrong label, while the teacher has all 1,297 with the right ones.
"""

import json
import os
import sys
import textwrap
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from shutil import which

from pydantic import Field

from mdistiller.api import train
from mdistiller.cli.options import Command
from mdistiller.cli.terminal import print_table, tracked
from mdistiller.config import RunConfig
from mdistiller.errors import ConfigError
from mdistiller.recipes import get_recipe
from mdistiller.report import table, write_report
from mdistiller.report.answer import answer
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import load_run
from mdistiller.runs.folder import free_folder

_NEXT = (
    "compare {out}/dkd-s0",
    "export {out}/dkd-s0",
    "train digits.reviewkd.resnet8 --teacher {out}/teacher",
)
# Columns of the table that fit in a terminal. The page has all columns.
_SHOWN = ("run", "seeds", "last, %", "best, %", "Δ baseline", "seconds", "ms/step")

_TEACHER, _STUDENT = "resnet20", "resnet8"
IMAGES, LABEL_NOISE = 300, 0.4

SETTING = (
    f"scikit-learn's handwritten digits at 16 × 16 pixels, 500 test images. The teacher ({_TEACHER}) trains "
    f"on all 1,297 training images. Every student ({_STUDENT}) trains on {IMAGES} of them with "
    f"{LABEL_NOISE:.0%} wrong labels. This setting leaves room between student and teacher; it is not a "
    "benchmark. KD and DKD have their published hyperparameters for CIFAR-100."
)


class QuickstartCommand(Command):
    """Train a teacher, then a small student without it, with KD and with DKD, on real images. It takes about
    five minutes on two cores, prints a table and writes a report.
    """

    out: Path | None = None
    """Folder for the runs and the report. None: the first free one of runs/quickstart, -2, …"""
    seeds: int = Field(default=3, ge=1)
    """Seeds for each student."""

    def execute(self) -> None:
        out = self.out if self.out is not None else free_folder("quickstart")
        try:
            taken = out.exists() and any(out.iterdir())
        except OSError as error:
            raise ConfigError(f"out: cannot write to {out}: {error}") from error
        if taken:
            raise ConfigError(f"out: {out} is not empty; choose another folder")
        start = time.perf_counter()
        print(textwrap.fill(SETTING, 80, break_on_hyphens=False), file=sys.stderr)
        configs = runs_of(out, self.seeds)
        for name, config in tracked("run", list(configs.items())):
            last = train(config, reporter=False).summary["last"]
            print(f"{name:11} test {last['top1']:5.1f} %", file=sys.stderr)
        folders = [config.out for config in configs.values() if config.out is not None]
        title = "Quickstart: distilling a digit classifier"
        print(f"writing the report about {len(folders)} runs …", file=sys.stderr)
        report = write_report(folders, out / "report.html", title=title, notes=[SETTING], images=500)
        runs = [load_run(folder) for folder in folders]
        page = PageRows.of(runs)
        rows = page.rows
        if self.as_json:
            result_rows = [asdict(row) for row in rows]
            print(json.dumps({"setting": SETTING, "rows": result_rows, "report": str(report)}))
        else:
            head, *body = table(rows, runs[0].main_metric)
            columns = [head.index(name) for name in _SHOWN]
            print_table(_SHOWN, [[line[i] for i in columns] for line in body])
        found = answer(page.contests[0], page.groups)
        text = textwrap.fill(f"{found.sentence} {found.note}", 80)
        seconds = timedelta(seconds=round(time.perf_counter() - start))
        # `make quickstart` leaves the command in an environment that no shell knows.
        program = "mdistiller" if which("mdistiller") else f"{os.path.relpath(sys.executable)} -m mdistiller"
        commands = "".join(f"\n  {program} {words.format(out=out)}" for words in _NEXT)
        print(f"\n{text}\nreport: {report} ({seconds} in all)\nnext:{commands}", file=sys.stderr)


def runs_of(out: Path, seeds: int) -> dict[str, RunConfig]:
    """Returns the runs by name: the teacher's, and of each seed the student's alone, with KD and with DKD."""
    configs = {"teacher": get_recipe(f"digits.teacher.{_TEACHER}").replace(epochs=8, out=out / "teacher")}
    data = {"train_limit": IMAGES, "label_noise": LABEL_NOISE}
    for seed in range(seeds):
        config = get_recipe(f"digits.student.{_STUDENT}")
        for name in ("baseline", "kd", "dkd"):
            if name != "baseline":
                config = get_recipe(f"digits.{name}.{_TEACHER}_{_STUDENT}")
                config = config.replace(teacher={"checkpoint": out / "teacher"})
            folder = out / f"{name}-s{seed}"
            config = config.replace(data=data, epochs=15, seed=seed, out=folder, log_every=5)
            configs[folder.name] = config
    return configs
