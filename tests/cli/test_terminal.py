"""Terminals whose encoding lacks characters, that are narrow, or that show no colors."""

import io
import os
import subprocess
import sys

import pytest

from mdistiller.cli import main as main_module
from mdistiller.runs.progress import ProgressDisplay
from mdistiller.types import Metric

LINE = {"epoch": 12, "step": 4680, "train": {"loss": 1.2345, "top1": 61.5}, "top1": 60.25, "best_top1": 60.5}
LINE |= {"ema": {"top1": 59.0}, "ms_per_step": 12.5}
METRIC = Metric("top1", "%", short="test")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("cp1252", "a ? b … 1 × ? ±"), ("ascii", "a ? b ? 1 ? ? ?"), ("utf-8", "a → b … 1 × β ±")],
)
def test_output_in_other_encodings(monkeypatch, encoding, expected):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))

    def run(argv):
        for stream in (out, err):
            print("a → b … 1 × β ±", file=stream)
        return 0

    monkeypatch.setattr(main_module, "run", run)
    monkeypatch.setattr(main_module, "_warn_once", lambda: None)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as end:
        main_module.main()
    assert end.value.code == 0
    for stream in (out, err):
        assert stream.buffer.getvalue().decode(encoding) == f"{expected}\n"


def test_a_list_on_a_cp1252_terminal():
    """Had a traceback: the list has characters that the encoding lacks."""
    command = [sys.executable, "-m", "mdistiller", "list", "methods", "dkd"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "COLUMNS": "80"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert b"dkd" in done.stdout


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (
            200,
            "epoch  12  step   4680  loss  1.2345  train 61.50 %  test 60.25 %  best 60.50 %  "
            "ema 59.00 %  12.5 ms/step",
        ),
        (88, "epoch  12  loss  1.2345  train 61.50 %  test 60.25 %  best 60.50 %  ema 59.00 %"),
        (60, "epoch  12  test 60.25 %  best 60.50 %  ema 59.00 %"),
        (30, "epoch  12  test 60.25 %"),
        (10, "epoch  12  test 60.25 %"),
    ],
)
def test_an_epoch_is_one_line_of_a_narrow_terminal(capsys, monkeypatch, width, expected):
    display = ProgressDisplay()
    monkeypatch.setattr(display.console, "_force_terminal", True)
    display.metric = METRIC
    display.console.width = width
    display.evaluated(LINE)
    assert capsys.readouterr().err == f"{expected}\n"


def test_a_log_file_has_whole_lines(capsys):
    display = ProgressDisplay()
    display.metric = METRIC
    display.console.width = 40
    display.evaluated(LINE)
    assert "12.5 ms/step" in capsys.readouterr().err


def test_no_color(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    display = ProgressDisplay()
    display.start("title", 10, 0)
    display.step(5)
    display.stop()
    assert "\x1b[3" not in capsys.readouterr().err  # colors, foreground
