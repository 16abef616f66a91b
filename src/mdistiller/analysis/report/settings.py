"""Where the runs' settings differ, and how to repeat them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape

from mdistiller.analysis.report.markup import Section, counted, paragraph
from mdistiller.analysis.runs import Run, differing


def differences(groups: Mapping[str, Sequence[Run]]) -> list[tuple[str, list[str]]]:
    """Dotted fields whose value is not the same in all rows, and their values by row ("" where not set)."""
    return differing([runs[0].config for runs in groups.values()])


def settings(groups: Mapping[str, Sequence[Run]]) -> list[Section]:
    """The differences as a table."""
    found = differences(groups)
    if not found:
        return []
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("field", *groups))
    body = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th>'
        + "".join(f"<td>{escape(value) or '–'}</td>" for value in values)
        + "</tr>"
        for name, values in found
    )
    return [
        Section(
            "settings",
            "Where the settings differ",
            '<div class="scroll" tabindex="0" role="group" aria-label="Table of settings">'
            f'<table class="settings"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            + paragraph("All other fields of the runs' config.json are equal, but for seed and out.", "note"),
        )
    ]


def making(runs: Sequence[Run], *, seen: bool) -> Section:
    """Hardware, versions, and the command that repeats each run; `seen`: whether models were looked at."""
    env = runs[0].env
    hardware = ", ".join(env["gpus"]) or f"{env['cpu']} ({counted(env['threads'], 'thread')})"
    made = f"{hardware}; torch {env['versions']['torch']}, mdistiller {env['versions']['mdistiller']}"
    if env["commit"]:
        made += f" at {env['commit'][:12]}"
    commands = "\n".join(
        dict.fromkeys(f"{run.kind.command} {shlex.quote(str(run.path / 'config.json'))}" for run in runs)
    )
    body = paragraph(f"{made}. To repeat:") + f'<pre tabindex="0">{escape(commands)}</pre>'
    if not seen:
        more = "boxes on test images" if runs[0].detects else "classes, confusions, features and correlations"
        text = f"The students' {more}: mdistiller report RUN…"
        body += paragraph(text, "note")
    return Section("made", "How it was made", body)
