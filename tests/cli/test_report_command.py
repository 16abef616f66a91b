"""`mdistiller report`."""

from __future__ import annotations

import html
import json
import re

import pytest

from mdistiller.models import registry


def test_report_on_runs(cli, student_run, teacher_run, tmp_path):
    out = tmp_path / "new" / "page.html"
    done = cli("report", student_run, teacher_run, "--out", out)
    assert (done.code, done.out) == (0, f"{out}\n")
    assert re.match(r"DKD [\d.]+ %", done.err)  # the answer
    assert max(map(len, done.err.splitlines())) <= 80
    page = out.read_text()
    assert page.startswith("<!doctype html>")
    for text in ("DKD", "student alone", "synthetic: 2 runs"):
        assert text in page
    assert html.escape(f"mdistiller train {student_run / 'config.json'}") in page


def test_json_is_the_table(cli, student_run, teacher_run, tmp_path):
    done = cli("report", teacher_run, student_run, "--out", tmp_path / "page.html", "--json")
    rows = done.json()
    assert (tmp_path / "page.html").is_file()
    assert [row["label"] for row in rows] == ["student alone", "DKD"]
    for row, run in zip(rows, (teacher_run, student_run), strict=True):
        summary = cli.metrics(run)[-1]
        assert row["last"] == {"mean": summary["last"]["top1"], "std": None}
        assert row["best"] == {"mean": summary["best"]["top1"], "std": None}
        assert (row["seeds"], row["finished"]) == (1, True)
        assert row["ms_per_step"] == summary["ms_per_step"]
        assert row["seconds"] == pytest.approx(summary["seconds"])
        assert row["student_parameters"] == summary["student_parameters"]


def test_default_page(cli, student_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("report", student_run).out == "report.html\n"
    assert "synthetic: 1 run<" in (tmp_path / "report.html").read_text()


def test_how_many_images(cli, student_run, tmp_path):
    out = tmp_path / "page.html"
    tables = []
    for images, shown in (((), True), (("--images", 20), True), (("--images", 0), False)):
        assert cli("report", student_run, "--out", out, *images).code == 0
        page = out.read_text()
        assert ("silhouette" in page) == shown
        assert "Missing parts" not in page
        tables.append(page.split('id="transfer-table"')[-1].split("</table>")[0])
    assert tables[0] != tables[1]  # of other images


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--images", -1), "images: got -1; allowed: 0 or more"),
        (("--device", "abacus"), "device: got 'abacus'"),
        (("--plugin", "nowhere.py"), "nowhere.py"),
    ],
)
def test_bad_options_are_2(cli, student_run, tmp_path, argv, words):
    done = cli("report", student_run, "--out", tmp_path / "page.html", *argv)
    assert (done.code, done.out) == (2, "")
    assert words in done.message
    assert not (tmp_path / "page.html").exists()


def test_a_students_model_from_a_plugin(cli, tmp_path, registries):
    plugin, run, out = tmp_path / "plugin.py", tmp_path / "run", tmp_path / "page.html"
    plugin.write_text(
        "from torch import nn\nfrom mdistiller.models import register_model\n"
        "@register_model\ndef tiny_net(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))\n"
    )
    argv = ("train", "digits.student.resnet8", *cli.FAST, "--epochs", 1, "--plugin", plugin)
    assert cli(*argv, "--student.name", "tiny_net", "--out", run).code == 0
    assert cli("report", run, "--out", out, "--plugin", plugin).code == 0
    assert "silhouette" in out.read_text()
    del registry._MODELS["tiny_net"]
    assert cli("report", run, "--out", out).code == 0
    assert html.escape("unknown model 'tiny_net'") in out.read_text()


def test_seeds_make_one_row(cli, student_run, tmp_path):
    other = tmp_path / "other"
    assert cli("train", student_run / "config.json", "--seed", 4, "--out", other).code == 0
    done = cli("report", student_run, other, "--out", tmp_path / "page.html", "--json")
    (row,) = done.json()
    one, two = (cli.metrics(run)[-1]["last"]["top1"] for run in (student_run, other))
    assert row["seeds"] == 2
    assert row["last"]["mean"] == pytest.approx((one + two) / 2)
    assert row["last"]["std"] == pytest.approx(abs(one - two) / 2**0.5)


@pytest.mark.parametrize("lacks", ["folder", "config.json", "metrics.jsonl"])
def test_what_is_no_run_is_1(cli, student_run, tmp_path, lacks):
    run = tmp_path / "run"
    if lacks != "folder":
        run.mkdir()
        for name in {"config.json", "env.json", "metrics.jsonl"} - {lacks}:
            (run / name).write_bytes((student_run / name).read_bytes())
    done = cli("report", student_run, run, "--out", tmp_path / "page.html")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") == 1
    assert str(run) in done.message
    assert ("no evaluation" if lacks == "metrics.jsonl" else "is no run folder") in done.message
    assert not (tmp_path / "page.html").exists()


def copy(run, to, *names):
    to.mkdir(parents=True)
    for name in names:
        (to / name).write_bytes((run / name).read_bytes())


def test_a_folder_of_runs(cli, student_run, teacher_run, tmp_path):
    files = ("config.json", "env.json", "metrics.jsonl")
    for run, name in ((student_run, "a/student"), (teacher_run, "teacher")):
        copy(run, tmp_path / "runs" / name, *files)
    argv = ("--images", 0, "--out", tmp_path / "page.html", "--json")

    def rows(*paths):
        found = cli("report", *paths, *argv).json()
        return [{key: value for key, value in row.items() if key != "folders"} for row in found]

    expected = rows(student_run, teacher_run)
    assert rows(tmp_path / "runs") == expected
    assert rows(tmp_path / "runs", tmp_path / "runs" / "teacher") == expected
    # What just began is left out, but not in silence; what is asked for by its name is an error.
    copy(student_run, tmp_path / "runs" / "new", *files[:2])
    with pytest.warns(UserWarning, match="left out: .*/runs/new: no evaluation"):
        assert rows(tmp_path / "runs") == expected
    assert cli("report", tmp_path / "runs" / "new", tmp_path / "runs" / "teacher", *argv).code == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "is no run folder: there is no such folder"),
        ("file", "is no run folder: there is no such folder"),
        ("empty", "is no run folder, and no folder below it is a run with an evaluation"),
        ("part", "is no run folder: it has no env.json"),
    ],
)
def test_no_run_is_one_clear_error(cli, student_run, tmp_path, kind, words):
    path = tmp_path / "it"
    if kind == "file":
        path.write_text("")
    elif kind != "missing":
        copy(student_run, path, *(["config.json"] if kind == "part" else []))
    done = cli("report", student_run, path, "--out", tmp_path / "page.html")
    assert (done.code, done.err) == (1, f"mdistiller: {path} {words}\n")


def test_a_run_under_way(cli, student_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "env.json"):
        (run / name).write_bytes((student_run / name).read_bytes())
    lines = (student_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    (row,) = cli("report", run, "--out", tmp_path / "page.html", "--json").json()
    assert not row["finished"]
    assert row["last"]["mean"] == json.loads(lines[2])["top1"]
    assert "(under way)" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("kind", "name", "start"),
    [
        ("md", "report.md", "# synthetic: 1 run"),
        ("latex", "report.tex", "% synthetic: 1 run"),
        ("csv", "report.csv", "row,method,teacher,student,"),
        ("json", "report.json", "{"),
    ],
)
def test_formats(cli, student_run, tmp_path, monkeypatch, kind, name, start):
    monkeypatch.chdir(tmp_path)
    argv = ("report", student_run, "--format", kind, "--images", 0)
    done = cli(*argv)
    assert (done.code, done.out) == (0, f"{name}\n")
    text = (tmp_path / name).read_text()
    assert text.startswith(start)
    printed = cli(*argv, "--out", "-")
    assert (printed.code, printed.out) == (0, text)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_only_one_thing_goes_to_stdout(cli, student_run):
    done = cli("report", student_run, "--out", "-", "--json")
    assert (done.code, done.out) == (2, "")
    assert "out: - and --json would both write to stdout" in done.message


def test_trains_page_is_light(student_run):
    assert (student_run / "report.html").stat().st_size < 150_000
