"""Completion of commands, flags and recipes in bash and zsh: `mdistiller --print-completion SHELL`."""

import importlib
from collections.abc import Sequence

from mdistiller.cli.flags import list_flags
from mdistiller.cli.train import TrainCommand
from mdistiller.errors import UnknownNameError
from mdistiller.recipes import BASELINES, get_recipe, list_recipes

SHELLS = ("bash", "zsh")
_RECIPES = ("cifar100.dkd.resnet32x4_resnet8x4", "small.dkd.fasterrcnn_resnet50_resnet18")
"""Recipes whose flags are completed: a classifier and a detector."""

_SCRIPT = """\
# Completion of mdistiller. bash: eval "$(mdistiller --print-completion bash)" in ~/.bashrc;
# zsh: eval "$(mdistiller --print-completion zsh)" in ~/.zshrc.
_mdistiller() {
  local cur="${COMP_WORDS[COMP_CWORD]}" choices="" family method
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    choices="%(commands)s --help --version"
  elif [ "${cur#-}" != "$cur" ]; then
    case "${COMP_WORDS[1]}" in
%(flags)s
    esac
  elif [ "$COMP_CWORD" -eq 2 ]; then
    case "${COMP_WORDS[1]}" in
      list) choices="methods models recipes" ;;
      train|config|show)
        family="${cur%%%%.*}"
        case "$cur" in
          *.*.*)
            method="${cur#*.}"
            method="${method%%%%.*}"
            case "$family.$method" in
%(models)s
            esac
            choices="$(printf "$family.$method.%%s " $choices)" ;;
          *.*) choices="$(printf "$family.%%s. " %(methods)s)" ;;
          *) choices="%(families)s" ;;
        esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$choices" -- "$cur"))
  if [ "${#COMPREPLY[@]}" -eq 0 ]; then
    COMPREPLY=($(compgen -f -- "$cur"))
  elif [ "${#COMPREPLY[@]}" -eq 1 ] && [ "${COMPREPLY[0]%%.}" != "${COMPREPLY[0]}" ]; then
    compopt -o nospace 2>/dev/null
  fi
}
complete -o filenames -F _mdistiller mdistiller
"""


def completion(shell: str, commands: Sequence[str]) -> str:
    """Returns the script that completes the commands' words in a shell.

    Raises:
        UnknownNameError: another shell than bash or zsh.
    """
    if shell not in SHELLS:
        raise UnknownNameError("shell", shell, SHELLS, "Usage: mdistiller --print-completion bash|zsh")
    recipes = [name.split(".", 2) for name in list_recipes()]
    models: dict[str, dict[str, None]] = {}
    for family, method, name in recipes:  # baselines have one model, and come first
        pattern = f"{family}.{method}" if method in BASELINES else f"{family}.*"
        models.setdefault(pattern, {})[name] = None
    patterns = sorted(models, key=lambda pattern: pattern.endswith("*"))
    script = _SCRIPT % {
        "commands": " ".join(commands),
        "flags": "\n".join(f'      {name}) choices="{" ".join(_flags(name))}" ;;' for name in commands),
        "models": "\n".join(
            f'              {pattern}) choices="{" ".join(models[pattern])}" ;;' for pattern in patterns
        ),
        "methods": " ".join(dict.fromkeys(method for _, method, _ in recipes)),
        "families": " ".join(f"{family}." for family in dict.fromkeys(name[0] for name in recipes)),
    }
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def _flags(name: str) -> list[str]:
    """Lists the flags of a command."""
    runs = [TrainCommand(get_recipe(recipe)) for recipe in _RECIPES]
    module = importlib.import_module(f"mdistiller.cli.{'train' if name == 'config' else name}")
    kinds = [kind for key, kind in vars(module).items() if key.endswith("Command")]
    commands = [command for kind in kinds for command in (runs if kind is TrainCommand else [kind])]
    found = [flag.name for command in commands for flag in list_flags(command) if not flag.positional]
    more = ["--help-all"] if name in ("train", "config") else []
    return list(dict.fromkeys([*found, "--help", *more]))
