"""`mdistiller bench data`: three loaders of the same files, and numbers that add up."""

import json
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller.analysis import bench_data
from mdistiller.analysis.bench_data import OURS, TIMM, TORCHVISION, DataBench, Feed, find_files
from mdistiller.errors import ConfigError, DataError
from mdistiller.training.distributed import World

# Python 3.12 and later say so whenever a process with threads (torch's) forks a DataLoader's workers.
# timm's data set leaves its files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = ("--workers", 0, "--batch-size", 4, "--image-size", 24, "--rounds", 3, "--device", "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 7), ("val", 1)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((40, 60, 3), 100 * label + 10 * i, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def found(cli, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    done = cli("bench", "data", photos, *SMALL, "--out", out, "--json")
    assert done.code == 0, done.err
    return done.json(), out


def test_rows(found):
    result, _ = found
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [OURS, TORCHVISION, TIMM]
    for row in rows.values():
        assert len(row["images_per_second"]) == 2, "the first round does not count"
        assert row["median"] == pytest.approx(statistics.mean(row["images_per_second"]))
        assert row["cpu_us_an_image"] is None or row["cpu_us_an_image"] > 0
    assert rows[TORCHVISION]["of_torchvision"] == 1
    ratios = [
        a / b for a, b in zip(*(rows[name]["images_per_second"] for name in (OURS, TORCHVISION)), strict=True)
    ]
    assert rows[OURS]["of_torchvision"] == pytest.approx(statistics.mean(ratios))
    settings = result["settings"]
    assert (settings["images"], settings["workers"], settings["device"]) == (12, 0, "cpu")  # of 14
    assert {"cpu", "cpu_count", "versions"} <= set(result["environment"])
    assert "command" not in result["environment"]  # it may hold paths


def test_files_of_the_result(found):
    result, out = found
    assert json.loads((out / "bench-data.json").read_text()) == result
    table = (out / "bench-data.md").read_text()
    assert table.startswith("| loader | images/s |")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        f"| {name}" for name in (OURS, TORCHVISION, TIMM)
    ]


def epochs(photos, workers=0, **limits):
    files = find_files(photos, limits.get("limit"))
    feed = Feed(4, 24, workers, World(torch.device("cpu")))
    return files, {name: row.epoch for name, row in DataBench(files, feed)._rows.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_all_loaders_make_the_same_kind_of_batch(photos, workers):
    files, starts = epochs(photos, workers)
    assert len(files.samples) == 14
    for name, start in starts.items():
        shades = []
        for _ in range(2):
            batches = [(image, label) for image, label, *_ in start()]
            assert [len(label) for _, label in batches] == [4, 4, 4], name
            images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            assert images.dtype == torch.float32
            assert images.shape == (12, 3, 24, 24)
            # Each image has one colour, 100 * label + 10 * i, which no crop or flip changes.
            shade = (images.mean((2, 3)) * torch.tensor([0.229, 0.224, 0.225])).add(
                torch.tensor([0.485, 0.456, 0.406])
            )
            assert (shade - shade[:, :1]).abs().max() < 0.01, name
            value = (shade[:, 0] * 255).round()
            assert ((value > 90) == labels.bool()).all(), name
            assert len(value.unique()) == 12, "each file once an epoch"
            shades.append(value)
        assert not torch.equal(*shades), "epochs are shuffled"


def test_a_limit_is_spread_over_the_classes(photos):
    files = find_files(photos, 4)
    assert [label for _, label in files.samples] == [0, 0, 1, 1]
    assert files.folder == photos / "train"
    assert find_files(photos / "val", None).folder == photos / "val"


def test_without_timm(photos, monkeypatch):
    monkeypatch.setattr(bench_data, "find_spec", lambda name: None)
    bench = DataBench(find_files(photos, None), Feed(4, 24, 0, World(torch.device("cpu"))))
    assert list(bench._rows) == [OURS, TORCHVISION]


def test_turns_are_interleaved_and_ratios_paired(photos, monkeypatch):
    bench = DataBench(find_files(photos, None), Feed(4, 24, 0, World(torch.device("cpu"))))
    order, now = [], [0.0]
    # The machine gets slower from round to round; torchvision always takes twice our time.
    speed = {OURS: 1.0, TORCHVISION: 2.0, TIMM: 1.5}
    for name, row in bench._rows.items():

        def epoch(name=name):
            order.append(name)
            now[0] += speed[name] * (1 + (len(order) - 1) // 3)
            return [(torch.zeros(4),)] * 3

        row.epoch = epoch
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: now[0])
    bench.run(3, lambda number: None)
    names = [OURS, TORCHVISION, TIMM]
    assert order == [*names, *names[1:], names[0], names[2], *names[:2]]
    rows = {row["name"]: row for row in bench.rows(1)}
    assert rows[OURS]["of_torchvision"] == 2
    assert rows[OURS]["images_per_second"] == [12 / 2, 12 / 3]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--batch-size", 15), 2, "batch_size: got 15, but there are 14 images"),
        (("--batch-size", 0), 2, "batch_size: got 0; allowed"),
        (("--workers", -1), 2, "workers: got -1; allowed are auto"),
        (("--images", 0), 2, "images: got 0"),
        (("--warmup", 6), 2, "warmup: got 6; allowed: 0 to rounds - 1 = 5"),
    ],
)
def test_bad_flags(cli, photos, flags, code, said):
    done = cli("bench", "data", photos, *flags)
    assert done.code == code
    assert said in done.message


def test_bad_folders(cli, photos, tmp_path):
    for root in (tmp_path, tmp_path / "none", photos / "train" / "ant" / "0.jpg"):
        done = cli("bench", "data", root)
        assert done.code == 1
        assert "has no class folders of images" in done.message
    with pytest.raises(DataError, match="class folders"):
        find_files(tmp_path, None)
    with pytest.raises(ConfigError, match="batch_size"):
        DataBench(find_files(photos, 2), Feed(4, 24, 0, World(torch.device("cpu"))))
