"""One self-contained HTML page over runs: the headline table, the curves, how to repeat them."""

from __future__ import annotations

import html
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mdistiller.analysis.runs import Row, Run, group, load_run, summarise
from mdistiller.engine.checkpoint import write_text

# Okabe and Ito's colours, told apart with any colour vision; black and yellow left out (page colours).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #6b7280; --line: #d6d9de; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #14171b; --faint: #9aa3ad; --line: #363c44; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
p.note, figcaption { color: var(--faint); } figure { margin: 1rem 0; }
pre { background: color-mix(in srgb, var(--ink) 7%, var(--paper)); padding: .7rem; overflow-x: auto; }
"""

# Plot colours follow the page's, now and when the reader switches.
SCRIPT = """
const scheme = matchMedia('(prefers-color-scheme: dark)');
function recolour() {
  const css = getComputedStyle(document.documentElement);
  const ink = css.getPropertyValue('--ink').trim(), line = css.getPropertyValue('--line').trim();
  document.querySelectorAll('.js-plotly-plot').forEach(plot => Plotly.relayout(plot, {
    'font.color': ink, 'xaxis.gridcolor': line, 'yaxis.gridcolor': line,
    'xaxis.zerolinecolor': line, 'yaxis.zerolinecolor': line}));
}
recolour(); scheme.addEventListener('change', recolour);
"""


def write_report(folders: Sequence[Path], out: Path, *, title: str = "", notes: Sequence[str] = ()) -> Path:
    """Write the page for some run folders.

    Args:
        folders: run folders, finished or under way.
        out: the HTML file.
        title: headline; empty takes the data's name and the number of runs.
        notes: paragraphs of plain text shown above the table.

    Returns:
        `out`.

    Raises:
        DataError: a folder is no run.
    """
    runs = [load_run(folder) for folder in folders]
    title = title or f"{runs[0].config['data']['kind']}: {len(runs)} run{'s' if len(runs) > 1 else ''}"
    page = _page(title, notes, runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The headline table as text, header first."""
    head = ["run", "seeds", "last, %", "best, %", "seconds", "ms/step", "parameters"]
    body = [
        [
            row.label + ("" if row.finished else " (under way)"),
            str(row.seeds),
            str(row.last),
            str(row.best),
            f"{row.seconds:.1f}",
            f"{row.ms_per_step:.1f}",
            "–" if row.student_parameters is None else f"{row.student_parameters:,}",
        ]
        for row in rows
    ]
    return [head, *body]


def _page(title: str, notes: Sequence[str], runs: list[Run]) -> str:
    rows = summarise(runs)
    head, *body = table(rows)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in body)
    header = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in head)
    env = runs[0].env
    hardware = ", ".join(env["gpus"]) or f"{env['cpu']} ({env['threads']} threads)"
    made = f"{hardware}; torch {env['versions']['torch']}, mdistiller {env['versions']['mdistiller']}"
    if env["commit"]:
        made += f" at {env['commit'][:12]}"
    commands = "\n".join(
        dict.fromkeys(f"mdistiller train {shlex.quote(str(run.path / 'config.json'))}" for run in runs)
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<script>{get_plotlyjs()}</script></head><body><main>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{cells}</tbody></table></div>',
        '<p class="note">Test accuracy after the last epoch and at its best, mean ± standard deviation over '
        "seeds. The best is picked on the test set, so it flatters; seconds are a run's training and "
        "evaluation.</p>",
        "<h2>Test accuracy</h2>",
        _figure("accuracy", _curves(runs, "accuracy"), rows, ""),
        "<h2>Training loss</h2>",
        _figure(
            "loss",
            _curves(runs, "loss"),
            rows,
            "Each method's own weighted sum: compare the seeds of one method, not the methods. ",
        ),
        "<h2>How it was made</h2>",
        f"<p>{html.escape(made)}. To repeat:</p><pre>{html.escape(commands)}</pre>",
        f"</main><script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def _figure(name: str, plot: go.Figure, rows: Sequence[Row], caption: str) -> str:
    summary = "; ".join(f"{row.label}: last {row.last} %, best {row.best} %" for row in rows)
    text = f"Curves of {plot.layout.yaxis.title.text} over {plot.layout.xaxis.title.text}s. {summary}."
    body = plot.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displayModeBar": False, "responsive": True},
    )
    return (
        f'<figure role="group" aria-label="{html.escape(text)}">{body}'
        f"<figcaption>{caption}Line: mean over seeds; band: lowest to highest seed. A click on a name hides "
        "it.</figcaption></figure>"
    )


def _curves(runs: list[Run], kind: Literal["accuracy", "loss"]) -> go.Figure:
    """Mean and range over seeds: test accuracy over epochs, or training loss over steps."""

    def points(run: Run) -> list[tuple[int, float]]:
        if kind == "accuracy":
            return [(line["epoch"], line["top1"]) for line in run.evals]
        return [(line["step"], line["loss"]) for line in run.windows]

    plot = go.Figure()
    for i, (label, members) in enumerate(group(runs).items()):
        colour = COLOURS[i % len(COLOURS)]
        values: dict[int, list[float]] = {}
        for run in members:
            for at, value in points(run):
                values.setdefault(at, []).append(value)
        x = sorted(values)
        shared = {"x": x, "legendgroup": label, "line": {"color": colour}, "name": label}
        if len(members) > 1:
            low, high = ([f(values[at]) for at in x] for f in (min, max))
            edge = shared | {"line": {"width": 0, "color": colour}, "showlegend": False, "hoverinfo": "skip"}
            plot.add_scatter(**edge, y=low, mode="lines")
            plot.add_scatter(**edge, y=high, mode="lines", fill="tonexty", opacity=0.3)
        mode = "lines+markers" if len(x) < 3 else "lines"
        plot.add_scatter(**shared, y=[statistics.fmean(values[at]) for at in x], mode=mode)
    plot.update_layout(
        xaxis_title="epoch" if kind == "accuracy" else "step",
        yaxis_title="test top-1, %" if kind == "accuracy" else "training loss, all terms",
        hovermode="x unified",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02},
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        height=420,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return plot
