"""The files of published runs against numbers vendored from the authors' configs, logs and READMEs.

`official.json` was read from those repositories at the commits that it names: `runs` from configs and logs,
`solvers` from calls of optimizers, `figures` from READMEs, `reproduced` from logs and tables of others.
Weights of a cross-entropy that counts once for each of two views are doubled there.
"""

import json
import math
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import ValidationError

from mdistiller.config import OptimConfig
from mdistiller.methods import MethodConfig, get_method, method_config
from mdistiller.models import list_models
from mdistiller.recipes import get_recipe, list_recipes
from mdistiller.recipes.family import find_family
from mdistiller.recipes.published import (
    PublishedRun,
    Values,
    all_runs,
    default_run,
    find_reproduced,
    find_runs,
    teacher_top1,
)
from mdistiller.training.update import learning_rate

OFFICIAL = json.loads((Path(__file__).parent / "official.json").read_text())
DATA = ("cifar100", "imagenet", "tiny-imagenet", "coco")
SOLVER = (
    *("lr", "epochs", "drops", "batch_size", "weight_decay", "warmup", "optimizer", "delta"),
    *("schedule", "lr_warmup", "min_lr"),
)


def plain(value):
    """Lists for tuples, and floats for whole numbers."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def part_of(expected, found) -> bool:
    """Whether `found` has all values of `expected`."""
    if isinstance(expected, dict):
        return all(name in found and part_of(value, found[name]) for name, value in expected.items())
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=1e-9)
    return expected == found


def method_of(run: PublishedRun, first: bool) -> MethodConfig:
    """The method's config of a run: of the recipe, or with the run's fields alone."""
    if first and run.method != "none":
        return get_recipe(f"{run.data}.{run.method}.{run.pair}").method
    return method_config(run.method).replace(**run.fields)


def agrees(fact, run: PublishedRun, first: bool) -> bool:
    solver = all(plain(fact[name]) == plain(getattr(run, name)) for name in SOLVER if name in fact)
    log = "log_best" not in fact or run.log == (fact["log_last"], fact["log_best"])
    top1 = "top1" not in fact or list(run.top1) == fact["top1"]
    method = plain(method_of(run, first).model_dump())
    return solver and log and top1 and part_of(plain(fact["fields"]), method)


# A leftover of a test in the authors' config.
LEFTOVERS = {"GzyAftermath/CAT-KD@4467073:configs/imagenet/CAT-KD/r34_r18.yaml": "batch_size"}


@pytest.mark.parametrize("data", sorted({fact["data"] for fact in OFFICIAL["runs"]}))
def test_settings_are_those_of_the_official_configs(data):
    wrong = []
    for fact in OFFICIAL["runs"]:
        if fact["data"] != data:
            continue
        fact = {k: v for k, v in fact.items() if k != LEFTOVERS.get(fact["source"])}
        runs = find_runs(data, fact["method"], fact["pair"])
        if not any(agrees(fact, run, i == 0) for i, run in enumerate(runs)):
            wrong.append((fact["source"], fact["method"], fact["pair"]))
    assert not wrong


def repository(source):
    return source.partition(":")[0]


@pytest.mark.parametrize("fact", OFFICIAL["solvers"], ids=lambda fact: repository(fact["source"]))
def test_optimizers_are_those_of_the_official_calls(fact):
    """Flags that stand in the call of the optimizer and beside it, and in no config."""
    for data in fact["data"]:
        runs = [
            run
            for run in all_runs(data)
            if run.method in fact["methods"] and repository(run.source) == repository(fact["source"])
        ]
        assert runs
        for run in runs:
            found = run.nesterov, run.clip_norm
            assert found == (fact["nesterov"], fact.get("clip_norm")), (run.source, run.method, run.pair)


def test_deepkd_has_the_deltas_that_ran():
    """In engine/deepkd.py there, the task's buffer moves with the target's momentum."""
    facts = [fact for fact in OFFICIAL["runs"] if fact["method"] == "deepkd"]
    for fact in facts:
        _, target, other = fact["config_deltas"]
        (run,) = find_runs(fact["data"], "deepkd", fact["pair"])
        assert run.deltas == (target, target, other)
        config = get_recipe(f"{fact['data']}.deepkd.{fact['pair']}")
        assert (config.optim.name, config.optim.deltas) == ("deepkd", run.deltas)
        if fact["pair"] == "resnet32x4_resnet8x4":
            assert OptimConfig().deltas == config.optim.deltas
            assert method_config("deepkd") == config.method
    assert len(facts) == sum(run.method == "deepkd" for data in DATA for run in all_runs(data)) == 18


def test_deepkds_rate_on_imagenet_is_the_authors_after_the_warmup():
    """`adjust_learning_rate` in engine/utils.py there, with LR 0.2, MIN_LR 5e-5 and WARMUP_EPOCHS 20."""
    optim = get_recipe("imagenet.deepkd.resnet34_resnet18").optim
    for epoch in range(20, 100):
        theirs = 5e-5 + 0.5 * (0.2 - 5e-5) * (1 + math.cos(math.pi * (epoch - 20) / 80))
        assert learning_rate(optim, epoch * 10, 1000) == pytest.approx(theirs)
    assert learning_rate(optim, 100, 1000) == pytest.approx(0.1, rel=0.01)  # theirs: 0.11


def test_the_projector_of_mobilenet_drops_half_of_its_inputs():
    """ImageNet/Models/embtrans.py of the code of KD++ and DKD++."""
    for method in ("nd", "nd-dkd"):
        for pair, dropout in (("resnet50_mobilenetv1", 0.5), ("resnet34_resnet18", 0.0)):
            assert get_recipe(f"imagenet.{method}.{pair}").method.dropout == dropout


def test_figures_are_those_of_the_official_readmes():
    missing = []
    for fact in OFFICIAL["figures"]:
        method, data = fact["method"], fact["data"]
        if method == "teacher":
            found = [teacher_top1(data, fact["pair"])[0]]
        else:
            runs = find_runs(data, "none" if method == "student" else method, fact["pair"])
            found = [x for run in runs if run.optimizer == fact.get("optimizer", "sgd") for x in run.top1]
        if fact["top1"] not in found:
            missing.append((fact, found))
    assert not missing


def test_reproduced_runs_are_those_of_the_logs():
    """In both directions: every run of the file is in the facts, and every fact is in the file."""
    facts = {
        (f["data"], f["method"], f["pair"], f["source"], x)
        for f in OFFICIAL["reproduced"]
        for x in (f["top1"], *f.get("log", ()))
    }
    raw = tomllib.loads((files("mdistiller.recipes.published") / "reproduced.toml").read_text("utf-8"))
    found = {
        (data, group["method"], pair, run.source, x)
        for data, groups in raw.items()
        for group in groups
        for pair in group["pairs"]
        for run in find_reproduced(data, group["method"], pair)
        for x in (*run.top1, *(run.log or ()))
    }
    assert found == facts


@pytest.mark.parametrize("data", DATA)
def test_every_figure_was_verified_or_says_that_it_was_not(data):
    known = {(f["data"], f["method"], f["pair"], f["top1"]) for f in OFFICIAL["figures"]}
    known |= {(f["data"], f["method"], f["pair"], x) for f in OFFICIAL["runs"] for x in f.get("top1", ())}
    for run in all_runs(data):
        method = "student" if run.method == "none" else run.method
        for top1 in run.top1:
            assert ((data, method, run.pair, top1) in known) != run.unverified, (run.method, run.pair)


@pytest.mark.parametrize("data", DATA)
def test_every_run_has_an_origin_and_a_recipe(data):
    listed = set(list_recipes())
    for run in all_runs(data):
        assert "@" in run.source, run
        assert run.figures == "" or "@" in run.figures or run.unverified, run
        assert (run.epochs is None) != (run.steps is None)
        assert list(run.drops) == sorted(run.drops)
        assert bool(run.drops) == (run.schedule == "step")
        assert all(drop < (run.epochs or run.steps) for drop in run.drops)
        if run.method != "none":
            assert f"{data}.{run.method}.{run.pair}" in listed
            assert (run.views == 2) == ("mlkd" in run.method or "crld" in run.method)
            assert bool(run.augment) == (run.views == 2)


@pytest.mark.parametrize("data", ["cifar100", "imagenet", "tiny-imagenet"])
def test_recipes_have_the_optimizer_and_length_of_their_first_run(data):
    seen = set()
    for run in all_runs(data):
        name = f"{data}.{'student' if run.method == 'none' else run.method}.{run.pair}"
        if name in seen:
            continue
        seen.add(name)
        config = get_recipe(name)
        optim = config.optim
        assert (optim.name, optim.lr, optim.momentum) == (run.optimizer, run.lr, run.momentum), name
        assert (optim.nesterov, optim.weight_decay) == (run.nesterov, run.weight_decay), name
        assert (optim.clip_norm, optim.norm_decay) == (run.clip_norm, run.norm_decay), name
        assert (config.epochs, config.batch_size) == (run.epochs, run.batch_size), name
        assert run.augment in ("", config.augment.strong_policy), name
        assert getattr(config.method, "num_views", run.views) == run.views, name
        drops = [milestone * config.epochs for milestone in optim.milestones]
        assert drops == pytest.approx(run.drops), name
        assert (optim.schedule, optim.gamma, optim.min_lr) == (run.schedule, 0.1, run.min_lr / run.lr)
        assert optim.lr_warmup * config.epochs == pytest.approx(run.lr_warmup), name
        warmup = getattr(config.method, "warmup", None)
        if warmup is not None and run.warmup is not None:
            assert warmup * config.epochs == pytest.approx(run.warmup if run.warmup > 1 else 0), name


def method(recipe):
    return get_recipe(recipe).method


def test_mlkd_keeps_its_drops_in_longer_runs():
    for pair, lr, epochs in (
        ("resnet32x4_resnet8x4", 0.025, 240),
        ("vgg13_MobileNetV2", 0.01, 480),
        ("wrn_40_2_ShuffleV1", 0.01, 480),
        ("resnet32x4_ShuffleV2", 0.01, 960),
    ):
        config = get_recipe(f"cifar100.mlkd.{pair}")
        assert (config.optim.lr, config.epochs) == (lr, epochs)
        assert [m * epochs for m in config.optim.milestones] == pytest.approx([150, 180, 210])
    assert get_recipe("imagenet.mlkd.resnet34_resnet18").optim.lr == 0.1
    for pair, lr, epochs, weight in (
        ("vgg13_vgg8", 0.01, 480, 6),
        ("vgg13_MobileNetV2", 0.01, 480, 6),
        ("resnet32x4_ShuffleV2", 0.01, 960, 6),
        ("wrn_40_2_MobileNetV2", 0.005, 480, 9),
        ("resnet32x4_resnet8x4", 0.025, 480, 9),
    ):
        config = get_recipe(f"cifar100.lskd-mlkd.{pair}")
        assert (config.optim.lr, config.epochs, config.method.base.weight) == (lr, epochs, weight)


def test_wrapped_methods_on_imagenet_have_imagenets_task_weight():
    r34, r50 = "resnet34_resnet18", "resnet50_mobilenetv1"
    assert method(f"imagenet.lskd.{r34}").task_weight == 1
    assert method(f"imagenet.lskd-mlkd.{r34}").task_weight == 1  # 0.5 for each of two views
    crld = method(f"imagenet.lskd-crld.{r34}")
    assert (crld.task_weight, crld.base.temperature) == (4, 1)
    ctkd = get_recipe(f"imagenet.ctkd.{r34}")
    assert (ctkd.method.task_weight, ctkd.method.base.weight) == (1, 1)
    assert ctkd.method.curriculum * ctkd.epochs == pytest.approx(5)
    assert (ctkd.epochs, ctkd.optim.lr, ctkd.batch_size) == (120, 0.1, 256)
    sdd = method(f"imagenet.sdd.{r34}")
    assert (sdd.scales, sdd.task_weight, sdd.base.weight, sdd.base.temperature) == ((1, 2), 0.5, 0.5, 1)
    assert method(f"imagenet.sdd.{r50}").scales == (1, 2, 4)
    nkd = method(f"imagenet.sdd-nkd.{r34}")
    assert (nkd.base.gamma, nkd.base.temperature, nkd.task_weight) == (1.5, 1, 1)
    eskd, kd = method(f"imagenet.eskd.{r34}"), method(f"imagenet.kd.{r34}")
    assert (eskd.task_weight, eskd.weight, eskd.temperature) == (kd.task_weight, kd.weight, kd.temperature)
    catkd = [method(f"imagenet.catkd.{pair}") for pair in (r34, r50)]
    assert [(m.weight, m.resolution, m.normalize) for m in catkd] == [(0.5, 4, False), (10, 2, True)]
    # An unknown wrapper of another base has that base's weight, on pairs that nobody published too.
    assert method("imagenet.lskd-gdkd.resnet50_resnet18").base.w0 == 0.5
    assert method("imagenet.lskd-normkd.resnet50_resnet18").task_weight == 0.5


@pytest.mark.parametrize(
    ("pair", "temperature", "weight"),
    [
        ("vgg13_vgg8", 3, 9),
        ("vgg13_MobileNetV2", 3, 9),
        ("ResNet50_MobileNetV2", 3, 1),
        ("resnet56_resnet20", 2, 9),
    ],
)
def test_lskd_around_kd(pair, temperature, weight):
    lskd = method(f"cifar100.lskd.{pair}")
    assert (lskd.base.temperature, lskd.base.weight, lskd.task_weight) == (temperature, weight, 0.1)
    named = method(f"cifar100.lskd-kd.{pair}").model_dump()
    assert named | {"name": "lskd"} == lskd.model_dump()


@pytest.mark.parametrize(
    ("pair", "weight", "temperature"),
    [
        ("resnet56_resnet20", 18, 3),
        ("vgg13_vgg8", 15, 2),
        ("resnet110_resnet32", 15, 2),
        ("ResNet50_MobileNetV2", 15, 2),
        ("wrn_40_2_wrn_16_2", 12, 2),
        ("wrn_40_2_wrn_40_1", 12, 2),
        ("vgg13_MobileNetV2", 9, 3),
    ],
)
def test_lskd_around_dkd(pair, weight, temperature):
    base = method(f"cifar100.lskd-dkd.{pair}").base
    assert (base.alpha, base.beta, base.temperature) == (weight, 2 * weight, temperature)


def test_a_part_of_a_sum_has_the_values_of_its_own_recipe():
    whole = method("cifar100.lskd-dkd+at.resnet56_resnet20").lskd_dkd
    alone = method("cifar100.lskd-dkd.resnet56_resnet20")
    assert (whole.task_weight, whole.base) == (0, alone.base)
    # What a wrapper sets in its base stays.
    base = method("imagenet.lskd-ctkd.resnet34_resnet18").base
    assert (base.curriculum, base.base.weight, base.base.temperature) == (5 / 120, 9, 2)


def test_srrl_alone_does_not_have_the_figure_of_srrl_with_kd():
    pair = "resnet32x4_resnet8x4"
    assert find_runs("cifar100", "srrl", pair) == ()
    whole = method(f"cifar100.srrl+kd.{pair}")
    assert (whole.task_weight, whole.kd.weight, whole.kd.temperature) == (1, 1, 4)


def test_reviewkd_has_two_recipes():
    own, other = find_runs("cifar100", "reviewkd", "resnet32x4_resnet8x4")
    assert (own.batch_size, own.lr, own.nesterov, own.top1) == (128, 0.1, True, (75.63,))
    assert (other.batch_size, other.lr, other.nesterov, other.top1) == (64, 0.05, False, ())
    assert find_runs("cifar100", "reviewkd", "vgg13_vgg8")[0].top1 == (74.85,)
    assert method("imagenet.reviewkd.resnet34_resnet18").warmup == 0  # factor 1 from the first step


def test_the_best_epoch_is_a_third_of_a_point_above_the_last_in_the_logs():
    gaps = [run.log[1] - run.log[0] for run in all_runs("cifar100") if run.log and run.method != "lskd-ctkd"]
    assert len(gaps) == 40
    assert sum(gaps) / 40 == pytest.approx(0.32, abs=0.005)


def test_other_families():
    config = get_recipe("tiny-imagenet.kd.ResNet18_MobileNetV2")
    assert config.data.kind == "tiny-imagenet"
    assert (config.optim.lr, config.batch_size, config.epochs) == (0.2, 256, 200)
    assert [m * 200 for m in config.optim.milestones] == pytest.approx([60, 120, 160])
    assert get_recipe("tiny-imagenet.dkd.resnet56_resnet20").optim == config.optim
    ten = get_recipe("cifar10.dkd.resnet56_resnet20")
    hundred = get_recipe("cifar100.dkd.resnet56_resnet20")
    assert ten.data.kind == "cifar10"
    assert (ten.optim, ten.method, ten.epochs) == (hundred.optim, hundred.method, hundred.epochs)
    assert {name.split(".")[0] for name in list_recipes()} >= {"cifar10", "tiny-imagenet"}


def test_a_pair_that_nobody_published_has_the_defaults():
    assert find_runs("cifar100", "dkd", "resnet56_resnet8") == ()
    assert default_run("cifar100", "mlkd", "resnet56_resnet8").lr == 0.025
    assert default_run("cifar100", "mlkd", "vgg13_ShuffleV1").lr == 0.01
    assert default_run("imagenet", "lskd-crld", "resnet50_resnet18").views == 2
    assert find_family("cifar10").find_runs("kd", "resnet56_resnet20") == ()


def test_the_files_are_read_strictly():
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Values.model_validate({"learning_rate": 0.1})
    with pytest.raises(ValidationError, match="frozen"):
        find_runs("cifar100", "kd", "vgg13_vgg8")[0].lr = 1.0
    for data in DATA:
        text = (files("mdistiller.recipes.published") / f"{data}.toml").read_text(encoding="utf-8")
        for group in tomllib.loads(text)["groups"]:
            get_method(group["method"])
    for run in all_runs("cifar100"):
        assert any(run.pair.endswith(model) for model in list_models())
