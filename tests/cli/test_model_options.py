"""Options of a model on the command line."""

from dataclasses import dataclass

from mdistiller.cli.options import parse_command
from mdistiller.models import ModelConfig


@dataclass(frozen=True)
class Command:
    model: ModelConfig


def test_options_are_numbers_truth_values_or_text():
    given = ["timm/resnet18", "--model.options", "img_size", "32", "drop_rate", "0.1", "pretrained", "True"]
    command = parse_command(Command, ["--model.name", *given], prog="test")
    assert command.model.options == {"img_size": 32, "drop_rate": 0.1, "pretrained": True}


def test_options_that_no_flag_can_spell_are_kept():
    base = ModelConfig(name="timm/resnet18", options={"layers": [1, 1, 1, 1]})
    command = parse_command(Command, ["--model.checkpoint", "x.pt"], prog="test", default=Command(base))
    assert command.model.options == base.options
