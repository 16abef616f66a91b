"""The page: what is on it, and that it needs no network."""

from __future__ import annotations

import csv
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mdistiller.errors import DataError
from mdistiller.methods import list_methods
from mdistiller.recipes import get_recipe
from mdistiller.report import write_report
from mdistiller.runs.progress import counted
from mdistiller.types import Metric

TOP1 = {"none": [[40.0, 50.0, 55.5], [42.0, 51.0, 54.5]], "dkd": [[50.0, 60.0, 66.0], [48.0, 62.0, 63.0]]}
LABELS = ("DKD", "student alone")


@pytest.fixture
def runs(write_run) -> list[Path]:
    return [
        write_run(f"{method}-s{seed}", top1s, method=method, seed=seed)
        for method, seeds in TOP1.items()
        for seed, top1s in enumerate(seeds)
    ]


class Page(HTMLParser):
    """Table cells, and everything that a browser would fetch or run from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def handle_endtag(self, tag) -> None:
        while self.open and self.open.pop() != tag:
            pass


def test_table_on_the_page(runs, tmp_path):
    page = Page(write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8"))
    start = page.rows.index(
        [
            *("run", "seeds", "last, %", "best, %", "Δ baseline", "seconds", "ms/step"),
            "parameters",
        ]
    )
    assert page.rows[start + 1 : start + 3] == [
        [LABELS[0], "2", "64.50 ± 2.12", "64.50 ± 2.12", "+9.50", "3.0", "10.0", "78,042"],
        [LABELS[1], "2", "55.00 ± 0.71", "55.00 ± 0.71", "–", "3.0", "10.0", "78,042"],
    ]


def test_page_is_self_contained(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses
    assert all(re.fullmatch(r"#[a-z]+", address) for address in page.addresses)
    assert all(f'id="{address[1:]}"' in text for address in page.addresses)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    for word in ('src="', "src='", "href='", "@import", "url(", "fetch(", "import(", "http", "plotly"):
        assert word not in text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


@pytest.mark.parametrize(("count", "text"), [(1, "1 thread"), (2, "2 threads")])
def test_one_is_not_plural(runs, tmp_path, count, text):
    assert counted(count, "thread") == text
    file = runs[0] / "env.json"
    file.write_text(file.read_text().replace('"threads": 2', f'"threads": {count}'))
    page = write_report(runs[:1], tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"later ({text}); torch" in page


def test_title_notes_and_how_it_was_made(runs, tmp_path):
    text = write_report(
        runs[:1], tmp_path / "a b.html", title="Tom & <b>Jerry</b>", notes=["5 < 6", "an 'other'"]
    ).read_text(encoding="utf-8")
    assert "<title>Tom &amp; &lt;b&gt;Jerry&lt;/b&gt;</title>" in text
    assert "<h1>Tom &amp; &lt;b&gt;Jerry&lt;/b&gt;</h1>" in text
    assert "<p>5 &lt; 6</p>\n<p>an &#x27;other&#x27;</p>" in text
    assert "A CPU &lt;of&gt; 1994 &amp; later (2 threads); torch 2.6.0, " in text
    assert "mdistiller 0.1.0 at 0123456789ab. To repeat" in text
    command = f"mdistiller train {runs[0] / 'config.json'}"
    assert command in html.unescape(text)


def test_default_title(runs, tmp_path):
    for folders, words in ((runs[:1], "digits: 1 run"), (runs, "digits: 4 runs")):
        text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
        assert f"<title>{words}</title>" in text


def chart(text: str, name: str) -> str:
    """Returns a chart of the page."""
    found = re.search(rf'<div class="chart" id="{name}">.*?</pre></div>', text, re.S)
    assert found is not None
    return found[0]


def numbers(text: str, name: str) -> list[list[str]]:
    """Returns the numbers that a chart's button saves."""
    data = re.search(r'<pre class="data" hidden>\n(.*?)</pre>', chart(text, name), re.S)
    return list(csv.reader(html.unescape(data[1]).splitlines()))


def drawings(text: str, name: str) -> list[ElementTree.Element]:
    """Returns a chart's drawings; they are well-formed XML."""
    found = re.findall(
        r'<svg class="plot.*?</svg>(?=<svg class="plot|<div class="save")', chart(text, name), re.S
    )
    return [ElementTree.fromstring(svg) for svg in found]


def drawn_rows(svg: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {g.get("data-row"): g for g in svg.iter("g") if "row" in g.get("class", "").split()}


def points(path: str) -> list[tuple[float, float]]:
    """Returns the points of a path of absolute and relative lines."""
    found, at = [], (0.0, 0.0)
    for kind, body in re.findall(r"([Ml])([^Mlz]*)", path):
        x, y = map(float, re.findall(r"-?(?:\d+\.?\d*|\.\d+)", body))
        at = (x, y) if kind == "M" else (at[0] + x, at[1] + y)
        found.append(at)
    return found


def test_every_drawing_is_well_formed_and_inside_its_canvas(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    names = re.findall(r'<div class="chart" id="([^"]+)">(?:<svg)', text)
    assert {"ranking", "accuracy-curves", "loss-0", "loss-1"} <= set(names)
    for name in names:
        for svg in drawings(text, name):
            width, height = map(float, svg.get("viewBox").split()[2:])
            assert len(svg.get("aria-label")) > 40
            for part in svg.iter("text"):
                x, y = (float(part.get(k)) for k in ("x", "y"))
                size = 7.6 * len(part.text or "")
                start = {"end": x - size, "middle": x - size / 2}.get(part.get("text-anchor"), x)
                assert start > -8, (name, part.text)
                assert start + size < width + 8, (name, part.text)
                assert 0 < y < height


def test_labels_are_escaped(write_run, tmp_path, monkeypatch):
    """A row's name may hold anything: a folder, a plug-in's model."""
    bad = '</pre><script>alert("1")</script>&\'<b>'
    monkeypatch.setattr("mdistiller.report.runs.method_title", lambda method: bad)
    folders = [write_run("a", [50.0, 51.0]), write_run("b", [60.0, 61.0], epochs=3)]
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert len([row for row in numbers(text, "ranking") if row[0].startswith(bad)]) == 2


def test_losses_that_do_not_compare_are_in_frames_of_their_own(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    for i, label in enumerate(LABELS):
        head, *lines = numbers(text, f"loss-{i}")
        assert head == ["step", label]
        np.testing.assert_allclose(np.array(lines, float), [[10, 1], [20, 0.5], [30, 1 / 3]], atol=1e-4)
        (svg,) = drawings(text, f"loss-{i}")
        assert list(drawn_rows(svg)) == [label]


def test_curves_are_the_runs_metrics(runs, tmp_path):
    """Mean over seeds of test accuracy at each epoch."""
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    head, *lines = numbers(text, "accuracy-curves")
    assert head == ["epoch", *LABELS]
    np.testing.assert_allclose(np.array(lines, float), [[1, 49, 41], [2, 61, 50.5], [3, 64.5, 55]])
    for svg in drawings(text, "accuracy-curves"):
        rows = drawn_rows(svg)
        assert list(rows) == list(LABELS)
        # Heights in the drawing are proportional to the values; the band spans the seeds.
        ends = {}
        for label, row in rows.items():
            (line,) = [p for p in row.iter("path") if p.get("class") == "curve"]
            (band,) = [p for p in row.iter("path") if p.get("class") == "band"]
            ends[label] = points(line.get("d"))[-1]
            high, low = points(band.get("d"))[2], points(band.get("d"))[3]
            assert high[1] < ends[label][1] < low[1]
        scale = (ends[LABELS[1]][1] - ends[LABELS[0]][1]) / (64.5 - 55)
        assert high[1] == pytest.approx(ends[LABELS[1]][1] - 0.5 * scale, abs=0.2)
    assert len({look.get("stroke") for look in svg.iter("path") if look.get("class") == "curve"}) == 2


def test_the_first_epochs_do_not_rule_an_axis(write_run, tmp_path):
    values = [1.0, 5.0, *[70.0 + i / 10 for i in range(28)]]
    folders = [write_run("a", values), write_run("b", [v + 1 for v in values], method="kd")]
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    for svg in drawings(text, "accuracy-curves"):
        ticks = [
            t.text
            for t in svg.iter("text")
            if re.fullmatch(r"[\d.]+", t.text or "") and t.get("text-anchor") == "end"
        ]
        assert min(map(float, ticks)) >= 69
        assert len(ticks) >= 3


def test_at_most_eight_rows_are_drawn_at_first(write_run, tmp_path):
    folders = [write_run(f"r{i}", [50.0, 51.0 + i], epochs=i + 1) for i in range(12)]
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    for svg in drawings(text, "accuracy-curves"):
        rows = drawn_rows(svg)
        assert len(rows) == 12
        assert sum("off" in row.get("class") for row in rows.values()) == 4
    assert [f'id="loss-{i}"' in text for i in range(9)] == [True] * 8 + [False]
    pressed = re.findall(r'aria-pressed="(\w+)" data-row', text.split('class="legend"')[1].split("</div>")[0])
    assert (pressed.count("true"), pressed.count("false")) == (8, 4)
    ranking = drawings(text, "ranking")
    assert all(len(drawn_rows(svg)) == 12 for svg in ranking)


def test_the_ranked_chart(runs, write_run, tmp_path):
    """Single seeds; from three seeds on their mean and the interval of scipy. The teacher is a row."""
    stats = pytest.importorskip("scipy.stats")
    known = [{"test": {"teacher_top1": 60.0}}]
    third = write_run("dkd-s2", [65.0], seed=2, diagnostics=known)
    others = [
        write_run(f"d{seed}", [seed[-1]], seed=i, diagnostics=known) for i, seed in enumerate(TOP1["dkd"])
    ]
    text = write_report([*runs[:2], *others, third], tmp_path / "page.html").read_text(encoding="utf-8")
    head, *lines = numbers(text, "ranking")
    assert head == ["row", "n", "mean", "std", "low95", "high95", "value1", "value2", "value3"]
    assert [line[0] for line in lines] == [*LABELS, "teacher"]
    values = {"DKD": [66.0, 63.0, 65.0], "student alone": [55.5, 54.5]}
    for line, own in zip(lines, values.values(), strict=False):
        interval = stats.t.interval(0.95, 2, np.mean(own), stats.sem(own)) if len(own) > 2 else []
        expected = [len(own), np.mean(own), np.std(own, ddof=1), *interval, *own]
        np.testing.assert_allclose([float(x) for x in line[1:] if x], expected)
    for svg in drawings(text, "ranking"):
        rows = drawn_rows(svg)
        assert list(rows) == ["DKD", "teacher", "student alone"]  # by their metrics
        for label, own in values.items():
            seeds = [float(c.get("cx")) for c in rows[label].iter("circle") if c.get("class") == "seed"]
            means = [float(c.get("cx")) for c in rows[label].iter("circle") if c.get("class") is None]
            bars = [p for p in rows[label].iter("path") if p.get("class") == "bar"]
            assert len(seeds) == len(own)
            assert (len(means), len(bars)) == ((1, 1) if len(own) > 2 else (0, 0))
            for mean in means:
                assert mean == pytest.approx(np.mean(seeds), abs=0.2), label


def test_a_row_has_one_name(runs, tmp_path):
    """In the answer, the charts with their labels, numbers and legends, and the tables."""
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "DKD 64.5 ± 2.1\u00a0%" in text.replace("\u00a0±\u00a0", " ± ")
    assert "above the student alone" in text
    for other in ("dkd: ", "baseline: ", "resnet8 alone"):
        assert other not in text
    for svg in drawings(text, "ranking"):
        assert {row.find("text").text for row in drawn_rows(svg).values()} == set(LABELS)
    legend = text.split('class="legend"')[1].split("</div>")[0]
    assert re.findall(r"</svg>([^<]+)</button>", legend) == list(LABELS)
    rows = [cells[0] for cells in Page(text).rows]
    assert set(rows) == {"run", "row", *LABELS}


def test_what_few_readers_need_is_folded(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    for name in ("settings", "made"):
        section = text.split(f'<section aria-labelledby="{name}">')[1].split("</section>")[0]
        assert section.startswith(f'<details><summary><h2 id="{name}">')
        assert section.endswith("</details>")
    assert '<section aria-labelledby="published">' not in text  # no recipe, and so no empty table


def test_paths_are_relative(write_run, tmp_path, monkeypatch):
    """The page may be sent to others, and tells nobody where its author keeps her files."""
    teachers = [write_run(name, [70.0], method="none", student={"name": "resnet20"}) for name in ("t1", "t2")]
    students = [
        write_run(f"d{i}", [60.0], teacher={"name": "resnet20", "checkpoint": str(folder)})
        for i, folder in enumerate(teachers)
    ]
    monkeypatch.chdir(tmp_path.parent)
    page = write_report([*teachers, *students], tmp_path / "page.html", images=20)
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert "teacher.checkpoint t1" in text
    assert f"mdistiller train {tmp_path.name}/d0/config.json" in text
    assert "Missing parts" in text
    assert str(tmp_path) not in text


def diagnostics(values: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "test": {"tckd": v, "p_t": v / 10, "teacher_p_t": 0.9, "agreement": 10 * v},
            "train": {"tckd": v + 1, "p_t": v / 20, "teacher_p_t": 0.8, "agreement": 9 * v},
        }
        for v in values
    ]


def test_what_is_transferred_over_time(write_run, tmp_path):
    folders = [
        write_run("d0", [1.0, 2.0], diagnostics=diagnostics([4.0, 2.0])),
        write_run("d1", [1.0, 2.0], seed=1, diagnostics=diagnostics([6.0, 3.0])),
        write_run("old", [1.0, 2.0], method="kd"),
    ]
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    assert numbers(text, "test-tckd") == [["epoch", LABELS[0]], ["1", "5"], ["2", "2.5"]]
    head, *lines = numbers(text, "train-p_t")
    assert head == ["epoch", LABELS[0], "teacher"]
    assert lines == [["1", "0.25", "0.8"], ["2", "0.125", "0.8"]]
    assert len(numbers(text, "test-agreement")[0]) == 2
    for absent in ("test-nckd", "test-gap", "train-ece"):
        assert f'"{absent}"' not in text
    # Runs of an older version have none at all.
    old = write_report(folders[2:], tmp_path / "old.html").read_text()
    assert "Knowledge transfer" not in old
    assert "agreement, %" not in old


def test_settings_that_differ(write_run, tmp_path):
    folders = [
        write_run("d0", [1.0], optim={"lr": 0.1}),
        write_run("d1", [1.0], seed=1, optim={"lr": 0.1}),
        write_run("k0", [1.0], method="kd", data={"kind": "digits", "train_limit": 9}),
    ]
    page = Page(write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8"))
    start = page.rows.index(["row", "settings that differ between rows"])
    found = {
        row: dict(setting.split(" ", 1) for setting in settings.split(" · "))
        for row, settings in page.rows[start + 1 :]
    }
    assert set(found) == {LABELS[0], "KD"}
    assert (found["DKD"]["optim.lr"], found["KD"]["optim.lr"]) == ("0.1", "0.05")
    assert (found["DKD"].get("data.train_limit"), found["KD"]["data.train_limit"]) == (None, "9")
    assert (found["DKD"]["method.beta"], found["KD"].get("method.beta")) == ("8", None)
    assert not {"seed", "out", "epochs", "student.name", "method.name", "data.kind"} & {
        *found["DKD"],
        *found["KD"],
    }
    same = write_report(folders[:2], tmp_path / "same.html").read_text(encoding="utf-8")
    assert "Different settings" not in same


def test_published_runs_of_the_recipes(write_run, tmp_path):
    models = {"student": {"name": "vgg8"}, "teacher": {"name": "vgg13"}}
    recipe = "cifar100.dkd.vgg13_vgg8"
    published = get_recipe(recipe).model_dump(mode="json")
    own = {"method", "seed", "out", "diagnostics"}  # of `write_run` itself
    short = {name: value for name, value in published.items() if name not in own} | {"epochs": 60}
    folders = [
        write_run("own", [1.0], **short),
        write_run("none", [1.0], method="kd", recipe="digits.kd.resnet20_resnet8", epochs=20),
        write_run("unknown", [1.0], method="kd", recipe="mine.kd.a_b", **models),
        write_run("older", [1.0], seed=1, method="kd", **short | {"recipe": "cifar100.kd.vgg13_vgg8"}),
    ]
    older = json.loads((folders[-1] / "config.json").read_text(encoding="utf-8"))
    (folders[-1] / "config.json").write_text(json.dumps(older | {"gone": 1}), encoding="utf-8")
    page = Page(write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8"))
    start = page.rows.index(["run", "published, %", "origin", "this run"])
    first = page.rows[start + 1]
    assert first[1] == "74.68 (best)"
    assert first[2].startswith("megvii-research/mdistiller@a08d46f:configs/cifar100/dkd/")
    # The folder is written with DKD's default β.
    assert first[3] == "epochs 60 for 240; drops 37.5, 45, 52.5 for 150, 180, 210; method.beta 8 for 6"
    # Settings that this version cannot read hide no published row.
    older_row = page.rows[start + 2]
    assert older_row[1] == "72.98 (last)"
    assert older_row[3].startswith("not compared: ")
    assert "gone" in older_row[3]
    # The next table: an unpublished recipe and one of a plug-in have no row.
    assert page.rows[start + 3] == ["row", "settings that differ between rows"]


def test_a_run_of_one_epoch_and_one_under_way(write_run, tmp_path):
    one = write_run("one", [50.0], method="none")
    other = write_run("other", [50.0, 60.0], finished=False)
    with open(other / "metrics.jsonl", "a") as file:
        file.write('{"kind": "ev')
    text = write_report([one, other], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "DKD (under way)" in text
    assert "student alone (under way)" not in text


def test_a_failure_leaves_the_old_page(runs, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(DataError, match="nowhere is no run folder"):
        write_report([*runs, tmp_path / "nowhere"], page)
    assert page.read_text() == "old"


def test_runs_of_two_metrics(write_run, tmp_path):
    one, other = write_run("one", [50.0]), write_run("other", [60.0])
    for file, old, new in (
        ("config.json", '"task": "classification"', '"task": "detection"'),
        ("metrics.jsonl", 'top1"', 'AP"'),
    ):
        assert old in (other / file).read_text()
        (other / file).write_text((other / file).read_text().replace(old, new))
    assert "test AP, last epoch, %" in write_report([other], tmp_path / "page.html").read_text()
    with pytest.raises(DataError, match=r"different metrics \(top1, AP\): write a page for each kind"):
        write_report([one, other], tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


def test_a_metric_without_other_names():
    metric = Metric("PQ")
    assert (metric.title, metric.sentence, metric.axis) == ("PQ", "test PQ", "test PQ")


def evaluated(write_run, name: str, top1: float) -> Path:
    """Writes a folder as `mdistiller eval --out` does: one evaluation, no training."""
    folder = write_run(name, [top1], method="none")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line | {"step": 0} for line in lines if line["kind"] != "train"]
    for line in kept:
        for field in ("seconds", "ms_per_step"):
            line.pop(field, None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


def test_a_student_that_was_evaluated_only(write_run, tmp_path):
    folders = [write_run("n", [50.0], method="none"), evaluated(write_run, "own", 66.0)]
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    (own,) = [row for row in page.rows if row[0] == "resnet8, evaluated" and len(row) == 7]
    assert own[-3:-1] == ["–", "–"]
    assert "Resnet8, evaluated 66.0\u00a0%, 16.0 points above the student alone" in text


def many(write_run, rows: int, seeds: int, epochs: int = 60) -> list[Path]:
    methods = [
        "none",
        "kd",
        "dkd",
        *(m for m in list_methods() if m not in ("none", "kd", "dkd", "binary_kd")),
    ]
    random = np.random.default_rng(0)
    folders = []
    for i, method in enumerate(methods[:rows]):
        for seed in range(seeds):
            values = (
                70 + i / 10 - 60 * np.exp(-np.arange(epochs) / 5) + random.normal(0, 0.3, epochs)
            ).tolist()
            known = {
                "test": {"agreement": 90.0, "nckd": 0.5, "tckd": 0.1, "p_t": 0.8, "gap": 3.0, "ece": 2.0}
            }
            known["train"] = known["test"]
            folders.append(
                write_run(f"{method}-{seed}", values, method=method, seed=seed, diagnostics=[known] * epochs)
            )
    return folders


def test_sizes(write_run, tmp_path):
    folders = many(write_run, 18, 2)
    assert write_report(folders[:1], tmp_path / "train.html").stat().st_size < 150_000
    assert write_report(folders[:16], tmp_path / "usual.html").stat().st_size < 300_000
    assert write_report(folders, tmp_path / "large.html").stat().st_size < 300_000


def test_a_longer_run_does_not_rule_the_axis(write_run, tmp_path):
    """A teacher's loss over many more steps, beside that of a student."""
    folders = [write_run("t", [50.0] * 40, method="none"), write_run("s", [50.0] * 4)]
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    for svg in (*drawings(text, "loss-0"), *drawings(text, "loss-1")):
        height = float(svg.get("viewBox").split()[3])
        for row in drawn_rows(svg).values():
            (line,) = [p for p in row.iter("path") if p.get("class") == "curve"]
            assert 0 < points(line.get("d"))[-1][1] < height
