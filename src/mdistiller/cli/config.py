"""Command `mdistiller config RECIPE`."""

import json

import yaml

from mdistiller.cli.train import TrainCommand


class ConfigCommand(TrainCommand):
    """Print the config of a run as YAML, with every field: a recipe's values, and those of flags.

    `mdistiller config RECIPE [flags] > FILE.yaml`, and `mdistiller train FILE.yaml` trains it and takes flags
    too. With --json the config is JSON, for a file FILE.json.
    """

    def execute(self) -> None:
        values = self.config.model_dump(mode="json")
        if self.as_json:
            print(json.dumps(values))
            return
        print("# To train it: mdistiller train FILE.yaml")
        print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100), end="")
