"""Flags of a script, from the fields of its settings."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from mdistiller.cli.options import parse_command
from mdistiller.errors import ConfigError

Command = TypeVar("Command", bound=BaseModel)


def read(kind: type[Command], args: Sequence[str] | None = None) -> Command:
    """Returns settings with the values of the process's arguments; ends it for a wrong one."""
    prog = Path(sys.argv[0]).name
    try:
        return parse_command(kind, sys.argv[1:] if args is None else args, prog)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
