"""`mdistiller train RECIPE --seeds N`: a run a seed and one report."""

import re
import statistics

import pytest

RECIPE = "digits.student.resnet8"


@pytest.fixture(scope="module")
def three(cli, tmp_path_factory):
    """A folder of runs with seeds 4 to 6, and what the command gave."""
    out = tmp_path_factory.mktemp("seeds") / "all"
    return out, cli("train", RECIPE, *cli.FAST, "--epochs", 1, "--seed", 4, "--seeds", 3, "--out", out)


def test_three_runs_and_one_report(cli, three):
    out, done = three
    assert (done.code, done.out) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "s4", "s5", "s6"]
    assert not list(out.glob("*/report.html"))
    assert [cli.config(out / name)["seed"] for name in ("s4", "s5", "s6")] == [4, 5, 6]
    top1 = [cli.metrics(out / name)[-1]["last"]["top1"] for name in ("s4", "s5", "s6")]
    mean, std = statistics.fmean(top1), statistics.stdev(top1)
    assert f"seeds 4 to 6: top1 last epoch {mean:.2f} ± {std:.2f} %" in done.err
    assert "run 2 of 3" in done.err


def test_each_run_is_that_of_its_seed(cli, three, tmp_path):
    done = cli("train", RECIPE, *cli.FAST, "--epochs", 1, "--seed", 5, "--out", tmp_path / "alone")
    assert done.code == 0, done.err
    assert cli.timeless(tmp_path / "alone") == cli.timeless(three[0] / "s5")


def test_resume_trains_what_is_missing(cli, three):
    out, _ = three
    before = cli.contents(out / "s4")
    argv = ("train", RECIPE, *cli.FAST, "--epochs", 1, "--seed", 4, "--seeds", 4, "--out", out)
    assert cli(*argv).code == 2  # s4 is there
    done = cli(*argv, "--resume", "--json")
    assert done.code == 0, done.err
    assert cli.contents(out / "s4") == before
    assert [re.search(r"s\d$", run["out"])[0] for run in done.json()["runs"]] == ["s4", "s5", "s6", "s7"]
    assert done.json()["row"]["seeds"] == 4


def test_wrong_use(cli, student_run, tmp_path):
    done = cli("train", RECIPE, *cli.FAST, "--seeds", 0, "--out", tmp_path / "x")
    assert (done.code, "seeds: got 0" in done.message) == (2, True)
    done = cli("train", RECIPE, *cli.FAST, "--seeds", 2, "--out", student_run)
    assert (done.code, "holds a run; allowed" in done.message) == (2, True)
