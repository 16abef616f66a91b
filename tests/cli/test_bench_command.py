"""`mdistiller bench`: rows that add up, on tiny models and a few steps."""

import json
import statistics

import pytest

SMALL = ("bench", "resnet14_resnet8", "--images", 32, "--batch-size", 8, "--rounds", 4, "--warmup", 1)


@pytest.fixture(scope="module")
def found(cli, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    done = cli(
        *SMALL,
        "--methods",
        "kd",
        "fitnet",
        "dkd",
        "--cached",
        "kd",
        "fitnet",
        "--out",
        out,
        "--json",
    )
    assert done.code == 0, done.err
    return done.json(), out


def test_rows(found):
    result, _ = found
    rows = {row["name"]: row for row in result["rows"]}
    # FitNet reads features, so no cache takes the teacher's place.
    assert list(rows) == ["plain training", "kd", "kd, cache", "fitnet", "dkd"]
    assert {name: row["extra_parameters"] for name, row in rows.items() if row["extra_parameters"]} == {
        "fitnet": 32 * 32 + 3 * 32
    }
    plain = statistics.median(rows["plain training"]["ms"])
    for row in rows.values():
        assert len(row["ms"]) == 3
        assert all(ms > 0 for ms in row["ms"])
        median = sorted(row["ms"])[1]
        assert (row["ms_median"], row["ms_low"], row["ms_high"]) == (median, min(row["ms"]), max(row["ms"]))
        assert row["images_per_second"] == pytest.approx(8000 / median)
        assert row["of_plain"] == pytest.approx(median / plain)
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 0
    assert result["settings"]["batch_size"] == 8
    assert {"cpu", "threads", "gpus", "commit", "versions"} <= set(result["environment"])
    assert "command" not in result["environment"]  # it may hold paths


def test_files(found):
    result, out = found
    assert json.loads((out / "bench.json").read_text()) == result
    lines = (out / "bench.md").read_text().splitlines()
    assert len(lines) == 2 + len(result["rows"])
    assert all(line.count("|") == 8 for line in lines)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("bench", "resnet14_resnet9"), "unknown student 'resnet9'"),
        ((*SMALL, "--methods", "kdd"), "unknown method 'kdd'"),
        ((*SMALL[:-2], "--warmup", 4), "warmup: got 4; allowed: 0 to rounds - 1 = 3"),
        ((*SMALL, "--device", "cuda:99"), "device: got 'cuda:99'"),
    ],
)
def test_bad_usage(cli, argv, said):
    done = cli(*argv)
    assert (done.code, done.out) == (2, "")
    assert said in done.message
