// Rows: a button of a legend shows and hides its row in all charts; at most MOST are drawn at a time.
const MOST = 8, $$ = (query, within = document) => [...within.querySelectorAll(query)];
const order = $$('.legend')[0] ? $$('button[aria-pressed=true]', $$('.legend')[0]).map(b => b.dataset.row) : [];
function show(row, on) {
  const at = order.indexOf(row);
  if (at >= 0) order.splice(at, 1);
  if (on) order.push(row);
  for (const button of $$('.legend button'))
    if (button.dataset.row === row) button.setAttribute('aria-pressed', on);
  const legend = new Set($$('.legend button').map(b => b.dataset.row));
  for (const group of $$('svg.plot g.row'))
    if (group.dataset.row === row && legend.has(row) && !group.closest('.first')) group.classList.toggle('off', !on);
  if (order.length > MOST) show(order[0], false);
}
for (const button of $$('.legend button'))
  button.addEventListener('click', () => show(button.dataset.row, button.getAttribute('aria-pressed') !== 'true'));

// Tables: a heading sorts by its column, empty cells last.
for (const button of $$('th[aria-sort] button'))
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

// Saving: a chart as it is drawn now, with its colors, or the numbers behind it.
function save(name, data, kind) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([data], {type: kind}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function svgText(svg) {
  const copy = svg.cloneNode(true), css = getComputedStyle(document.documentElement);
  const [w, h] = svg.getAttribute('viewBox').split(' ').slice(2);
  $$('.off', copy).forEach(part => part.remove());
  // Line charts take the legend along: the buttons of the drawn rows, one below the other.
  const drawn = svg.querySelector('[data-x]') ? $$('g.row:not(.off)', svg).map(g => g.dataset.row) : [];
  const buttons = $$('.legend button').filter((b, i, all) => drawn.includes(b.dataset.row)
    && all.findIndex(c => c.dataset.row === b.dataset.row) === i);
  buttons.forEach((button, i) => copy.insertAdjacentHTML('beforeend', `<g transform="translate(14 ${+h + 4 + 20 * i})">`
    + `${button.querySelector('svg').innerHTML}<text x="38" y="10">${button.innerHTML.split('</svg>')[1]}</text></g>`));
  const full = +h + (buttons.length ? 12 + 20 * buttons.length : 0);
  copy.removeAttribute('style'); copy.setAttribute('width', w); copy.setAttribute('height', full);
  copy.setAttribute('viewBox', `0 0 ${w} ${full}`);
  const style = document.createElementNS(svg.namespaceURI, 'style');
  const values = ['--ink', '--paper', '--faint', '--line', '--cells'].map(name => `${name}:${css.getPropertyValue(name).trim()}`);
  style.textContent = `:root{${values.join(';')}}svg.plot{background:var(--paper)}`
    + document.getElementById('chart-style').textContent;
  copy.prepend(style);
  return new XMLSerializer().serializeToString(copy);
}
function csvOf(chart) {
  const data = chart.querySelector('.data');
  if (data) return data.textContent;
  const plain = text => /^[=+@-]/.test(text) && isNaN(text.replaceAll(',', '')) ? `'${text}` : text;
  const quote = text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  // A mean and its standard deviation are columns of their own.
  const rows = $$('tr', chart).map(row => [...row.cells].map(cell => cell.textContent.trim().replace(/−/g, '-')));
  const split = rows[0].map((_, i) => rows.some(row => row[i].includes(' ± ')));
  const cells = (text, i, n) => !split[i] ? [text] : n ? [text.split(' ± ')[0], text.split(' ± ')[1] ?? ''] : [text, `${text} std`];
  return rows.map((row, n) => row.flatMap((text, i) => cells(text, i, n)).map(plain).map(quote).join(',') + '\n').join('');
}
for (const button of $$('.save button'))
  button.addEventListener('click', async () => {
    const chart = button.closest('.chart'), kind = button.dataset.save, name = `${chart.id}.${kind}`;
    if (kind === 'csv') return save(name, csvOf(chart), 'text/csv');
    const svg = $$('svg.plot', chart).find(svg => svg.getBoundingClientRect().width > 0), text = svgText(svg);
    if (kind === 'svg') return save(name, text, 'image/svg+xml');
    const image = new Image(), canvas = document.createElement('canvas');
    image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(text);
    await image.decode();
    [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
    canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(blob => save(name, blob, 'image/png'));
  });

// Curves: the values of the drawn rows at the pointer.
for (const svg of $$('svg.plot')) {
  const frame = svg.querySelector('[data-x]');
  if (!frame) continue;
  const chart = svg.closest('.chart'), tip = chart.querySelector('.tip') ?? document.createElement('div');
  const table = chart.querySelector('.data').textContent.trim().split('\n').map(line => line.match(/("([^"]|"")*"|[^,]*)(,|$)/g)
    .map(cell => cell.replace(/,$/, '').replace(/^"|"$/g, '').replaceAll('""', '"')));
  tip.className = 'tip'; tip.hidden = true; chart.append(tip);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const [left, right, low, high] = frame.dataset.x.split(' ').map(Number);
    const at = low + ((event.clientX - box.left) / scale - left) / (right - left) * (high - low);
    const nearest = lines => lines.reduce((a, b) => Math.abs(a[0] - at) <= Math.abs(b[0] - at) ? a : b);
    const rows = new Set($$('g.row:not(.off)', svg).map(g => g.dataset.row)), [head, ...lines] = table;
    // Rows may have values at different steps.
    const values = head.map((name, i) => rows.has(name) ? [nearest(lines.filter(line => line[i]))[i], name] : null);
    const texts = values.filter(pair => pair).sort((a, b) => b[0] - a[0]).map(pair => pair.join('  '));
    tip.textContent = [`${head[0]} ${nearest(lines)[0]}`, ...texts].join('\n');
    tip.hidden = false;
    const x = event.clientX - box.left, room = box.width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(x + 14, room))}px`;
    tip.style.top = `${svg.offsetTop + event.clientY - box.top + 16}px`;
  });
  svg.addEventListener('pointerleave', () => { tip.hidden = true; });
}
