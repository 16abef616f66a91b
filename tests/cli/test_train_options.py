"""The options of `mdistiller train`: every field, what overrides what, `--help`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mdistiller.cli.train import TrainCommand
from mdistiller.config import TeacherConfig
from mdistiller.errors import ConfigError
from mdistiller.recipes import get_recipe
from mdistiller.tasks.classification.config import ClassificationConfig

RECIPE = "cifar100.dkd.resnet56_resnet20"
# The first are set by the recipe's name and by --plugin; a student's images are the data's.
HIDDEN = {"task", "recipe", "plugins", "teacher_weight"}
HIDDEN |= {f"student.{name}" for name in ("mean", "std", "image_size", "images")}


def leaves(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name."""
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found |= leaves(value, f"{prefix}{name}.")
        elif prefix + name not in HIDDEN:
            found[prefix + name] = value
    return found


# Every field: what is typed, and what it becomes; each unlike the recipe's value.
OVERRIDES = {
    "data.kind": (["--data.kind", "tiny-imagenet"], "tiny-imagenet"),
    "data.root": (["--data.root", "some/where"], Path("some/where")),
    "data.val_fraction": (["--data.val-fraction", "0.2"], 0.2),
    "data.eval_split": (["--data.eval-split", "test"], "test"),
    "data.download": (["--data.no-download"], False),
    "data.image_size": (["--data.image-size", "48"], 48),
    "data.resize": (["--data.resize", "64"], 64),
    "data.mean": (["--data.mean", "0.5", "0.4", "0.3"], (0.5, 0.4, 0.3)),
    "data.std": (["--data.std", "0.5", "0.25", "1"], (0.5, 0.25, 1.0)),
    "data.train_limit": (["--data.train-limit", "100"], 100),
    "data.test_limit": (["--data.test-limit=50"], 50),
    "data.label_noise": (["--data.label-noise", "0.25"], 0.25),
    "data.seed": (["--data.seed", "4"], 4),
    "data.memory": (["--data.memory", "stream"], "stream"),
    "data.memory_limit_gb": (["--data.memory-limit-gb", "1"], 1.0),
    "data.workers": (["--data.workers", "0"], 0),
    "data.on_error": (["--data.on-error", "skip"], "skip"),
    "data.synthetic_classes": (["--data.synthetic-classes", "7"], 7),
    "data.synthetic_samples": (["--data.synthetic-samples", "70"], 70),
    "augment.flip": (["--augment.no-flip"], False),
    "augment.padding": (["--augment.padding", "None"], None),
    "augment.crop": (["--augment.crop", "resized"], "resized"),
    "augment.policy": (["--augment.policy", "autoaugment"], "autoaugment"),
    "augment.strong_policy": (["--augment.strong-policy", "trivialaugment"], "trivialaugment"),
    "augment.mixup_alpha": (["--augment.mixup-alpha", "0.2"], 0.2),
    "augment.cutmix_alpha": (["--augment.cutmix-alpha", "1"], 1.0),
    "student.name": (["--student.name", "timm/resnet18"], "timm/resnet18"),
    "student.checkpoint": (["--student.checkpoint", "s.pt"], Path("s.pt")),
    "student.options": (
        ["--student.options", "width", "3", "rate", "0.5", "flag", "True", "act", "gelu"],
        {"width": 3, "rate": 0.5, "flag": True, "act": "gelu"},
    ),
    "teacher.name": (["--teacher.name", "wrn_40_2"], "wrn_40_2"),
    "teacher.checkpoint": (["--teacher.checkpoint", "a b/t.pt"], Path("a b/t.pt")),
    "teacher.options": (["--teacher.options", "weights", "DEFAULT"], {"weights": "DEFAULT"}),
    "more_teachers": (
        ["--more-teachers", "vgg13=a.pt", "timm/resnet18=b=c.pt"],
        (
            TeacherConfig(name="vgg13", checkpoint=Path("a.pt")),
            TeacherConfig(name="timm/resnet18", checkpoint=Path("b=c.pt")),
        ),
    ),
    "ensemble": (["--ensemble", "losses"], "losses"),
    "teacher_dropout": (["--teacher-dropout", "0.25"], 0.25),
    "method.task_weight": (["--method.task-weight", "0.5"], 0.5),
    "label_smoothing": (["--label-smoothing", "0.1"], 0.1),
    "method.alpha": (["--method.alpha", "0"], 0.0),
    "method.beta": (["--method.beta", "3.5"], 3.5),
    "method.temperature": (["--method.temperature", "2"], 2.0),
    "method.warmup": (["--method.warmup", "0"], 0.0),
    "method.nckd_samples": (["--method.nckd-samples", "unsure"], "unsure"),
    "optim.name": (["--optim.name", "adamw"], "adamw"),
    "optim.lr": (["--optim.lr", "1e-3"], 0.001),
    "optim.momentum": (["--optim.momentum", "0.8"], 0.8),
    "optim.nesterov": (["--optim.nesterov"], True),
    "optim.weight_decay": (["--optim.weight_decay", "0"], 0.0),  # an underscore will do as well
    "optim.schedule": (["--optim.schedule", "cosine"], "cosine"),
    "optim.milestones": (["--optim.milestones", "0.3", "0.6"], (0.3, 0.6)),
    "optim.gamma": (["--optim.gamma", "0.2"], 0.2),
    "optim.lr_warmup": (["--optim.lr-warmup", "0.05"], 0.05),
    "optim.lr_warmup_steps": (["--optim.lr-warmup-steps", "100"], 100),
    "optim.clip_norm": (["--optim.clip-norm", "5"], 5.0),
    "optim.delta": (["--optim.delta", "0.05"], 0.05),
    "optim.accumulate": (["--optim.accumulate", "2"], 2),
    "teacher_batch": (["--teacher-batch", "512"], 512),
    "teacher_cache": (["--teacher-cache", "cache"], Path("cache")),
    "teacher_cache_format": (["--teacher-cache-format", "fp16"], "fp16"),
    "teacher_cache_taps": (["--teacher-cache-taps", "pooled"], ("pooled",)),
    "teacher_views": (["--teacher-views", "4"], 4),
    "epochs": (["--epochs", "3"], 3),
    "max_steps": (["--max-steps", "9"], 9),
    "batch_size": (["--batch-size", "128"], 128),
    "eval_batch_size": (["--eval-batch-size", "100"], 100),
    "eval_every": (["--eval-every", "5"], 5),
    "save_minutes": (["--save-minutes", "2"], 2.0),
    "drop_last": (["--drop-last"], True),
    "ema": (["--ema", "0.999"], 0.999),
    "save_best": (["--save-best"], True),
    "save_epochs": (["--save-epochs", "1", "2"], (1, 2)),
    "precision": (["--precision", "bfloat16"], "bfloat16"),
    "layout": (["--layout", "contiguous"], "contiguous"),
    "deterministic": (["--deterministic"], True),
    "compile": (["--compile", "reduce-overhead"], "reduce-overhead"),
    "device": (["--device", "cpu"], "cpu"),
    "seed": (["--seed", "12"], 12),
    "log_every": (["--log-every", "10"], 10),
    "diagnostics": (["--no-diagnostics"], False),
    "log": (["--log", "tensorboard", "--log", "wandb"], ("tensorboard", "wandb")),
    "out": (["--out", "runs/x"], Path("runs/x")),
    "optim.betas": (["--optim.betas", "0.8", "0.95"], (0.8, 0.95)),
    "optim.min_lr": (["--optim.min-lr", "0.01"], 0.01),
    "optim.layer_decay": (["--optim.layer-decay", "0.75"], 0.75),
    "optim.head_lr": (["--optim.head-lr", "10"], 10.0),
    "optim.probe_lr": (["--optim.probe-lr", "0.002"], 0.002),
    "optim.norm_decay": (["--optim.no-norm-decay"], False),
    "probe_epochs": (["--probe-epochs", "2"], 2),
    "freeze": (["--freeze", "stem,stage1", "layer2.0"], ("stem", "stage1", "layer2.0")),
    "norm_eval": (["--norm-eval"], True),
    "patience": (["--patience", "4"], 4),
    "progress": (["--progress", "ceil"], "ceil"),
    "gradient_checkpointing": (["--gradient-checkpointing"], True),
    "ema_warmup": (["--ema-warmup"], True),
    "augment.scale": (["--augment.scale", "0.5", "0.9"], (0.5, 0.9)),
    "augment.color_jitter": (["--augment.color-jitter", "0.4"], 0.4),
    "augment.rotation": (["--augment.rotation", "20"], 20.0),
    "augment.erase": (["--augment.erase", "0.25"], 0.25),
    "augment.vertical_flip": (["--augment.vertical-flip"], True),
    "class_weights": (["--class-weights", "balanced"], "balanced"),
    "data.unlabeled": (["--data.unlabeled", "more"], Path("more")),
    "data.image_column": (["--data.image-column", "img"], "img"),
    "data.label_column": (["--data.label-column", "fine"], "fine"),
    "data.multi_label": (["--data.multi-label"], True),
    "augment.seed": (["--augment.seed", "3"], 3),
    "teacher.mean": (["--teacher.mean", "0.5", "0.4", "0.3"], (0.5, 0.4, 0.3)),
    "teacher.std": (["--teacher.std", "0.2", "0.3", "0.4"], (0.2, 0.3, 0.4)),
    "teacher.image_size": (["--teacher.image-size", "96"], 96),
    "optim.deltas": (["--optim.deltas", "0.05", "-0.05", "0.02"], (0.05, -0.05, 0.02)),
}


def test_the_table_has_every_field():
    assert set(OVERRIDES) == set(leaves(get_recipe(RECIPE)))


@pytest.mark.parametrize("field", OVERRIDES)
def test_a_flag_sets_its_field_and_no_other(field):
    words, expected = OVERRIDES[field]
    before = leaves(get_recipe(RECIPE))
    after = leaves(TrainCommand.parse([RECIPE, *words]).config)
    assert after[field] == expected != before[field]
    assert type(after[field]) is type(expected) or isinstance(expected, Path)
    assert {k: v for k, v in after.items() if k != field} == {k: v for k, v in before.items() if k != field}


def test_all_flags_at_once_and_through_json(tmp_path):
    config = TrainCommand.parse([RECIPE, *(word for words, _ in OVERRIDES.values() for word in words)]).config
    assert leaves(config) == {field: value for field, (_, value) in OVERRIDES.items()}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert TrainCommand.parse([str(path)]).config == config.model_copy(update={"out": None})


def test_no_flags_give_the_recipe():
    parsed = TrainCommand.parse([RECIPE])
    assert parsed.config == get_recipe(RECIPE)
    assert (parsed.resume, parsed.as_json, parsed.plugin) == (False, False, ())


# What overrides what: field's default < recipe (with --method's method) or config.json < flags


def test_precedence_of_recipe_method_and_flags():
    def method(*argv: str) -> dict[str, Any]:
        return TrainCommand.parse([RECIPE, *argv]).config.method.model_dump()

    assert method()["beta"] == 2  # the pair's, where DKD's default is 8
    assert method("--method", "dkd")["beta"] == 2
    assert (
        TrainCommand.parse([RECIPE.replace("dkd", "kd"), "--method", "dkd"]).config
        == TrainCommand.parse([RECIPE]).config
    )
    assert method("--method.beta", "5")["beta"] == 5
    kd = {"name": "kd", "task_weight": 0.1, "weight": 0.9, "temperature": 4.0}
    assert method("--method", "kd") == method("--method=kd") == kd
    changed = kd | {"weight": 3.0}
    assert method("--method", "kd", "--method.weight", "3") == changed
    assert method("--method.weight", "3", "--method", "kd") == changed


def test_method_leaves_the_other_fields():
    before, after = get_recipe(RECIPE), TrainCommand.parse([RECIPE, "--method", "kd"]).config
    same = {"method": before.method, "recipe": ""}
    assert after.model_copy(update=same) == before.model_copy(update=same)


def test_precedence_of_config_json(tmp_path):
    path = tmp_path / "config.json"
    stored = TrainCommand.parse([RECIPE, "--method.beta", "5", "--epochs", "3", "--out", "somewhere"]).config
    path.write_text(json.dumps(stored.model_dump(mode="json")))
    config = TrainCommand.parse([str(path), "--epochs", "4"]).config
    assert (config.method.model_dump()["beta"], config.epochs, config.seed) == (5, 4, 0)
    assert config.recipe == RECIPE
    # A folder of its own, unless it goes on or is told.
    assert config.out is None
    assert TrainCommand.parse([str(path), "--out", "other"]).config.out == Path("other")
    assert (
        TrainCommand.parse([str(path), "--resume"]).config.out == tmp_path
    )  # where the file lies, moved or not
    assert TrainCommand.parse([str(path), "--method", "kd"]).config.method.method_name == "kd"
    assert (
        TrainCommand.parse([str(path), "--method", "dkd"]).config.method.model_dump()["beta"] == 2
    )  # the pair's


def test_a_config_json_may_name_the_differences_alone(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"student": {"name": "resnet8"}, "optim": {"lr": 0.1}}')
    config = TrainCommand.parse([str(path)]).config
    assert config == ClassificationConfig.model_validate(
        {"student": {"name": "resnet8"}, "optim": {"lr": 0.1}}
    )
    assert (config.optim.lr, config.optim.momentum, config.method.method_name) == (0.1, 0.9, "none")


# Help


def test_help_of_train_says_how(cli):
    for flag in ("--help", "-h"):
        done = cli("train", flag)
        assert (done.code, done.err) == (0, "")
        for text in ("RECIPE", "cifar100", "digits", "folder", "config.json", "--help", "torchrun"):
            assert text in done.out


def shown(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value == {} else str(value)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [(RECIPE, ()), (RECIPE, ("--method", "kd")), ("digits.student.resnet8", ()), ("folder.teacher.vgg8", ())],
)
def test_help_has_every_field_with_the_recipes_default(cli, recipe, flags):
    done = cli("train", recipe, *flags, "--help-all")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    fields = leaves(TrainCommand.parse([recipe, *flags]).config)
    for name, value in fields.items():
        if name == "teacher":  # None: a model alone
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            group, _, last = flag.removeprefix("--").rpartition(".")
            flag = f"{flag}, --{group}{'.' if group else ''}no-{last}"
        assert f" {flag} " in text, name
        rest = text.split(f" {flag} ", 1)[1]
        end = "(default: "
        if name == "log":  # an option that may be given again shows no default
            end = "(repeatable)"
        else:
            assert rest.split(end, 1)[1].startswith(f"{shown(value)})"), (name, value)
        help_text = rest.split(end, 1)[0]
        assert len(help_text.split()) >= 3, f"{name} is not explained: {help_text}"
    assert not [name for name in HIDDEN if f" --{name} " in text]
    for flag in ("--method TEXT|None", "--plugin PATH", "--resume", "--json"):
        assert flag in text


def test_help_shows_a_config_jsons_values(cli, student_run):
    done = cli("train", student_run / "config.json", "--help")
    assert done.code == 0
    assert "Passes over the training set [2]" in done.out.split("--epochs INT")[1][:200]


@pytest.mark.parametrize(
    "command", ["bench", "eval", "export", "list", "predict", "report", "reproduce", "quickstart"]
)
def test_help_of_the_other_commands(cli, command):
    done = cli(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"usage: mdistiller {command}" in done.out
    assert "--json" in done.out


def test_help_of_all(cli):
    done = cli("--help")
    assert (done.code, done.err) == (0, "")
    for command in (
        "quickstart",
        "train",
        "eval",
        "list",
        "report",
        "reproduce",
        "bench",
        "export",
        "predict",
    ):
        assert f"\n  {command} " in done.out
    assert cli("--version").out.strip().count(".") >= 2


def test_beta_is_a_number_or_a_rule():
    assert TrainCommand.parse([RECIPE, "--method.beta", "auto"]).config.method.beta == "auto"
    assert TrainCommand.parse([RECIPE, "--method.beta", "auto-sample"]).config.method.beta == "auto-sample"
    with pytest.raises(ConfigError, match=r"--method\.beta: got 'tuned'"):
        TrainCommand.parse([RECIPE, "--method.beta", "tuned"])


# Settings of fine-tuning where the student has pretrained weights

FOLDER = "folder.teacher.resnet20"
PAIR = "folder.kd.resnet56_resnet20"


@pytest.mark.parametrize(
    "words",
    [
        ["--student.checkpoint", "w.pt"],
        ["--student.checkpoint=w.pt"],
        ["--student.options", "pretrained", "True"],
        ["--epochs", "9", "--student.options", "drop_rate", "0.1", "weights", "DEFAULT", "--seed", "1"],
    ],
)
def test_pretrained_weights_give_the_settings_of_fine_tuning(words, capsys):
    tuned = get_recipe("folder.finetune.resnet20")
    config = TrainCommand.parse([FOLDER, *words]).config
    assert (config.recipe, config.optim, config.probe_epochs) == (
        tuned.recipe,
        tuned.optim,
        tuned.probe_epochs,
    )
    told = capsys.readouterr().err
    assert "folder.finetune.resnet20; for those of folder.teacher.resnet20, add --from-scratch" in told
    scratch = TrainCommand.parse([FOLDER, *words, "--from-scratch"]).config
    assert (scratch.recipe, scratch.optim) == (FOLDER, get_recipe(FOLDER).optim)
    assert not capsys.readouterr().err
    pair = TrainCommand.parse([PAIR, *words]).config
    assert (pair.recipe, pair.optim, pair.augment) == (PAIR, tuned.optim, tuned.augment)
    assert pair.method == get_recipe(PAIR).method


def test_flags_precede_the_settings_of_fine_tuning():
    config = TrainCommand.parse(
        [FOLDER, "--student.checkpoint", "w.pt", "--optim.lr", "0.5", "--epochs", "40"]
    ).config
    assert (config.optim.lr, config.epochs, config.optim.name) == (0.5, 40, "adamw")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--teacher.checkpoint", "w.pt"],
        ["--student.options", "pretrained", "False"],
        ["--student.options", "width", "3"],
    ],
)
def test_other_students_keep_the_recipe(words, capsys):
    config = TrainCommand.parse([PAIR, *words]).config
    assert config.optim == get_recipe(PAIR).optim
    assert not capsys.readouterr().err


def test_other_families_and_earlier_runs_keep_their_settings(tmp_path, capsys):
    config = TrainCommand.parse([RECIPE, "--student.checkpoint", "w.pt"]).config
    assert config.optim == get_recipe(RECIPE).optim
    path = tmp_path / "config.json"
    path.write_text(json.dumps(get_recipe(FOLDER).model_dump(mode="json")))
    assert (
        TrainCommand.parse([str(path), "--student.checkpoint", "w.pt"]).config.optim
        == get_recipe(FOLDER).optim
    )
    assert not capsys.readouterr().err
