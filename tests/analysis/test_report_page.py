"""The page: what is on it, that it needs no network, and that a browser draws it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from mdistiller.analysis.report import write_report
from mdistiller.errors import DataError

TOP1 = {"none": [[40.0, 50.0, 55.5], [42.0, 51.0, 54.5]], "dkd": [[50.0, 60.0, 66.0], [48.0, 62.0, 63.0]]}
LABELS = ("alone: resnet8", "dkd: resnet20 → resnet8")


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
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def handle_endtag(self, tag) -> None:
        while self.open and self.open.pop() != tag:
            pass


def test_table_on_the_page(runs, tmp_path):
    page = Page(write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.rows[0] == ["run", "seeds", "last, %", "best, %", "seconds", "ms/step", "parameters"]
    assert page.rows[1:] == [
        [LABELS[0], "2", "55.00 ± 0.71", "55.00 ± 0.71", "3.0", "10.0", "78,042"],
        [LABELS[1], "2", "64.50 ± 2.12", "64.50 ± 2.12", "3.0", "10.0", "78,042"],
    ]


def test_page_is_self_contained(runs, tmp_path):
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses == []
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    # Plotly is in it; its code has addresses of map servers, for maps alone.
    assert text.count(get_plotlyjs()) == 1
    ours = text.replace(get_plotlyjs(), "")
    for word in ('src="', "src='", 'href="', "href='", "@import", "url(", "fetch(", "import("):
        assert word not in ours
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


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
    """What the page gives plotly to draw in a figure."""
    start = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', text)
    assert start is not None
    found, _ = json.JSONDecoder().raw_decode(text, start.end())
    return found


def test_curves_are_the_runs_figures(runs, tmp_path):
    """Mean and range over seeds: of test accuracy at each epoch, of the training loss at each step."""
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    for name, x in (("accuracy", [1, 2, 3]), ("loss", [10, 20, 30])):
        shown = [t for t in traces(text, name) if t.get("showlegend") is not False]
        assert [t["name"] for t in shown] == list(LABELS)
        assert [t["x"] for t in shown] == [x, x]
        assert len({t["line"]["color"] for t in shown}) == 2
        if name == "loss":
            assert shown[1]["y"] == pytest.approx([1, 1 / 2, 1 / 3])
            continue
        assert [t["y"] for t in shown] == [[41.0, 50.5, 55.0], [49.0, 61.0, 64.5]]
        bands = [t["y"] for t in traces(text, name) if t.get("showlegend") is False]
        assert bands == [
            *([40.0, 50.0, 54.5], [42.0, 51.0, 55.5]),
            *([48.0, 60.0, 63.0], [50.0, 62.0, 66.0]),
        ]


def test_a_run_of_one_epoch_and_one_under_way(write_run, tmp_path):
    one = write_run("one", [50.0], method="none")
    other = write_run("other", [50.0, 60.0], finished=False)
    with open(other / "metrics.jsonl", "a") as file:
        file.write('{"kind": "ev')
    text = write_report([one, other], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "dkd: resnet20 → resnet8 (under way)" in text
    assert "alone: resnet8 (under way)" not in text


def test_a_failure_leaves_the_old_page(runs, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(DataError, match="nowhere is no run folder"):
        write_report([*runs, tmp_path / "nowhere"], page)
    assert page.read_text() == "old"


# In a browser

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--enable-logging=stderr", "--virtual-time-budget=10000"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no network
)


@pytest.fixture
def browse(tmp_path):
    """`browse(page)`: the document after its scripts have run, and the lines of its console."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on PATH")

    def load(page: Path) -> tuple[str, list[str]]:
        home = tmp_path / "chromium"
        done = subprocess.run(
            [chromium, *FLAGS, f"--user-data-dir={home}", "--dump-dom", page.as_uri()],
            env=os.environ | {"HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return load


def test_a_browser_draws_the_page(runs, tmp_path, browse):
    document, console = browse(write_report(runs, tmp_path / "page.html"))
    assert console == []
    drawn = re.sub(r"<script\b.*?</script>", "", document, flags=re.DOTALL)
    cells = Page(drawn).rows
    assert cells[1][:3] == [LABELS[0], "2", "55.00 ± 0.71"]
    for name in ("accuracy", "loss"):
        figure = drawn.split(f'id="{name}"', 1)[1].split("</figure>", 1)[0]
        assert 'class="main-svg"' in figure
        legend = re.findall(r'<text class="legendtext"[^>]*>([^<]+)</text>', figure)
        assert legend == list(LABELS)
        assert figure.count('class="js-line"') >= 2
        # The script has put the page's colours on the plot.
        assert "rgb(27, 31, 36)" in figure or "rgb(230, 232, 235)" in figure


def test_the_browser_would_tell(tmp_path, browse):
    """What the test above relies on: errors in scripts, and what is fetched in vain, show up."""
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><p>here</p><script>throw new Error('lost')</script>")
    document, console = browse(page)
    assert "here" in document
    assert any("lost" in line for line in console)
