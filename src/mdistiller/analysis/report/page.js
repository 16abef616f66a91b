// Gives plots the page's colours, now and when the colour scheme changes; hides and shows a row in all plots on a
// click in a legend; sorts a table by a column, empty cells last; and resizes plots when the part that holds
// them unfolds, because they have no width before.
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
