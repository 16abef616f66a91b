"""`mdistiller reproduce`: whole tables at the smoke scale, cell by cell."""

import csv
import html
import shutil
import statistics

import pytest

from mdistiller.cli.reproduce import HEAD
from mdistiller.tasks.classification.experiments import EXPERIMENTS

SMOKE = ("--scale", "smoke", "--seeds", 2, "--device", "cpu", "--json")


@pytest.fixture(scope="module")
def table1(cli, tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce") / "out"
    done = cli("reproduce", "table1", *SMOKE, "--out", out)
    assert done.code == 0, done.err
    return out, done.json()


def test_the_table_is_what_the_runs_measured(cli, table1):
    out, found = table1
    runs = {}
    for folder in (out / "runs").iterdir():
        last = [line for line in cli.metrics(folder) if line["kind"] == "eval"][-1]
        runs.setdefault(folder.name[: -len("-s0")], []).append(last)
    assert len(found["rows"]) == len(runs) == 4
    assert {row["setting"] for row in found["rows"]} == {
        "baseline",
        "KD (TCKD + NCKD)",
        "TCKD alone",
        "NCKD alone",
    }
    figures = set()
    for lines in runs.values():
        tops = [line["top1"] for line in lines]
        figures.add(f"{sum(tops) / 2:.2f} ± {statistics.stdev(tops):.2f}")
    assert {row["last, %"] for row in found["rows"]} == figures
    assert {row["seeds"] for row in found["rows"]} == {"2"}
    assert {row["published, %"] for row in found["rows"]} == {""}
    assert found["teachers"].keys() == {"resnet14"}
    # One pair of models, and what differs is the method alone.
    configs = [cli.config(folder) for folder in (out / "runs").iterdir()]
    assert {config["student"]["name"] for config in configs} == {"resnet8"}
    methods = sorted(str(config["method"]["name"]) for config in configs)
    assert methods == ["dkd"] * 4 + ["kd"] * 2 + ["none"] * 2


def test_files_say_the_same(table1):
    out, found = table1
    with open(out / "table1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == found["rows"]
    markdown = (out / "table1.md").read_text()
    page = (out / "table1.html").read_text()
    for row in rows:
        assert "| " + " | ".join(row.values()) + " |" in markdown
        assert f">{row['last, %']}<" in page
        assert f">{row['best, %']}<" in page
    for text in ("mdistiller reproduce table1 --scale smoke --seeds 2", "resnet14 "):
        assert text in markdown
        assert text in page
    assert "Hardware and commands" in page
    assert f"resnet14 {found['teachers']['resnet14']:.2f} %" in markdown


def test_a_teacher_s_accuracy_is_that_of_its_run(cli, table1):
    out, found = table1
    last = [line for line in cli.metrics(out / "teachers" / "resnet14") if line["kind"] == "eval"][-1]
    assert found["teachers"] == {"resnet14": pytest.approx(last["top1"])}


def test_what_is_finished_is_not_run_again(cli, table1):
    out, first = table1
    lost, *_ = sorted((out / "runs").glob("*baseline-s1"))
    shutil.rmtree(lost)
    broken, *_ = sorted((out / "runs").glob("*baseline-s0"))
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    (broken / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # no summary: it was broken off
    before = cli.contents(out / "runs")
    done = cli("reproduce", "table1", *SMOKE, "--out", out)
    assert done.code == 0, done.err
    after = cli.contents(out / "runs")
    changed = {name.split("/")[0] for name in after if after[name] != before.get(name)}
    assert changed == {lost.name, broken.name}
    assert [row["last, %"] for row in done.json()["rows"]] == [row["last, %"] for row in first["rows"]]


def test_a_folder_with_other_settings_is_refused(cli, table1, tmp_path):
    out = shutil.copytree(table1[0], tmp_path / "out")
    before = cli.contents(out)
    done = cli("reproduce", "table1", *SMOKE, "--out", out, "--precision", "bfloat16")
    assert (done.code, done.out) == (2, "")
    assert "with another precision" in done.message
    assert cli.contents(out) == before


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all experiments: what one has trained, the next one takes."""
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - {"table1"}))
def test_every_experiment_runs(cli, name, out):
    is_figure = name.startswith("figure")
    argv = ("--scale", "smoke", "--seeds", 1, "--device", "cpu", "--json", "--out", out)
    done = cli("reproduce", name, *argv, *(() if is_figure else ("--images", 0)))
    assert done.code == 0, done.err
    rows = done.json()["rows"]
    assert [row["setting"] for row in rows] == [c.setting for c in EXPERIMENTS[name].cells("smoke")]
    assert all(row["seeds"] == "1" and 0 <= float(row["last, %"]) <= 100 for row in rows)
    assert all(tuple(row) == HEAD for row in rows)
    page = html.unescape((out / f"{name}.html").read_text())
    assert '<h2 id="accuracy">' in page
    assert ('<h2 id="correlation">' in page) == is_figure


def test_given_teachers_and_chosen_cells(cli, table1, tmp_path):
    teachers = table1[0] / "teachers"
    argv = ("--settings", "TCKD alone", "--teachers", teachers, "--teacher-cache", tmp_path / "cache")
    done = cli("reproduce", "table1", *SMOKE, *argv, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (row,) = done.json()["rows"]
    assert row["setting"] == "TCKD alone"
    assert not (tmp_path / "out" / "teachers").exists()
    assert len(list((tmp_path / "cache").glob("*.rows"))) == 1
    assert done.json()["teachers"] == table1[1]["teachers"]


def test_a_table_of_what_is_finished(cli, table1, tmp_path):
    out = shutil.copytree(table1[0], tmp_path / "out")
    lost, *_ = sorted((out / "runs").glob("*TCKD-alone-s1"))
    shutil.rmtree(lost)
    done = cli("reproduce", "table1", *SMOKE, "--out", out, "--no-run")
    assert done.code == 0, done.err
    assert not lost.exists()
    seeds = {row["setting"]: row["seeds"] for row in done.json()["rows"]}
    assert seeds == {"baseline": "2", "KD (TCKD + NCKD)": "2", "TCKD alone": "1", "NCKD alone": "2"}
    empty = cli("reproduce", "table1", *SMOKE, "--out", tmp_path / "none", "--no-run")
    assert (empty.code, empty.out) == (2, "")
    assert "no weights of resnet14, and --no-run trains none" in empty.message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("table10",), "unknown experiment 'table10'; nearest: table1"),
        (("table1", "--seeds", 0), "seeds: got 0"),
        (("table1", "--images", -1), "images: got -1"),
        (("table1", "--pairs", "vgg13_vgg9"), "pairs: got 'vgg13_vgg9'; allowed: resnet32x4_ShuffleV1, "),
        (("table1", "--settings", "kd"), "settings: got 'kd'; allowed: KD (TCKD + NCKD), "),
        ((), "One of: cifar100, table1, table2"),
    ],
)
def test_bad_usage(cli, argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("reproduce", *argv)
    assert (done.code, done.out) == (2, "")
    assert said in done.message
    assert not list(tmp_path.iterdir())
