"""Completion of commands, flags and recipes in bash and zsh: `mdistiller --print-completion SHELL`."""

from collections.abc import Iterable, Mapping, Sequence

from mdistiller.cli.flags import Flag, list_flags
from mdistiller.cli.options import Command
from mdistiller.cli.train import TrainCommand
from mdistiller.config import RunConfig
from mdistiller.errors import UnknownNameError
from mdistiller.recipes import get_recipe, list_recipes

SHELLS = ("bash", "zsh")
EXAMPLE = "dkd"
"""Method whose flags are completed."""
_SCRIPT = """\
# Completion of mdistiller, to be saved in a file that the shell reads (docs/cli.md).
_mdistiller() {
  local cur="${COMP_WORDS[COMP_CWORD]}" choices=""
  COMPREPLY=()
  case "${COMP_WORDS[COMP_CWORD-1]}" in
%(values)s
  esac
  if [ -n "$choices" ]; then
    :
  elif [ "$COMP_CWORD" -eq 1 ]; then
    choices="%(commands)s --help --version"
  elif [ "${cur#-}" != "$cur" ]; then
    case "${COMP_WORDS[1]}" in
%(flags)s
    esac
  elif [ "$COMP_CWORD" -eq 2 ]; then
    case "${COMP_WORDS[1]}" in
      list) choices="methods models recipes" ;;
      train|config|show) choices="%(recipes)s" ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$choices" -- "$cur"))
  if [ "${#COMPREPLY[@]}" -eq 0 ]; then
    COMPREPLY=($(compgen -f -- "$cur"))
  fi
}
complete -o filenames -F _mdistiller mdistiller
"""


def completion(shell: str, commands: Mapping[str, type[Command]]) -> str:
    """Returns the script that completes the commands' words in a shell.

    Raises:
        UnknownNameError: another shell than bash or zsh.
    """
    if shell not in SHELLS:
        raise UnknownNameError("shell", shell, SHELLS, "Usage: mdistiller --print-completion bash|zsh")
    recipes = list_recipes()
    examples = {name.partition(".")[0]: name for name in recipes if f".{EXAMPLE}." in name}
    configs = list(map(get_recipe, examples.values()))
    script = _SCRIPT % {
        "commands": " ".join(commands),
        "flags": "\n".join(
            f'      {name}) choices="{" ".join(_flags(kind, configs))}" ;;' for name, kind in commands.items()
        ),
        "values": "\n".join(
            f'    {name}) choices="{" ".join(words)}" ;;'
            for name, words in _values(commands.values(), configs).items()
        ),
        "recipes": " ".join(recipes),
    }
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def _flags(kind: type[Command], recipes: Sequence[RunConfig]) -> list[str]:
    """Lists the flags of a command, those of `train` for any of some recipes."""
    found = [flag.name for flag in _known(kind, recipes)]
    return list(dict.fromkeys([*found, "--help", *["--help-all"] * issubclass(kind, TrainCommand)]))


def _known(kind: type[Command], recipes: Sequence[RunConfig]) -> list[Flag]:
    commands: list[Command | type[Command]] = [kind]
    if issubclass(kind, TrainCommand):
        commands = [kind(config=config) for config in recipes]
    return [flag for command in commands for flag in list_flags(command) if not flag.arg.positional]


def _values(kinds: Iterable[type[Command]], recipes: Sequence[RunConfig]) -> dict[str, dict[str, None]]:
    """Returns the values of the flags that take one of some words, those of any command."""
    found: dict[str, dict[str, None]] = {}
    for flag in (flag for kind in kinds for flag in _known(kind, recipes)):
        words = [word for word in flag.metavar.split("|") if word == word.lower()]
        if words and " " not in flag.metavar:
            found.setdefault(flag.name, {}).update(dict.fromkeys(words))
    return found
