"""Options of a model on the command line."""

from mdistiller.cli.options import parse_command
from mdistiller.models import ModelConfig
from mdistiller.settings import Settings


class Command(Settings):
    model: ModelConfig


def test_options_are_numbers_truth_values_or_text():
    given = ["timm/resnet18", "--model.options", "img_size", "32", "drop_rate", "0.1", "pretrained", "True"]
    command = parse_command(Command, ["--model.name", *given], "test")
    assert command.model.options == {"img_size": 32, "drop_rate": 0.1, "pretrained": True}
    given = ["timm/resnet18", "--model.options", "a", "007", "b", "0x10", "c", "1if", "d", "1e3", "e", "None"]
    command = parse_command(Command, ["--model.name", *given], "test")
    assert command.model.options == {"a": 7, "b": "0x10", "c": "1if", "d": 1000.0, "e": "None"}


def test_options_that_no_flag_can_spell_are_kept():
    base = ModelConfig(name="timm/resnet18", options={"layers": [1, 1, 1, 1]})
    command = parse_command(Command, ["--model.checkpoint", "x.pt"], "test", Command(model=base))
    assert command.model.options == base.options
