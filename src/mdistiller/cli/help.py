"""Help of a command: flags by group, of `mdistiller train RECIPE` the everyday ones on one screen or all."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Collection, Sequence

from mdistiller.cli.flags import Flag, list_flags
from mdistiller.settings import Settings

_EVERYDAY = (
    *("space", "trials"),
    *("data.root", "teacher", "teacher.checkpoint", "method", "epochs", "batch_size"),
    *("optim.lr", "seed", "seeds", "device", "precision", "teacher_cache", "out", "resume", "dry_run"),
)
"""Fields of the short form."""
_EVERY_COMMAND = ("plugin", "json")

_WIDEST, _COLUMN = 100, 29  # of a line, and of the explanations in the short form
_LONG = 100
HELP_WORDS = ("-h", "--help", "--help-all")


def help_text(
    command: Settings | type[Settings], prog: str, *, every: bool, hidden: Collection[str] = ()
) -> str:
    """Returns the help of a command whose values are the defaults.

    Args:
        command: the command, or its class.
        prog: its name with its positional arguments.
        every: explain all flags; otherwise one line or two for each of the everyday ones.
        hidden: fields of the command whose flags are left out.
    """
    width = max(30, min(_WIDEST, shutil.get_terminal_size().columns))
    known = [flag for flag in list_flags(command) if flag.path[0] not in hidden]
    arguments, flags = ([f for f in known if f.arg.positional is kind] for kind in (True, False))
    shown = flags if every else [flag for flag in flags if is_everyday(flag)]
    usage = " ".join(["usage:", prog, *(argument.name for argument in arguments), "[flags]"])
    lines = textwrap.wrap(usage, width, subsequent_indent="  ", break_on_hyphens=False)
    for paragraph in inspect.cleandoc(command.__doc__ or "").split("\n\n"):
        lines += textwrap.wrap(paragraph, width)
    lines += [line for argument in arguments for line in ["", *_whole(argument, width)]]
    for section, mine in sections(shown).items():
        lines += ["", f"{section}:"]
        for flag in mine:
            lines += _whole(flag, width) if every else _short(flag, width)
    if not every:
        end = f"All {len(flags)} flags: --help-all. The recipe's values and their origin: "
        lines += ["", *textwrap.wrap(f"{end}mdistiller show. A file of them: mdistiller config.", width)]
    return "\n".join(lines)


def is_everyday(flag: Flag) -> bool:
    """Whether the short form has a flag: method weights, temperatures and warmups are in it."""
    return flag.field in _EVERYDAY or (flag.field.startswith("method.") and "FLOAT" in flag.metavar)


def sections(flags: Sequence[Flag]) -> dict[str, list[Flag]]:
    """Returns flags by the group of settings that they belong to: data first, then those of no group."""
    groups = {flag.field.partition(".")[0] for flag in flags if "." in flag.field}
    rest = "run" if groups else "flags"
    found: dict[str, list[Flag]] = {"data": [], rest: []}
    for flag in sorted(flags, key=_place):
        group = flag.field.partition(".")[0]
        found.setdefault(group if group in groups else rest, []).append(flag)
    return {name: mine for name, mine in found.items() if mine}


def _place(flag: Flag) -> int:
    """Returns what sorts flags: everyday ones, others, those of every command, and then those of groups."""
    if "." in flag.field:  # --teacher before --teacher.checkpoint
        return len(_EVERYDAY) + 2
    last = len(_EVERYDAY) + (flag.field in _EVERY_COMMAND)
    return _EVERYDAY.index(flag.field) if flag.field in _EVERYDAY else last


def _whole(flag: Flag, width: int) -> list[str]:
    default = f"(default: {flag.default})" if flag.default else ""
    default = "(repeatable)" if flag.repeats else default
    head = f"  {', '.join(flag.names)} {flag.metavar}".rstrip()
    lines = textwrap.wrap(f"{flag.text} {default}", width - 6, break_on_hyphens=False)
    body = [" " * 6 + line for line in lines]
    heads = textwrap.wrap(
        head.strip(), width, initial_indent="  ", subsequent_indent=" " * 4, break_on_hyphens=False
    )
    return [*heads, *body]


def _short(flag: Flag, width: int) -> list[str]:
    """Returns a line or two: the flag, the first sentence about it, and its value."""
    head = f"  {flag.name} {flag.metavar.removesuffix('|None')}".rstrip()
    default = f"{flag.value:.4g}" if isinstance(flag.value, float) else flag.default
    value = "" if default in ("", "None", "none", "False") else f" [{default}]"
    indent = " " * _COLUMN
    lead = head.ljust(_COLUMN) if len(head) < _COLUMN else indent
    body = textwrap.wrap(
        f"{first_sentence(flag.text)}{value}",
        width,
        initial_indent=lead,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return body if lead != indent else [head, *body]


def first_sentence(text: str) -> str:
    """Returns the first sentence without what is in parentheses, a long one up to its colon."""
    found = re.split(r"[.;] ", re.sub(r" \([^)]*\)", "", text))[0].rstrip(".")
    return found.split(": ")[0] if len(found) > _LONG else found
