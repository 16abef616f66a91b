"""The page: what is on it, and that it needs no network."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from mdistiller.analysis.report import write_report
from mdistiller.analysis.report.markup import counted, metric_names
from mdistiller.errors import DataError
from mdistiller.recipes import get_recipe

TOP1 = {"none": [[40.0, 50.0, 55.5], [42.0, 51.0, 54.5]], "dkd": [[50.0, 60.0, 66.0], [48.0, 62.0, 63.0]]}
LABELS = ("baseline: resnet8", "dkd: resnet20 → resnet8")


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
    assert page.rows[0][:6] == ["run", "seeds", "last, %", "best, %", "Δ baseline", "Δ teacher"]
    assert page.rows[0][6:] == ["seconds", "ms/step", "parameters"]
    assert page.rows[1:3] == [
        [LABELS[0], "2", "55.00 ± 0.71", "55.00 ± 0.71", "–", "–", "3.0", "10.0", "78,042"],
        [LABELS[1], "2", "64.50 ± 2.12", "64.50 ± 2.12", "+9.50", "–", "3.0", "10.0", "78,042"],
    ]


def test_page_is_self_contained(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses
    assert all(re.fullmatch(r"#[a-z]+", address) for address in page.addresses)
    assert all(f'id="{address[1:]}"' in text for address in page.addresses)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    # Plotly is in it; its code has addresses of map servers, for maps alone.
    assert text.count(get_plotlyjs()) == 1
    ours = text.replace(get_plotlyjs(), "")
    for word in ('src="', "src='", "href='", "@import", "url(", "fetch(", "import(", "http"):
        assert word not in ours
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
    assert f"mdistiller train {runs[0] / 'config.json'}" in html.unescape(text)


def test_default_title(runs, tmp_path):
    for folders, words in ((runs[:1], "digits: 1 run"), (runs, "digits: 4 runs")):
        text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
        assert f"<title>{words}</title>" in text


def traces(text: str, name: str) -> list[dict[str, Any]]:
    """What the page gives plotly to draw in a plot."""
    start = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', text)
    assert start is not None
    found, _ = json.JSONDecoder().raw_decode(text, start.end())
    return found


def lines_and_bands(text: str, name: str) -> tuple[list[dict], list[dict]]:
    found = traces(text, name)
    return [t for t in found if t.get("hoverinfo") != "skip"], [
        t for t in found if t.get("hoverinfo") == "skip"
    ]


def test_curves_are_the_runs_metrics(runs, tmp_path):
    """Mean and range over seeds: of test accuracy at each epoch, of the training loss at each step."""
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    for name, x in (("accuracy-curves", [1, 2, 3]), ("loss-curves", [10, 20, 30])):
        shown, bands = lines_and_bands(text, name)
        assert [t["name"] for t in shown] == list(LABELS)
        assert {t["legendgroup"] for t in bands} == set(LABELS)
        assert [t["x"] for t in shown] == [x, x]
        assert len({t["line"]["color"] for t in shown}) == 2
        if name == "loss-curves":
            assert shown[1]["y"] == pytest.approx([1, 1 / 2, 1 / 3])
            continue
        assert [t["y"] for t in shown] == [[41.0, 50.5, 55.0], [49.0, 61.0, 64.5]]
        assert [t["y"] for t in bands] == [
            *([40.0, 50.0, 54.5], [42.0, 51.0, 55.5]),
            *([48.0, 60.0, 63.0], [50.0, 62.0, 66.0]),
        ]


def test_rows_beyond_the_colours_differ_by_dash_and_symbol(write_run, tmp_path):
    folders = [write_run(f"r{i}", [50.0, 51.0], epochs=i + 1) for i in range(8)]
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    marks = {(t["line"]["color"], t["line"]["dash"]) for t in traces(text, "accuracy-curves")}
    assert len(marks) == 8
    dots = {(t["marker"]["color"], t["marker"]["symbol"]) for t in traces(text, "cost-scatter")}
    assert len(dots) == 8


def test_scatter_of_cost(write_run, tmp_path):
    folders = [
        write_run("a", [50.0], method="none", ms=10.0, method_parameters=0),
        write_run("b", [60.0], ms=12.0, method_parameters=500),
        write_run("c", [64.0], ms=14.0, seed=1, method_parameters=500),
        write_run("d", [61.0], method="kd", ms=30.0, method_parameters=1000),
        write_run("e", [62.0], method="crd", ms=31.0),
    ]
    text = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    found = traces(text, "cost-scatter")
    assert [(t["x"], t["y"]) for t in found] == [
        *(([10.0], [50.0]), ([13.0], [62.0]), ([30.0], [61.0]), ([31.0], [62.0]))
    ]
    assert found[1]["error_y"]["array"] == [pytest.approx(np.std([60.0, 64.0], ddof=1))]
    area = [t["marker"]["size"] ** 2 for t in found]
    assert area[1] - area[0] == pytest.approx((area[2] - area[0]) / 2)
    assert area[3] == area[0] < area[2]
    assert "1,000 extra parameters" in found[2]["hovertemplate"]
    assert "unknown" in found[3]["hovertemplate"]
    alone = write_report(folders[:1], tmp_path / "one.html").read_text(encoding="utf-8")
    assert "cost-scatter" not in alone


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
    shown, bands = lines_and_bands(text, "test-tckd")
    assert [(t["name"], t["x"], t["y"]) for t in shown] == [(LABELS[1], [1, 2], [5.0, 2.5])]
    assert [t["y"] for t in bands] == [[4.0, 2.0], [6.0, 3.0]]
    own, teacher = lines_and_bands(text, "train-p_t")[0]
    assert own["y"] == pytest.approx([0.25, 0.125])
    assert (teacher["name"], teacher["y"]) == ("teacher resnet20", [0.8, 0.8])
    assert "legendgroup" not in teacher
    assert len(lines_and_bands(text, "test-agreement")[0]) == 1
    for absent in ("test-nckd", "test-gap", "train-ece"):
        assert f'"{absent}"' not in text
    # Runs of an older version have none at all.
    assert "Knowledge transfer" not in write_report(folders[2:], tmp_path / "old.html").read_text()


def test_settings_that_differ(write_run, tmp_path):
    folders = [
        write_run("d0", [1.0], optim={"lr": 0.1}),
        write_run("d1", [1.0], seed=1, optim={"lr": 0.1}),
        write_run("k0", [1.0], method="kd", data={"kind": "digits", "train_limit": 9}),
    ]
    page = Page(write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8"))
    start = page.rows.index(["field", LABELS[1], "kd: resnet20 → resnet8"])
    found = {name: values for name, *values in page.rows[start + 1 :]}
    assert found["optim.lr"] == ["0.1", "0.05"]
    assert found["data.train_limit"] == ["–", "9"]
    assert found["method.name"] == ["dkd", "kd"]
    assert found["method.beta"] == ["8.0", "–"]
    assert not {"seed", "out", "epochs", "student.name", "data.kind"} & set(found)
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
    ]
    page = Page(write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8"))
    start = page.rows.index(["run", "published, %", "origin", "this run"])
    first, second = page.rows[start + 1 : start + 3]
    assert first[1] == "74.68 (best)"
    assert first[2].startswith("megvii-research/mdistiller@a08d46f:configs/cifar100/dkd/")
    # The folder is written with DKD's default β.
    assert first[3] == "epochs 60 for 240; drops 37.5, 45, 52.5 for 150, 180, 210; method.beta 8 for 6"
    assert second[1:3] == ["default, not published", "–"]
    assert page.rows[start + 3][0] == "field"  # the next table: a recipe of a plug-in has no row


def test_a_run_of_one_epoch_and_one_under_way(write_run, tmp_path):
    one = write_run("one", [50.0], method="none")
    other = write_run("other", [50.0, 60.0], finished=False)
    with open(other / "metrics.jsonl", "a") as file:
        file.write('{"kind": "ev')
    text = write_report([one, other], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "dkd: resnet20 → resnet8 (under way)" in text
    assert "baseline: resnet8 (under way)" not in text


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
    assert "test AP, %" in write_report([other], tmp_path / "page.html").read_text()
    with pytest.raises(DataError, match=r"different metrics \(top1, AP\): write a page for each kind"):
        write_report([one, other], tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


def test_a_metric_without_other_names():
    assert metric_names("mIoU") == ("mIoU", "test mIoU", "test mIoU")
