"""The command `mdistiller`: dispatch, and errors as one clear message with the right exit code."""

import errno
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn

from mdistiller.errors import ConfigError, Interrupted, MDistillerError, UnknownNameError

if TYPE_CHECKING:
    from mdistiller.cli.options import Command

_COMMANDS = """\
  quickstart           train a teacher, then a student alone, with KD and DKD
  train RECIPE         train or distill a model; a run folder repeats that run
  eval RUN             evaluate a run's student, or MODEL --checkpoint FILE
  list WHAT            list methods, models or recipes
  show RECIPE          show a recipe's settings and published figures
  config RECIPE        print a recipe as a YAML file for `train FILE`
  report RUN…          write an HTML page about runs, or md, latex, csv, json
  reproduce NAME       repeat one of the paper's experiments
  sweep RECIPE         search a recipe's settings with Ray
  compare RUN…         compare accuracy, size and speed of models and exports
  bench PAIR           time a training step of each method
  export RUN           export the student to safetensors, torch-export or ONNX
  predict RUN IMAGE…   predict the classes or boxes of images
  doctor               show versions, devices, optional packages, free disk
"""

USAGE = f"""\
usage: mdistiller COMMAND …

{_COMMANDS}
`mdistiller COMMAND --help` explains a command's flags. `mdistiller
--print-completion bash|zsh` prints a completion script. --json prints the
result to stdout as JSON; progress and messages go to stderr. Exit codes: 0
success, 1 failure while running, 2 bad usage. MDISTILLER_TRACEBACK=1 shows
tracebacks."""


TRACEBACK = "MDISTILLER_TRACEBACK"
"""Environment variable that shows the traceback of an error above its message."""

COMMANDS = sorted(line.split()[0] for line in _COMMANDS.splitlines())
"""Names of the commands, which are modules of this package."""


def find_command(name: str) -> "type[Command]":
    """Returns the class of a command, NAMECommand in the module of its name."""
    module = importlib.import_module(f"mdistiller.cli.{name}")
    found: type[Command] = getattr(module, f"{name.capitalize()}Command")
    return found


def run(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        from mdistiller import __version__

        print(__version__)
        return 0
    try:
        if argv[0] == "--print-completion":
            from mdistiller.cli.completion import completion

            commands = {name: find_command(name) for name in COMMANDS}
            print(completion(argv[1] if len(argv) > 1 else "", commands), end="")
            return 0
        if argv[0] not in COMMANDS:
            raise UnknownNameError("command", argv[0], COMMANDS, "See mdistiller --help")
        try:
            find_command(argv[0]).parse([_fetched(word) for word in argv[1:]]).execute()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            name = str(error.filename)[:60]
            raise ConfigError(f"'{name}' is too long a name for the file system") from error
    except (MDistillerError, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exc()
        message = error.for_command() if isinstance(error, UnknownNameError) else str(error)
        if not isinstance(error, Interrupted):  # its message is there already
            print(f"mdistiller: {message or 'interrupted'}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _fetched(word: str) -> str:
    """Returns a typed word with the downloaded file in place of an hf:// address, also after `=`."""
    if "hf://" not in word:  # the import takes a second
        return word
    from mdistiller.deploy.hub import local_path

    head, equals, address = word.rpartition("=")
    return head + equals + local_path(address)


def _warn_once() -> None:
    """Shows each UserWarning once, as one line on stderr; Python shows the others."""
    usual, shown = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is not UserWarning:
            usual(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"mdistiller: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def main() -> NoReturn:
    """Runs the `mdistiller` script and ends the process."""
    _warn_once()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a character that the encoding lacks is no error
            stream.reconfigure(errors="replace")
    try:
        try:
            code = run(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as in `… | head`. The rest of the buffer must not fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
