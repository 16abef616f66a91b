"""Style sheet, colours and script of the page."""

from __future__ import annotations

from typing import NamedTuple

# Okabe and Ito's colours, which suit any colour vision, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = (("solid", ""), ("dash", "5 3"), ("dot", "2 2"), ("dashdot", "5 2 1 2"))
_SYMBOLS = ("circle", "square", "diamond", "triangle-up")
GAIN, LOSS, TEACHER = "#0072B2", "#D55E00", "#8a8f98"


class Mark(NamedTuple):
    """Appearance of a row: colour, plotly's dash and symbol, and the dash as SVG's stroke-dasharray."""

    colour: str
    dash: str
    symbol: str
    stroke: str


def mark(i: int) -> Mark:
    """Returns the mark of row i: the colours in turn, then again with another dash and symbol."""
    again = i // len(COLOURS) % len(_DASHES)
    dash, stroke = _DASHES[again]
    return Mark(COLOURS[i % len(COLOURS)], dash, _SYMBOLS[again], stroke)


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #5f6772; --line: #d6d9de;
  --link: #0062a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #14171b; --faint: #a3acb6; --line: #363c44; --link: #7cc0f0; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: .5rem 0 0; } a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; list-style: none; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%;
  font-size: .93rem; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } tbody th { font-weight: normal; }
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; }
th button::after { content: "↕"; display: inline-block; width: .8em; margin-left: .1em; font-size: .8em;
  opacity: .55; }
th[aria-sort=ascending] button::after { content: "↑"; opacity: 1; }
th[aria-sort=descending] button::after { content: "↓"; opacity: 1; }
.scroll th:first-child { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 40rem) {
  table { font-size: .9rem; } .legend { max-height: 13rem; overflow-y: auto; }
  .scroll th:first-child { white-space: normal; min-width: 6.5rem; } }
.settings td { white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
p.note, figcaption { color: var(--faint); } figure { margin: 1rem 0; }
pre { background: color-mix(in srgb, var(--ink) 7%, var(--paper)); padding: .7rem; overflow-x: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; margin: .4rem 0; }
.legend button, .legend span { display: inline-flex; align-items: center; gap: .4rem; font: inherit;
  font-size: .9rem; color: inherit; padding: .15rem .6rem; text-align: left; }
.legend button { background: none; border: 1px solid var(--line); border-radius: 1rem; cursor: pointer; }
.legend button[aria-pressed=false] { color: var(--faint); text-decoration: line-through; }
.legend button[aria-pressed=false] svg { opacity: .3; } .legend svg { flex: none; }
.panels { display: grid; gap: .5rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.panels > * { min-width: 0; margin: .5rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
.confusions { padding: 0; list-style: none; } .confusions li { margin: .6rem 0; }
.confusions img { width: 72px; height: 72px; margin: .15rem .3rem .15rem 0; image-rendering: pixelated;
  border: 1px solid var(--line); }
"""

# The script gives plots the page's colours, now and when the colour scheme changes; hides and shows a row in
# all plots on a click in a legend; sorts a table by a column, empty cells last; and resizes plots when the
# part that holds them unfolds, because they have no width before.
SCRIPT = """
const plots = (within = document) => [...within.querySelectorAll('.js-plotly-plot')];
const scheme = matchMedia('(prefers-color-scheme: dark)');
function recolour() {
  const css = getComputedStyle(document.documentElement);
  const [ink, paper, line] = ['--ink', '--paper', '--line'].map(name => css.getPropertyValue(name).trim());
  for (const plot of plots()) {
    const change = {'font.color': ink, 'hoverlabel.bgcolor': paper, 'hoverlabel.bordercolor': line,
      'hoverlabel.font.color': ink};
    for (const axis of Object.keys(plot.layout).filter(key => /^[xy]axis/.test(key)))
      for (const part of ['gridcolor', 'zerolinecolor', 'linecolor']) change[`${axis}.${part}`] = line;
    Plotly.relayout(plot, change);
  }
}
recolour(); scheme.addEventListener('change', recolour);

for (const button of document.querySelectorAll('.legend button'))
  button.addEventListener('click', () => {
    const row = button.dataset.row, on = button.getAttribute('aria-pressed') !== 'true';
    for (const same of document.querySelectorAll('.legend button'))
      if (same.dataset.row === row) same.setAttribute('aria-pressed', on);
    for (const plot of plots()) {
      const found = plot.data.map((trace, i) => trace.legendgroup === row ? i : -1).filter(i => i >= 0);
      if (found.length) Plotly.restyle(plot, {visible: on}, found);
    }
  });

for (const button of document.querySelectorAll('th[aria-sort] button'))
  button.addEventListener('click', () => {
    const head = button.closest('th'), body = head.closest('table').tBodies[0];
    const up = head.getAttribute('aria-sort') !== 'ascending';
    for (const other of head.parentNode.cells) other.setAttribute('aria-sort', 'none');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const key = row => row.cells[head.cellIndex].dataset.value;
    body.append(...[...body.rows].sort((one, other) => {
      const a = key(one), b = key(other);
      if (a === '' || b === '') return (a === '') - (b === '');
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return up ? order : -order;
    }));
  });

for (const details of document.querySelectorAll('details'))
  details.addEventListener('toggle', () => plots(details).forEach(plot => Plotly.Plots.resize(plot)));
"""
