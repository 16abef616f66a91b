"""Progress on stderr: a line now and then outside a terminal, and the same facts beside the bar in one."""

import re

import pytest

from mdistiller.runs import progress
from mdistiller.runs.progress import ProgressDisplay
from mdistiller.types import Metric


class Run:
    """A display on a clock of its own, and the readings of the losses."""

    def __init__(self, total=100, done=0):
        self.time, self.read = 0.0, 0
        self.display = ProgressDisplay()
        self.display.metric = Metric("top1", "%")
        self.display.clock = lambda: self.time
        self.display.start("title [of] a run", total, done, images=64, losses=self.losses)

    def losses(self):
        self.read += 1
        return {"task": 1.5, "dkd": 0.25, "loss": 1.75}

    def steps(self, first, last, seconds):
        for done in range(first, last + 1):
            self.time += seconds
            self.display.step(done)


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_lines_outside_a_terminal(capsys):
    run = Run()
    assert lines(capsys) == ["title [of] a run"]
    run.steps(1, 4, 2.0)
    assert (lines(capsys), run.read) == ([], 0)
    run.steps(5, 19, 2.0)  # 2 s a step: after 10 s, 5 steps are done and 95 take 190 s
    facts = "loss 1.75  task 1.5  dkd 0.25"
    assert lines(capsys) == [f"step 5 of 100  32 images/s  ETA 0:03:10  {facts}"]
    run.time += 100.0  # an evaluation, whose seconds belong to the time left alone
    line = {"epoch": 1, "step": 19, "train": {"loss": 2.0, "top1": 50.0}, "top1": 40.0, "best_top1": 40.0}
    run.display.evaluated({**line, "ms_per_step": 2000.0})
    assert len(lines(capsys)) == 1
    run.steps(20, 20, 2.0)  # 140 s for 20 steps; 80 steps are left
    assert lines(capsys) == [f"step 20 of 100  32 images/s  ETA 0:09:20  {facts}"]
    run.steps(21, 34, 2.0)
    assert (lines(capsys), run.read) == ([], 2)
    run.display.stop()
    assert lines(capsys) == []


def test_a_resumed_run_counts_its_own_steps(capsys):
    run = Run(done=90)
    run.steps(91, 95, 4.0)
    assert lines(capsys)[1].startswith("step 93 of 100  16 images/s  ETA 0:00:28  ")


def test_slow_steps_show_their_first(capsys):
    run = Run()
    run.steps(1, 1, 50.0)
    assert lines(capsys)[1].startswith("step 1 of 100  1.3 images/s  ETA 1:22:30  ")


def test_facts_beside_the_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    run = Run()
    run.steps(1, 4, 2.0)
    assert run.read == 1
    run.display.stop()
    assert "loss 1.75  task 1.5  dkd 0.25  32 images/s" in capsys.readouterr().err


def test_bar_count_and_time_left_come_before_the_losses_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    run = Run(total=100_000, done=1000)
    run.losses = run.display.losses = lambda: {"loss": 12.3456789, "task": 1.5, "reviewkd": 2.5, "dkd": 0.25}
    run.steps(1001, 1004, 2.0)
    run.display.stop()
    shown = re.findall(r"[━╸╺ ]+1004/100000 \d+:\d\d:\d\d [^\x1b\n]*", capsys.readouterr().err)
    assert "loss 12.35  task 1.5  reviewkd 2.5" in shown[-1]
    assert "dkd" not in shown[-1].replace("reviewkd", "")
    assert len(shown[-1].rstrip()) <= 80


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_run_writes_the_same_whether_lines_are_shown_or_not(monkeypatch, tmp_path, capsys, seconds):
    from mdistiller import get_recipe, train
    from mdistiller.runs.folder import read_metrics

    monkeypatch.setattr(progress, "FIRST_SECONDS", seconds)
    monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
    config = get_recipe("digits.kd.self_resnet8").replace(
        data={"kind": "synthetic", "image_size": 16}, epochs=2, batch_size=64, max_steps=6, log_every=2
    )
    train(config.replace(out=tmp_path / "shown"), reporter=ProgressDisplay())
    shown = [line for line in lines(capsys) if line.startswith("step ")]
    assert len(shown) == (0 if seconds else 6)
    for number, line in enumerate(shown, 1):
        assert line.startswith(f"step {number} of 6  ")
        assert all(f"  {name} " in line for name in ("ETA", "loss", "task", "kd"))
    train(config.replace(out=tmp_path / "silent"))
    for one, other in zip(*(read_metrics(tmp_path / name) for name in ("shown", "silent")), strict=True):
        assert one.get("loss") == other.get("loss")
        assert one["step"] == other["step"]
