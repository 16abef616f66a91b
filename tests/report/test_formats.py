"""The report's tables in other formats, read back by other readers."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest

from mdistiller.errors import ConfigError
from mdistiller.report import FORMATS, report_text
from mdistiller.report.formats import latex_text
from mdistiller.report.markup import csv_text

stats = pytest.importorskip("scipy.stats")
TOP1 = {"none": [80.0, 81.0, 82.5], "dkd": [95.3, 96.1, 96.9]}


@pytest.fixture
def runs(write_run):
    known = [{"test": {"teacher_top1": 98.0, "agreement": 91.0, "nckd": 0.25}}]
    return [
        write_run(
            f"{method}-s{seed}",
            [top1],
            method=method,
            seed=seed,
            diagnostics=known if method == "dkd" else None,
        )
        for method, seeds in TOP1.items()
        for seed, top1 in enumerate(seeds)
    ]


def test_csv_has_a_column_for_each_number(runs):
    dkd, none = csv.DictReader(report_text(runs, format="csv").splitlines())
    for row, method in ((none, "none"), (dkd, "dkd")):
        assert (row["method"], row["n"], row["metric"], row["student"]) == (method, "3", "top1", "resnet8")
        assert float(row["last_mean"]) == pytest.approx(np.mean(TOP1[method]))
        assert float(row["last_std"]) == pytest.approx(np.std(TOP1[method], ddof=1))
    assert float(dkd["p_baseline"]) == pytest.approx(
        stats.ttest_ind(TOP1["dkd"], TOP1["none"], equal_var=False).pvalue
    )
    assert (dkd["agreement_mean"], dkd["agreement_std"], dkd["nckd_mean"]) == ("91.0", "0.0", "0.25")
    assert (none["p_baseline"], none["agreement_mean"], none["teacher"]) == ("", "", "")


def test_json(runs):
    found = json.loads(report_text(runs, format="json"))
    (answer,) = found["answers"]
    assert answer["sentence"].startswith("DKD 96.1 ± 0.8 %, 14.9 points above the student alone (p")
    assert answer["teachers"] == {"teacher": 98.0}
    assert [row["values"] for row in found["rows"]] == list(TOP1.values())[::-1]
    assert found["rows"][0]["last_mean"] == pytest.approx(96.1)


def test_markdown(runs):
    text = report_text(runs, format="md", title="A title")
    title, answer, table = text.split("\n\n")
    assert title == "# A title"
    assert answer.startswith("DKD 96.1 ± 0.8 %")
    assert table.splitlines() == [
        "| row | n | test accuracy, % | Δ baseline | agreement, % | NCKD, nats |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| DKD | 3 | 96.10 ± 0.80 | +14.93 | 91.0 ± 0.0 | 0.250 ± 0.000 |",
        "| student alone | 3 | 81.17 ± 1.26 | – | – | – |",
    ]


def test_latex(runs):
    lines = report_text(runs, format="latex").splitlines()
    assert lines[0] == "% digits: 6 runs"
    assert lines[3:5] == [r"\begin{tabular}{lrrrrr}", r"\toprule"]
    assert lines[7] == r"DKD & 3 & 96.10 $\pm$ 0.80 & +14.93 & 91.0 $\pm$ 0.0 & 0.250 $\pm$ 0.000 \\"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert all(line.count(" & ") == 5 for line in lines if line.endswith(r"\\"))
    assert (
        latex_text(r"a_b & 5 % of $x^2 \ {y}")
        == r"a\_b \& 5 \% of \$x\textasciicircum{}2 \textbackslash{} \{y\}"
    )


NAME = "=cmd|'/C calc'!A0\n[a](javascript:x) <b> `c` \\input{d}"


def test_names_are_text(runs, write_run):
    """Each format shows a hostile name; none runs it."""
    hostile = write_run("hostile", [50.0], student={"name": NAME})
    rows = list(csv.reader(io.StringIO(report_text([*runs, hostile], format="csv"))))
    cells = [cell for row in rows for cell in row]
    assert f"'{' '.join(NAME.split())}" in [" ".join(cell.split()) for cell in cells]
    assert not [cell for cell in cells if cell.startswith(("=", "@"))]
    markdown = report_text([*runs, hostile], format="md", title=NAME)
    assert markdown.startswith(r"# =cmd\|'/C calc'!A0 \[a\](javascript:x) &lt;b> \`c\` \\input{d}" + "\n")
    assert not re.search(r"(?<!\\)[`\[]|<", markdown)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    latex = report_text([*runs, hostile], format="latex")
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert not [line for line in body if r"\input" in line]
    assert any(r"\textbackslash{}input\{d\}" in line for line in body)


def test_numbers_in_csv_stay_numbers():
    cells = ["-1.5", "+2", "-1e-05", "1,000", "−3", "=1", "-a", "+SUM(1)", "@x", ""]
    assert csv_text([cells]) == "-1.5,+2,-1e-05,\"1,000\",−3,'=1,'-a,'+SUM(1),'@x,\n"


def test_an_unknown_format(runs):
    with pytest.raises(ConfigError, match="format: got 'pdf'; allowed: html, md, latex, csv, json"):
        report_text(runs, format="pdf")
    assert set(FORMATS) == {"html", "md", "latex", "csv", "json"}
