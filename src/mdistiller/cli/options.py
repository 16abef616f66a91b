"""Base of the commands, which are settings, and their values from the arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, cast, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from mdistiller.cli.flags import Arg, Flag, Repeated, arg_of, list_flags
from mdistiller.cli.help import HELP_WORDS, help_text
from mdistiller.config import TeacherConfig
from mdistiller.errors import ConfigError, nearest_fields, nearest_names
from mdistiller.methods import MethodConfig, load_plugins
from mdistiller.settings import Settings, explain, is_settings, validate
from mdistiller.types import Line

S = TypeVar("S", bound=Settings)


class Command(Settings):
    """A command: each field is a flag, and the class is named after the command."""

    plugin: Repeated[tuple[Path, ...]] = ()
    """Python file that registers methods, models, detectors or data sets (it is run). May be given again."""
    as_json: Annotated[bool, Arg(name="json")] = False
    """Print the result as JSON on stdout."""

    @classmethod
    def prog(cls) -> str:
        """Returns the command as it is typed."""
        return f"mdistiller {cls.__name__.removesuffix('Command').lower()}"

    @classmethod
    def parse(cls, args: Sequence[str]) -> Self:
        """Returns the command with the values from its arguments, and loads its plug-ins.

        Raises:
            ConfigError: as `parse_command`.
        """
        return parse_command(cls, args, cls.prog())

    @classmethod
    def with_own_flags(cls, args: Sequence[str]) -> Self:
        """Returns the command with the flags of its own fields, which choose the others; not validated."""
        own = [flag for flag in list_flags(cls) if len(flag.path) == 1]
        values = _read_words(own, args, strict=False)
        return cast(Self, cls.model_construct(**{name: value for (name,), value in values.items()}))

    def execute(self) -> None:
        """Does the work."""
        raise NotImplementedError


def parse_command(kind: type[S], args: Sequence[str], prog: str, default: S | None = None) -> S:
    """Returns settings with the values from arguments, and loads the plug-ins in them.

    Settings in `default` choose the flags, and its values hold where there is no flag. --help prints the help
    and ends the process.

    Raises:
        ConfigError: an unknown flag or a wrong word, a plug-in fails, a setting is out of range, or settings
            contradict each other.
    """
    start = kind if default is None else default
    if not {*HELP_WORDS}.isdisjoint(args):
        print(help_text(start, prog, every=True))
        raise SystemExit(0)
    flags = list_flags(start)
    given = _read_words(flags, args)
    load_plugins(given.get(("plugin",), ()))
    for flag in flags:
        if flag.is_required and flag.path not in given and len(flag.path) == 1:
            raise ConfigError(f"{flag.name} is missing ({_allowed(flag)}): {flag.text}")
    values = {} if default is None else _values(default)
    for (*groups, last), value in given.items():
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    for name, info in kind.model_fields.items():
        old = getattr(default, name, None)
        part = type(old) if isinstance(old, BaseModel) else info.annotation
        if is_settings(part) and name in values:
            prefix = "--" if arg_of(info).name == "" else f"--{name}."
            values[name] = validate(part, values[name], "options", prefix)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        least = first.get("ctx", {}).get("ge")
        if least is None:
            raise explain(error, "options", "--") from error
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: got {first['input']}; allowed: {least} or more") from error


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


def _read_words(
    flags: Sequence[Flag], args: Sequence[str], *, strict: bool = True
) -> dict[tuple[str, ...], Any]:
    """Returns the values that arguments give, by their paths; unknown ones are left out unless `strict`."""
    named = {name: flag for flag in flags if not flag.arg.positional for name in flag.names}
    found: dict[tuple[str, ...], object] = {}
    loose, uses = split_flags(args)
    for name, words in uses:
        if name not in named and not strict:
            continue
        if name not in named:
            near = nearest_fields(name, [*named, *HELP_WORDS])
            near = [f"{n} {named[n].metavar}".rstrip() if n in named else n for n in near]
            hint = f". Perhaps you meant {', '.join(near)}" if near else ""
            raise ConfigError(f"unknown flag {name}{hint}")
        flag = named[name]
        count = 0 if flag.is_switch else 1 if words[:1] == ["None"] else flag.count
        loose += [] if count is None else words[count:]
        value = name == flag.name if flag.is_switch else _read(flag, words[:count])
        before = found.get(flag.path, ())
        found[flag.path] = (*before, value) if flag.repeats and isinstance(before, tuple) else value
    for flag in flags:
        if flag.arg.positional and loose:
            count = len(loose) if flag.count is None else flag.count
            found[flag.path] = _read(flag, loose[:count])
            loose = loose[count:]
    if loose and strict:
        raise ConfigError(f"got {loose[0]!r}, which belongs to no flag")
    return found


def _read(flag: Flag, words: Sequence[str]) -> object:
    if flag.count is not None and not words:
        raise ConfigError(f"{flag.name}: got no value; allowed: {_allowed(flag)}")
    if TeacherConfig in get_args(flag.kind):
        return tuple(_read_model(flag.field, word) for word in words)
    try:
        value = flag.read(words)
        read: object = TypeAdapter(flag.one).validate_python(value)
        return read
    except ValidationError:
        if isinstance(value, tuple) and len(flag.path) > 1:  # the settings' error has the part
            return value
    except ValueError:
        pass
    near = nearest_names(words[0], flag.metavar.split("|")) if words and "|" in flag.metavar else []
    hint = f". Perhaps you meant {near[0]!r}" if near else ""
    raise ConfigError(f"{flag.name}: got {', '.join(map(repr, words))}; allowed: {_allowed(flag)}{hint}")


def _read_model(field: str, word: str) -> dict[str, str]:
    name, _, checkpoint = word.partition("=")
    if not name or not checkpoint:
        raise ConfigError(f"{field}: got {word!r}; allowed: NAME=CHECKPOINT")
    return {"name": name, "checkpoint": checkpoint}


def _allowed(flag: Flag) -> str:
    choices = flag.metavar.split("|")
    return ", ".join(map(repr, choices)) if choices[0].islower() else flag.metavar


def _values(settings: BaseModel) -> Line:
    """Returns the values of settings, and those of settings in them, not validated yet."""
    values = {n: _values(v) if isinstance(v, BaseModel) else v for n, v in settings}
    return values | {"name": settings.method_name} if isinstance(settings, MethodConfig) else values
