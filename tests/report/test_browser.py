"""The page in a real browser, opened from a file with the network off."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mdistiller.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright installed")

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
DESKTOP, PHONE = (1100, 900), (390, 844)
LABELS = ["DKD", "student alone", "teacher"]
NUMBERS = (
    "seeds",
    "last, %",
    "best, %",
    "Δ baseline",
    "Δ teacher",
    "seconds",
    "ms/step",
    "parameters",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)  # its profile is a new folder
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(real_runs, tmp_path_factory) -> Path:
    return write_report(real_runs, tmp_path_factory.mktemp("page") / "page.html", images=200, device="cpu")


@pytest.fixture
def visit(chromium):
    """`visit(path, size, scheme)`: the page, and what it complains about as it goes on."""
    contexts = []

    def open_page(path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light"):
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto(path.as_uri())
        return page, complaints

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def artifacts(tmp_path) -> Path:
    """Where pictures are kept: $MDISTILLER_ARTIFACTS, else pytest's folder, which keeps the last runs'."""
    folder = Path(os.environ.get("MDISTILLER_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        ("desktop", DESKTOP, "light"),
        ("phone", PHONE, "light"),
        ("dark", DESKTOP, "dark"),
        ("narrow", (360, 800), "dark"),
        ("wide", (2000, 1100), "light"),
    ],
)
def test_draws_everything_without_a_complaint(report, visit, artifacts, name, size, scheme):
    page, complaints = visit(report, size, scheme)
    # Of a chart's drawings, the page shows the one that fits.
    drawn = page.evaluate(
        """[...document.querySelectorAll('.chart:has(svg.plot)')].filter(c => c.checkVisibility())
            .map(c => [c.id, [...c.querySelectorAll('svg.plot')]
                .filter(svg => svg.getBoundingClientRect().width > 200).length])"""
    )
    names = dict(drawn)
    assert len(drawn) == len(names)
    assert {"ranking", "accuracy-curves", "test-tckd"} <= set(names)
    assert "correlation-0" in names
    assert set(names.values()) == {1}
    # The page never scrolls sideways; wide tables do so within it.
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == size[0]
    for heading in page.locator("h2").all():
        assert heading.bounding_box()["width"] <= size[0]
    shot = artifacts / f"report-{name}.png"
    page.screenshot(path=shot, full_page=True)
    with Image.open(shot) as picture:
        assert picture.width == size[0]
        corner = picture.convert("L").getpixel((2, 2))
    assert corner < 60 if scheme == "dark" else corner > 240
    assert complaints == []


CUT = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg.plot')) {
    const box = svg.getBoundingClientRect();
    if (!box.width) continue;
    if (!svg.closest('.scroll') && box.right > innerWidth + 1) found.push(svg.closest('.chart').id);
    for (const text of svg.querySelectorAll('text')) {
      const own = text.getBoundingClientRect();
      if (own.width && (own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1
          || own.height < 9)) found.push(svg.closest('.chart').id + ': ' + text.textContent);
    }
  }
  return found; }"""


@pytest.mark.parametrize("width", [360, 768, 1280, 2000])
def test_nothing_is_cut_or_too_small_to_read(report, visit, width):
    page, _ = visit(report, (width, 900))
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CUT) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_answer_is_on_the_first_screen(report, visit):
    for size in (DESKTOP, PHONE):
        page, _ = visit(report, size)
        for part in (".answer", "#ranking svg.plot:visible"):
            box = page.locator(part).first.bounding_box()
            assert box["y"] + min(box["height"], 200) < size[1]
        assert page.locator(".answer").inner_text().startswith("DKD ")


def test_colors_follow_the_reader(report, visit):
    page, complaints = visit(report)

    def ink() -> str:
        return page.evaluate("getComputedStyle(document.querySelector('#ranking text:not(.faint)')).fill")

    light = ink()
    page.emulate_media(color_scheme="dark")
    assert (light, ink()) == ("rgb(27, 31, 36)", "rgb(230, 232, 235)")
    assert complaints == []


@pytest.mark.parametrize("kind", ["svg", "png", "csv"])
def test_a_chart_is_saved(report, visit, tmp_path, kind):
    page, complaints = visit(report, DESKTOP, "dark")
    for chart in ("ranking", "correlation-0"):
        with page.expect_download() as waiting:
            page.locator(f"#{chart} [data-save={kind}]").click()
        assert waiting.value.suggested_filename == f"{chart}.{kind}"
        path = tmp_path / f"{chart}.{kind}"
        waiting.value.save_as(path)
        if kind == "svg":
            root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert "--ink:#e6e8eb" in path.read_text(encoding="utf-8")
        elif kind == "png":
            with Image.open(path) as picture:
                assert picture.width > 500
                assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
        else:
            head = path.read_text(encoding="utf-8").splitlines()[0]
            assert head.startswith({"ranking": "row,n,mean,std,", "correlation-0": "class,"}[chart])
    assert complaints == []


def test_a_saved_line_chart_has_a_legend(report, visit, tmp_path):
    """It names the drawn rows, in their order, within the picture."""
    page, complaints = visit(report, DESKTOP)
    drawn = page.locator("#accuracy-curves svg.wide g.row:not(.off)")
    rows = list(dict.fromkeys(drawn.evaluate_all("all => all.map(g => g.dataset.row)")))
    assert len(rows) > 1
    with page.expect_download() as waiting:
        page.locator("#accuracy-curves [data-save=svg]").click()
    waiting.value.save_as(tmp_path / "c.svg")
    root = ElementTree.fromstring((tmp_path / "c.svg").read_text(encoding="utf-8"))
    *_, width, height = root.attrib["viewBox"].split()
    assert (width, height) == (root.attrib["width"], root.attrib["height"])
    legend = [g for g in root.findall(".//{*}g") if g.get("transform", "").startswith("translate(14 ")]
    assert {g.find("{*}text").text for g in legend} == {*rows}
    assert all(float(g.get("transform")[13:-1]) + 12 < float(height) for g in legend)
    assert complaints == []


def test_a_table_is_saved_with_columns_for_mean_and_std(report, visit, tmp_path):
    page, _ = visit(report)
    with page.expect_download() as waiting:
        page.locator("#accuracy-table [data-save=csv]").click()
    waiting.value.save_as(tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0][:6] == ["run", "seeds", "last, %", "last, % std", "best, %", "best, % std"]
    assert float(rows[1][2]) > 0
    assert float(rows[1][3]) >= 0
    assert rows[3][3] == ""


def test_values_at_the_pointer(report, visit):
    page, complaints = visit(report)
    page.locator("#test-tckd svg.plot").hover(position={"x": 150, "y": 90})
    text = page.locator("#test-tckd .tip").inner_text()
    assert text.startswith("epoch ")
    assert LABELS[0] in text
    assert complaints == []


def column(page, number: int) -> list[str]:
    rows = page.locator("section[aria-labelledby=accuracy] tbody tr")
    return [row.locator("th, td").nth(number).inner_text() for row in rows.all()]


def test_table_sorts_by_number_on_a_click(report, visit):
    page, complaints = visit(report)
    assert column(page, 0) == LABELS
    head = page.locator("section[aria-labelledby=accuracy] thead th")
    for number, name in enumerate(NUMBERS, 1):
        values = [v.replace("−", "-").replace(",", "").split(" ± ")[0] for v in column(page, number)]
        known = sorted(float(v) for v in values if v != "–")
        for order in ("ascending", "descending"):
            head.nth(number).get_by_role("button").click()
            assert head.nth(number).get_attribute("aria-sort") == order
            assert head.nth(number).inner_text().startswith(name)
            found = [v.replace("−", "-").replace(",", "").split(" ± ")[0] for v in column(page, number)]
            expected = known if order == "ascending" else known[::-1]
            assert [float(v) for v in found[: len(known)]] == expected
            assert set(found[len(known) :]) <= {"–"}  # what is not known comes last
    others = [cell.get_attribute("aria-sort") for cell in head.all()]
    assert others == ["none"] * len(NUMBERS) + ["descending"]
    assert complaints == []


def test_table_sorts_as_numbers_not_as_text(write_run, tmp_path, visit):
    runs = [write_run(f"r{i}", [top1], epochs=i + 1) for i, top1 in enumerate((9.5, 100.0, 62.0))]
    page, _ = visit(write_report(runs, tmp_path / "page.html"))
    page.get_by_role("button", name="last, %").click()
    assert column(page, 2) == ["9.50", "62.00", "100.00"]


@pytest.fixture(scope="module")
def forty(many_rows, tmp_path_factory) -> Path:
    return write_report(many_rows, tmp_path_factory.mktemp("forty") / "page.html", images=200, device="cpu")


OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()])
      .filter(([_, box]) => box.width);
    texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
      // Line boxes are higher than letters.
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.3 * Math.min(a.height, b.height))
        found.push(`${one} | ${other}`);
    }));
  }
  return found; }"""


@pytest.mark.parametrize("width", [360, 768, 1280, 2000])
def test_labels_never_overlap(forty, visit, width, tmp_path):
    """With two teachers, on the page and in the files that its buttons save."""
    page, complaints = visit(forty, (width, 900))
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.locator("text:visible", has_text="teacher resnet20").count() > 2
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(CUT) == []
    for chart in ("ranking", "accuracy-curves", "test-p_t"):
        with page.expect_download() as waiting:
            page.locator(f"#{chart} [data-save=svg]").click()
        path = tmp_path / f"{chart}.svg"
        waiting.value.save_as(path)
        saved, _ = visit(path)
        assert saved.evaluate("document.querySelectorAll('text').length") > 5
        assert saved.evaluate(OVERLAPS) == []
    assert complaints == []


@pytest.mark.parametrize("size", [(1280, 800), (360, 800)])
def test_forty_rows_take_eight_screens(forty, visit, size):
    page, _ = visit(forty, size)
    assert page.evaluate("document.documentElement.scrollHeight") <= 8 * size[1]
    assert page.locator("#ranking svg.plot:visible g.row").count() == 40


def test_correlations_are_visible_in_the_dark(report, visit, artifacts):
    """The darkest and the median cell of a map stand out from the page, as they do in the light."""
    for scheme in ("light", "dark"):
        page, _ = visit(report, DESKTOP, scheme)
        shot = artifacts / f"map-{scheme}.png"
        page.locator("#correlation-0 svg").screenshot(path=shot)
        with Image.open(shot) as picture:
            gray = np.asarray(picture.convert("L"), float)
        paper, (height, width) = gray[1, 1], gray.shape
        # Middles of the ten by ten cells, which lie right of their names and above the columns' names.
        left, side = 13 / 300 * width, 283 / 300 * width
        middles = [int(side * (k + 0.25) / 10) for k in range(10)]
        cells = [
            abs(gray[int(4 / 318 * height) + y, int(left) + x] - paper) for y in middles for x in middles
        ]
        assert min(cells) > 8, scheme
        assert np.median(cells) > 15, scheme
        assert max(cells) > 90, scheme


def focus_by_tab(page, selector: str) -> None:
    page.locator("h1").click()
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"the Tab key does not reach {selector}")


def test_table_sorts_by_keyboard(report, visit):
    page, complaints = visit(report)
    focus_by_tab(page, "#accuracy-table th:nth-child(3) button")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    for key, reverse in (("Enter", False), ("Space", True)):
        page.keyboard.press(key)
        found = [float(text.split(" ± ")[0]) for text in column(page, 2)]
        assert found == sorted(found, reverse=reverse)
        assert len(set(found)) > 1
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert column(page, 0) == sorted(LABELS)
    assert complaints == []


def visible(page, chart: str) -> dict[str, bool]:
    """By row: whether the chart's drawing that fits shows it."""
    return page.evaluate(
        """id => Object.fromEntries([...document.querySelectorAll(`#${id} svg.plot:not(.narrow) g.row`)]
            .map(g => [g.dataset.row, getComputedStyle(g).display !== 'none']))""",
        chart,
    )


@pytest.mark.parametrize("by", ["click", "keyboard"])
def test_legend_hides_and_shows_a_row(report, visit, by):
    page, complaints = visit(report)
    row = LABELS[0]
    button = page.locator("section[aria-labelledby=curves] .legend").get_by_role("button", name="DKD")
    press = button.click if by == "click" else lambda: (button.focus(), page.keyboard.press("Enter"))
    assert visible(page, "accuracy-curves") == dict.fromkeys(LABELS, True)
    press()
    assert visible(page, "accuracy-curves") == {row: False, LABELS[1]: True, LABELS[2]: True}
    assert not visible(page, "test-tckd")[row]
    assert visible(page, "ranking")[row]  # the answer stays
    states = [
        b.get_attribute("aria-pressed") for b in page.locator(f'[data-row="{row}"][aria-pressed]').all()
    ]
    assert len(states) == 3
    assert set(states) == {"false"}
    press()
    assert visible(page, "accuracy-curves") == dict.fromkeys(LABELS, True)
    assert complaints == []


def test_a_ninth_row_replaces_the_first(write_run, tmp_path, visit):
    runs = [write_run(f"r{i}", [50.0, 60.0 + i], epochs=i + 1) for i in range(10)]
    page, complaints = visit(write_report(runs, tmp_path / "page.html"))
    legend = page.locator("section[aria-labelledby=curves] .legend")
    before = [row for row, on in visible(page, "accuracy-curves").items() if on]
    assert len(before) == 8
    legend.locator("summary").click()
    legend.locator("button[aria-pressed=false]").first.click()
    after = [row for row, on in visible(page, "accuracy-curves").items() if on]
    assert len(after) == 8
    assert set(before) - set(after) == {before[0]}
    assert legend.locator("button[aria-pressed=true]").count() == 8
    assert complaints == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_what_is_opened_fits(report, visit, size):
    """Plots in a part that was folded away when the page came up."""
    page, complaints = visit(report, size)
    page.get_by_text("Curves on training images, without augmentation").click()
    plot = page.locator("#train-tckd svg.plot").first
    plot.wait_for(state="visible")
    outer = page.locator("#train-tckd").bounding_box()
    assert 200 < outer["width"] <= size[0]
    assert 200 < plot.bounding_box()["width"] <= outer["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert complaints == []


def test_everything_drawn_has_words(report, visit):
    page, _ = visit(report)
    pictures = page.evaluate(
        """[...document.querySelectorAll('svg.plot')].map(p => p.getAttribute('aria-label') ?? '')"""
    )
    assert pictures
    assert all(len(text) > 40 for text in pictures)
    assert page.evaluate("[...document.images].every(i => i.alt.length > 10)")
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    assert page.evaluate("document.documentElement.lang") == "en"


def test_the_browser_would_tell(tmp_path, visit):
    """What the tests above rely on: errors in scripts, and what is fetched in vain, show up."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><img src='https://example.org/x.png'><script>throw new Error('lost')</script>"
    )
    opened, complaints = visit(page)
    opened.wait_for_load_state("load")
    assert any("lost" in line for line in complaints)
    assert any("example.org" in line for line in complaints)
