"""`mdistiller compare` and `export --int8`."""

import io
import json
import shutil
import sys

import pytest
import torch

from mdistiller.cli.main import run


@pytest.fixture
def runs(student_run, teacher_run, tmp_path):
    return shutil.copytree(student_run, tmp_path / "student"), shutil.copytree(
        teacher_run, tmp_path / "teacher"
    )


def test_table_and_json(cli, runs):
    student, _ = runs
    before = torch.get_num_threads()
    done = cli("compare", student, "--batch", 1, "--threads", 1, "--no-eval")
    assert (done.code, done.err) == (0, "")
    head, _, *rows = done.out.splitlines()
    assert head == ("| model | top1, % | Δ alone | parameters | MACs, million | MB | ms, batch 1 |")
    last = [line for line in cli.metrics(student) if line["kind"] == "eval"][-1]["top1"]
    assert rows[0].startswith("| teacher |")
    assert rows[1].startswith(f"| DKD | {last:.2f} | – |")
    assert rows[-1].startswith("top1 on synthetic; milliseconds per image on ")
    assert rows[-1].endswith(", 1 thread, images of shape [1, 3, 16, 16]")
    assert torch.get_num_threads() == before
    found = cli("compare", student, "--batch", 2, "--json").json()
    assert found == json.loads((student / "compare.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["teacher", "DKD"]
    assert found["rows"][1]["metric"] == pytest.approx(last)
    assert list(found["rows"][1]["ms"]) == ["2"]


def test_bad_usage(cli, runs, tmp_path):
    for argv, code, said in (
        ((), 2, "at least one run folder"),
        ((runs[0], "--threads", 0), 2, "threads: got 0; allowed: 1 or more"),
        ((runs[0], "--batch", 0), 2, "batch: got 0; allowed: 1 or more"),
        ((tmp_path / "none",), 1, "is no run folder"),
    ):
        done = cli("compare", *argv)
        assert (done.code, done.out) == (code, ""), done.err
        assert said in done.message


def test_int8_from_the_command(cli, runs, tmp_path):
    student, _ = runs
    done = cli("export", student, "--format", "onnx", "--int8")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == str(student / "export" / "student-onnx-int8")
    assert lines[1].endswith("(int8 rounds)")
    assert lines[2].startswith("top1 of this file: ")
    assert "on 32 test images (the student " in lines[2]
    refused = cli("export", student, "--int8")
    assert (refused.code, "int8: got format 'safetensors'; allowed: onnx" in refused.message) == (2, True)
    quiet = cli("export", student, "--no-eval", "--out", tmp_path / "quiet")
    assert quiet.out.splitlines()[-1] == "accuracy of this file: not measured (--no-eval)"
    alone = tmp_path / "alone.safetensors"
    shutil.copy(student / "student.safetensors", alone)
    bare = cli("export", alone, "--out", tmp_path / "bare")
    assert bare.out.splitlines()[-1] == (
        "accuracy of this file: not measured (the run's test set is not at hand)"
    )


def test_a_terminal_shows_aligned_columns(cli, runs, monkeypatch):
    """The raw Markdown is for pipes and files."""
    student, _ = runs
    argv = ("compare", student, "--batch", 1, "--threads", 1, "--no-eval")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")  # no bold headings
    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert run([str(word) for word in argv]) == 0
    lines = terminal.getvalue().splitlines()
    heads, names, teacher, dkd = (line.split() for line in lines[:4])
    assert heads == ["top1", "MACs", "ms"]
    assert names == ["model", "%", "Δ", "alone", "parameters", "million", "MB", "batch", "1"]
    assert (teacher[0], dkd[0]) == ("teacher", "DKD")
    assert len({len(line) for line in lines[1:4]}) == 1  # the last column ends at one place
    assert "|" not in terminal.getvalue()
    assert max(map(len, lines)) <= 80
    terminal.truncate(terminal.seek(0))
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    assert run([str(word) for word in argv]) == 0
    assert terminal.getvalue().startswith("| model | top1, % |")
