"""Sections on the runs' settings: differences between rows, and commands that repeat the runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape

from mdistiller.analysis.report.markup import Section, counted, heads, html_table, paragraph
from mdistiller.analysis.runs import Run, differing
from mdistiller.runs.folder import CONFIG


def settings(groups: Mapping[str, Sequence[Run]]) -> list[Section]:
    """Returns a table of the fields whose values differ between rows."""
    found = differing([runs[0].config for runs in groups.values()])
    if not found:
        return []
    rows = []
    for name, values in found:
        cells = (f"<td>{escape(value) or '–'}</td>" for value in values)
        rows.append([f'<th scope="row"><code>{escape(name)}</code></th>', *cells])
    body = html_table(heads(("field", *groups)), rows, "Table of settings", "settings")
    note = paragraph("All other fields of the runs' config.json are equal, except for seed and out.", "note")
    return [Section("settings", "Different settings", body + note)]


def making(runs: Sequence[Run], *, more: str) -> Section:
    """Returns hardware, versions, the commands that repeat the runs, and the command that adds `more`."""
    env = runs[0].env
    hardware = ", ".join(env["gpus"]) or f"{env['cpu']} ({counted(env['threads'], 'thread')})"
    made = f"{hardware}; torch {env['versions']['torch']}, mdistiller {env['versions']['mdistiller']}"
    if env["commit"]:
        made += f" at {env['commit'][:12]}"
    commands = "\n".join(f"mdistiller train {shlex.quote(str(run.path / CONFIG))}" for run in runs)
    body = paragraph(f"{made}. To repeat:") + f'<pre tabindex="0">{escape(commands)}</pre>'
    if more:
        body += paragraph(f"For {more}: mdistiller report RUN…", "note")
    return Section("made", "Hardware and commands", body)
