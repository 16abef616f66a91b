"""Commands from their arguments: flags from settings, and all wrong settings in one message."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro
from pydantic import BaseModel, TypeAdapter, ValidationError

from mdistiller.cli.flags import Flag, list_flags
from mdistiller.cli.help import help_text
from mdistiller.errors import ConfigError, nearest_names
from mdistiller.methods import MethodConfig, load_plugin
from mdistiller.models import ModelConfig
from mdistiller.settings import explain

Command = TypeVar("Command")

Options = dict[str, bool | int | float | str]
"""Options of a model; the words of its flag are KEY VALUE …"""


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """Flags of most commands."""

    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Python file that registers methods, models, detectors or data sets (it is run). May be given again."""
    json: bool = False
    """Print the result as JSON on stdout."""


def parse_command(
    command: type[Command], args: Sequence[str], *, prog: str, default: Command | None = None
) -> Command:
    """Parses the arguments of a command (a dataclass), and loads its plug-ins.

    Settings get a flag for each field but their `hidden_flags`; those in `default` choose the flags.
    --help prints the help and ends the process.

    Raises:
        ConfigError: an unknown flag or a wrong word, a plug-in fails, a setting is out of range, or settings
            contradict each other.
    """
    start = command if default is None else default
    if "--help" in args or "-h" in args:
        print(help_text(start, prog, every=True))
        raise SystemExit(0)
    flags = list_flags(start)
    given = _read_words(flags, args)
    for path in given.get(("plugin",), ()):
        load_plugin(path)
    found: dict[str, Any] = {}
    kinds: dict[str, type[BaseModel]] = {}
    for flag in flags:
        name, *inner = flag.path
        if not inner:
            empty = () if flag.positional and flag.count is None else flag.value
            found[name] = given.get(flag.path, empty)
            if found[name] is MISSING:
                raise ConfigError(f"{flag.name} is missing ({_allowed(flag)}): {flag.text}")
        elif name not in found:
            value = getattr(start, name, None)
            kinds[name] = type(value) if isinstance(value, BaseModel) else command.__annotations__[name]
            found[name] = _values(value) if isinstance(value, BaseModel) else {}
    for (name, *inner), value in given.items():
        if inner:
            *groups, last = inner
            values = found[name]
            for group in groups:
                values = values[group]
            values[last] = value
    for name, kind in kinds.items():
        try:
            found[name] = kind.model_validate(found[name])
        except ValidationError as error:
            # Settings whose flags have no prefix are the command's own.
            prefix = "--" if name == "config" else f"--{name}."
            raise explain(error, "options", prefix) from error
    return command(**found)


def split_flags(args: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Splits arguments into those before the first flag, and each flag with the words up to the next one."""
    loose: list[str] = []
    found: list[tuple[str, list[str]]] = []
    for word in args:
        if word.startswith("--"):
            name, has_value, value = word.partition("=")
            found.append((name.replace("_", "-"), [value] if has_value else []))
        else:
            (found[-1][1] if found else loose).append(word)
    return loose, found


def words_after(args: Sequence[str], name: str) -> list[list[str]]:
    """Lists the words after each use of a flag."""
    return [words for flag, words in split_flags(args)[1] if flag == name]


def _read_words(flags: Sequence[Flag], args: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """Returns the values that arguments give, by their paths."""
    named = {name: flag for flag in flags if not flag.positional for name in flag.names}
    found: dict[tuple[str, ...], Any] = {}
    loose, uses = split_flags(args)
    for name, words in uses:
        if name not in named:
            near = [f"{n} {named[n].metavar}".rstrip() for n in nearest_names(name, named)]
            hint = f". Perhaps you meant {', '.join(near)}" if near else ""
            raise ConfigError(f"unknown flag {name}{hint}")
        flag = named[name]
        count = 0 if flag.is_switch else 1 if words[:1] == ["None"] else flag.count
        loose += [] if count is None else words[count:]
        value = name == flag.name if flag.is_switch else _read(flag, words[:count])
        found[flag.path] = (*found.get(flag.path, ()), value) if flag.repeats else value
    for flag in flags:
        if flag.positional and loose:
            count = len(loose) if flag.count is None else flag.count
            found[flag.path] = _read(flag, loose[:count])
            loose = loose[count:]
    if loose:
        raise ConfigError(f"got {loose[0]!r}, which belongs to no flag")
    return found


def _read(flag: Flag, words: Sequence[str]) -> Any:
    if flag.count is not None and not words:
        raise ConfigError(f"{flag.name}: got no value. Expected {flag.count}: {flag.metavar}")
    if ModelConfig in get_args(flag.kind):
        return tuple(_read_model(flag.field, word) for word in words)
    try:
        value = flag.read(words)
        return TypeAdapter(flag.one).validate_python(value)
    except ValidationError:
        if isinstance(value, tuple) and len(flag.path) > 1:  # the settings' error has the part
            return value
    except ValueError:
        pass
    raise ConfigError(f"{flag.name}: got {', '.join(map(repr, words))}; allowed: {_allowed(flag)}")


def _read_model(field: str, word: str) -> dict[str, str]:
    name, _, checkpoint = word.partition("=")
    if not name or not checkpoint:
        raise ConfigError(f"{field}: got {word!r}; allowed: NAME=CHECKPOINT")
    return {"name": name, "checkpoint": checkpoint}


def _allowed(flag: Flag) -> str:
    choices = flag.metavar.split("|")
    return ", ".join(map(repr, choices)) if choices[0].islower() else flag.metavar


def _values(settings: BaseModel) -> dict[str, Any]:
    """Returns the values of settings, and those of settings in them, not validated yet."""
    values = {n: _values(v) if isinstance(v, BaseModel) else v for n, v in settings}
    return values | {"name": settings.method_name} if isinstance(settings, MethodConfig) else values
