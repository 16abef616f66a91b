"""Command `mdistiller config RECIPE`."""

import json
from collections.abc import Sequence

import yaml

from mdistiller.cli.train import parse

USAGE = """\
usage: mdistiller config RECIPE [flags] > FILE.yaml

Print the config of a run as YAML, with every field: a recipe's values, and
those of flags. `mdistiller train FILE.yaml` trains it, and takes flags too.
RECIPE and flags are those of `mdistiller train`, see
`mdistiller train RECIPE --help-all`. With --json the config is JSON, for a
file FILE.json."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller config`."""
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return
    c = parse(args, "mdistiller config")
    values = c.config.model_dump(mode="json")
    if c.json:
        print(json.dumps(values))
        return
    print("# To train it: mdistiller train FILE.yaml")
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100), end="")
