"""Help of `mdistiller train RECIPE`: sections, the short form, and the same flags as the parser's."""

import itertools
import re

import pytest
import yaml

from mdistiller.cli.bench import BenchCommand
from mdistiller.cli.flags import list_flags
from mdistiller.cli.help import first_sentence, sections
from mdistiller.cli.train import TrainCommand
from mdistiller.recipes import get_recipe

RECIPE = "cifar100.dkd.resnet32x4_resnet8x4"
RECIPES = (
    RECIPE,
    "digits.student.resnet8",
    "folder.finetune.resnet8",
    "small.fgfi.fasterrcnn_resnet50_resnet18",
    "cifar100.dkd+reviewkd.resnet32x4_resnet8x4",
    "cifar100.lskd-dkd.resnet32x4_resnet8x4",
    "digits.dkd.resnet8",
    "folder.dkd.timm/resnet18",
    "coco.dkd.fasterrcnn_resnet18",
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_has_every_flag_that_is_parsed(cli, recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = re.findall(r"^  (--[\w.-]+)", cli("train", recipe, "--help-all").out, re.MULTILINE)
    flags = list_flags(TrainCommand(config=get_recipe(recipe, open_teacher=True)))
    assert sorted(flag.name for flag in flags) == sorted(shown)
    assert not [flag.name for flag in flags if len(flag.text.split()) < 3]


@pytest.mark.parametrize("recipe", RECIPES)
def test_short_form_is_one_screen(cli, recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("train", recipe, "--help")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    method = done.out.partition("\nmethod:")[2].partition("\n\n")[0].splitlines()
    assert len(lines) - len(method) <= 36
    assert len(method) <= 24
    assert max(map(len, lines)) <= 80
    for flag in ("--epochs", "--batch-size", "--optim.lr", "--out", "--device", "--help-all"):
        assert flag in done.out
    assert "--optim.betas" not in done.out


@pytest.mark.parametrize("width", [40, 80])
def test_sections_are_the_groups_of_the_config(cli, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    done = cli("train", RECIPE, "--help-all")
    lines = done.out.splitlines()
    headings = [line.rstrip(":") for line in lines if re.fullmatch(r"[a-z ]+:", line)]
    assert headings == ["data", "run", "teacher", "method", "student", "optim", "augment"]
    long = [line for line in lines if len(line) > width]
    assert not [line for line in long if len(line.split()) > 2], long  # words are not broken
    # Paragraphs are filled: a line ends only where the next word would not fit.
    for line, following in itertools.pairwise(lines):
        if line.startswith(" " * 6) and following.startswith(" " * 6):
            assert len(line) + 1 + len(following.split()[0]) > width, line
    found, now = {}, ""
    for line in lines:
        now = line.rstrip(":") if line.rstrip(":") in headings else now
        if line.startswith("  --"):
            found[line.split()[0].rstrip(",")] = now
    assert found["--data.root"] == "data"
    assert found["--teacher"] == found["--teacher.checkpoint"] == "teacher"
    assert found["--method"] == found["--method.beta"] == "method"
    assert found["--optim.lr"] == "optim"
    assert found["--epochs"] == found["--teacher-cache"] == found["--plugin"] == "run"
    assert next(iter(found)).startswith("--data.")


def test_short_form_has_the_numbers_of_the_method(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = " ".join(cli("train", RECIPE, "--help").out.split())
    assert "--method.beta FLOAT|auto|auto-sample Weight of NCKD [8]" in shown
    assert "--method.temperature FLOAT Temperature of both probability distributions [4]" in shown
    assert "grows from zero to its full weight [0.08333]" in shown
    assert "--method.nckd-samples" not in shown


def test_a_command_without_groups_has_one_section():
    assert list(sections(list_flags(BenchCommand))) == ["flags"]


def test_first_sentence():
    assert first_sentence("One (of two. Really); two. Three") == "One"
    assert first_sentence("Weights: a file, or a folder. None: none.") == "Weights: a file, or a folder"
    assert first_sentence("A run" + " folder" * 20 + ": name.") == "A run" + " folder" * 20


def test_a_recipe_without_its_teacher_is_shown_and_asks_for_one(cli):
    done = cli("show", "digits.dkd.resnet8")
    assert (done.code, done.out.splitlines()[0]) == (0, "recipe: digits.dkd.resnet8")
    assert yaml.safe_load(done.out)["default"]["method"]["beta"] == 8
    done = cli("train", "digits.dkd.resnet8")
    assert (done.code, "With --teacher RUN" in done.message) == (2, True)
    assert "nearest: resnet20_resnet8" in done.message
    assert "nearest: TEACHER_resnet8. " in cli("config", "folder.dkd.resnet8").message
    assert "unknown pair" in cli("train", "digits.dkd.resnet7", "--help").message
