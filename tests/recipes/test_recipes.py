"""Recipes against the published settings, and the names that they are found by."""

from __future__ import annotations

import pytest

from mdistiller.cli import quickstart
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import DKDConfig, KDConfig, NoneConfig, get_method, list_methods, method_config
from mdistiller.models import list_models
from mdistiller.recipes import (
    BASELINES,
    get_recipe,
    list_recipes,
    set_method,
)
from mdistiller.recipes.describe import describe_source
from mdistiller.recipes.family import split_pair
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.update import learning_rate

# configs/cifar100/dkd/*.yaml of the reference code base: teacher, student, DKD.BETA, SOLVER.LR.
PUBLISHED = [
    ("resnet110", "resnet32", 2.0, 0.05),
    ("resnet32x4", "resnet8x4", 8.0, 0.05),
    ("resnet32x4", "ShuffleV1", 8.0, 0.01),
    ("resnet32x4", "ShuffleV2", 8.0, 0.01),
    ("ResNet50", "MobileNetV2", 8.0, 0.01),
    ("resnet56", "resnet20", 2.0, 0.05),
    ("vgg13", "MobileNetV2", 6.0, 0.01),
    ("vgg13", "vgg8", 6.0, 0.05),
    ("wrn_40_2", "ShuffleV1", 8.0, 0.01),
    ("wrn_40_2", "wrn_16_2", 6.0, 0.05),
    ("wrn_40_2", "wrn_40_1", 6.0, 0.05),
]
STEPS = 782  # an epoch: 50,000 images in batches of 64, the last one smaller


def assert_published_setting(config: ClassificationConfig, lr: float) -> None:
    """SOLVER and DATASET of every config there."""
    assert config.data.kind == "cifar100"
    assert config.data.train_limit is config.data.test_limit is config.max_steps is None
    assert config.data.label_noise == 0
    assert config.augment.flip
    assert config.augment.padding == 4
    assert config.augment.mixup_alpha == config.augment.cutmix_alpha == 0
    assert (config.epochs, config.batch_size, config.precision) == (240, 64, "float32")
    assert config.ema is None
    optim = config.optim
    assert (optim.name, optim.momentum, optim.nesterov, optim.weight_decay) == ("sgd", 0.9, False, 5e-4)
    assert optim.clip_norm is None
    assert optim.accumulate == 1
    factors = {0: 1, 149: 1, 150: 0.1, 179: 0.1, 180: 0.01, 209: 0.01, 210: 0.001, 239: 0.001}
    for epoch, factor in factors.items():
        for step in (epoch * STEPS, epoch * STEPS + STEPS - 1):
            assert learning_rate(optim, step, 240 * STEPS) == pytest.approx(lr * factor, rel=1e-9), epoch


@pytest.mark.parametrize(
    ("pair", "beta"),
    [("resnet56_resnet8", 2), ("wrn_40_2_resnet20", 6), ("vgg13_resnet8x4", 6), ("wrn_28_2_resnet8", 8)],
)
def test_a_new_student_has_its_teachers_beta(pair, beta):
    assert get_recipe(f"cifar100.dkd.{pair}").method.beta == beta
    assert get_recipe(f"cifar100.dkd+reviewkd.{pair}").method.dkd.beta == beta


@pytest.mark.parametrize(("teacher", "student", "beta", "lr"), PUBLISHED)
def test_published_dkd_pair(teacher, student, beta, lr):
    config = get_recipe(f"cifar100.dkd.{teacher}_{student}")
    assert_published_setting(config, lr)
    assert config.teacher is not None
    assert (config.teacher.name, config.student.name) == (teacher, student)
    assert config.student.checkpoint is config.teacher.checkpoint is None
    method = config.method
    assert isinstance(method, DKDConfig)
    assert (method.task_weight, config.label_smoothing) == (1, 0)
    assert (method.alpha, method.beta, method.temperature) == (1, beta, 4)
    assert method.warmup * config.epochs == pytest.approx(20)


# Further pairs of logit-standardization-KD.
MORE = (
    "resnet110_resnet20",
    "resnet32x4_wrn_16_2",
    "resnet32x4_wrn_40_2",
    "wrn_40_2_resnet8x4",
    "wrn_40_2_MobileNetV2",
)


def test_the_published_pairs_and_no_other_are_listed():
    found = [name for name in list_recipes() if name.startswith("cifar100.dkd.")]
    pairs = [*(f"{t}_{s}" for t, s, _, _ in PUBLISHED), *MORE]
    assert sorted(found) == sorted(f"cifar100.dkd.{pair}" for pair in pairs)
    assert len(list_recipes()) == len(set(list_recipes()))


def test_an_unpublished_pair_has_the_papers_default():
    config = get_recipe("cifar100.dkd.wrn_28_4_resnet8x4")
    assert isinstance(config.method, DKDConfig)
    assert config.method.beta == 8


@pytest.mark.parametrize(("teacher", "student", "lr"), [(t, s, lr) for t, s, _, lr in PUBLISHED])
def test_published_kd_pair(teacher, student, lr):
    config = get_recipe(f"cifar100.kd.{teacher}_{student}")
    assert_published_setting(config, lr)
    method = config.method
    assert isinstance(method, KDConfig)
    assert (method.task_weight, method.weight, method.temperature) == (0.1, 0.9, 4)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("model", "lr"), [("resnet32x4", 0.05), ("vgg8", 0.05), ("MobileNetV2", 0.01), ("ShuffleV2", 0.01)]
)
def test_one_model_alone(role, model, lr):
    config = get_recipe(f"cifar100.{role}.{model}")
    assert_published_setting(config, lr)
    assert config.teacher is None
    assert config.student.name == model
    assert type(config.method) is NoneConfig
    assert config.method.task_weight == 1


def test_every_listed_recipe_resolves():
    names = list_recipes()
    for name in names:
        config = get_recipe(name)
        assert config.recipe == name
        family, method, _ = name.split(".", 2)
        kinds = {
            "imagenet": "folder",
            "multilabel": "folder",
            "embed": "folder",
            "small": "auto",
            "coco": "auto",
        }
        assert config.data.kind == kinds.get(family, family.removesuffix("-seg"))
        assert (config.teacher is None) == (method in BASELINES)
        known = dict.fromkeys(BASELINES, "none")
        assert config.method.method_name == known.get(method, method)
    needing = [m for m in list_methods() if get_method(m).needs.teacher]
    for family in ("cifar100", "digits", "folder", "imagenet"):
        for method in (*needing, "teacher", "student"):
            assert any(name.startswith(f"{family}.{method}.") for name in names), (family, method)


@pytest.mark.parametrize("name", ["digits.dkd.resnet20_resnet8", "folder.kd.vgg8_wrn_16_1"])
def test_a_recipes_config_survives_json(name):
    config = get_recipe(name)
    assert ClassificationConfig.model_validate_json(config.model_dump_json()) == config


def test_digits_are_not_mirrored():
    assert not get_recipe("digits.student.resnet8").augment.flip


@pytest.mark.parametrize(
    ("pair", "teacher", "student"),
    [
        ("wrn_40_2_wrn_16_2", "wrn_40_2", "wrn_16_2"),
        ("wrn_40_2_wrn_40_1", "wrn_40_2", "wrn_40_1"),
        ("wrn_40_2_ShuffleV1", "wrn_40_2", "ShuffleV1"),
        ("resnet32x4_ShuffleV2", "resnet32x4", "ShuffleV2"),
        ("resnet8_wrn_40_2", "resnet8", "wrn_40_2"),
        ("resnet8_resnet8x4", "resnet8", "resnet8x4"),
        ("ResNet50_resnet56", "ResNet50", "resnet56"),
        ("timm/vit_tiny_patch16_224_resnet8", "timm/vit_tiny_patch16_224", "resnet8"),
        ("timm/resnet18_torchvision/resnet18", "timm/resnet18", "torchvision/resnet18"),
        ("torchvision/mobilenet_v3_small_wrn_16_2", "torchvision/mobilenet_v3_small", "wrn_16_2"),
        ("wrn_40_2_timm/mobilenetv3_small_100", "wrn_40_2", "timm/mobilenetv3_small_100"),
        (
            "timm/vit_tiny_patch16_224_torchvision/mobilenet_v3_small",
            "timm/vit_tiny_patch16_224",
            "torchvision/mobilenet_v3_small",
        ),
    ],
)
def test_split_pair(pair, teacher, student):
    assert split_pair(pair) == (teacher, student)


def test_split_pair_on_all_models_of_the_zoo():
    models = list_models()
    for teacher in models:
        for student in models:
            assert split_pair(f"{teacher}_{student}") == (teacher, student)


@pytest.mark.parametrize(
    ("name", "what", "nearest"),
    [
        ("cifar1000.dkd.resnet56_resnet20", "recipe", "cifar100.dkd.resnet56_resnet20"),
        ("digit.kd.resnet20_resnet8", "recipe", "digits.kd.resnet20_resnet8"),
        ("cifar100.dkdd.resnet56_resnet20", "method", "dkd"),
        ("cifar100.DKD.resnet56_resnet20", "method", "dkd"),
        ("cifar100.teacher.resnet57", "model", "resnet56"),
        ("cifar100.student.mobilenetv2", "model", "MobileNetV2"),
        ("cifar100.dkd.resnet56_resnet21", "student", "resnet20"),
        ("cifar100.dkd.resnet57_resnet8", "teacher 'resnet57'", "resnet56"),
        ("cifar100.dkd.wrn_40_3_wrn_16_2", "teacher 'wrn_40_3'", "wrn_40_2"),
        ("cifar100.dkd.resnet32x4resnet8x4", "pair", "resnet32x4_resnet8x4"),
        ("cifar100.dkd.wrn_40_2", "pair", "wrn_40_2"),
        ("imagenet.dkd.resnet34_resnet19", "student", "resnet18"),
        ("imagenet.student.mobilenet_v1", "model", "mobilenetv1"),
        ("cifar100.kd.resnet34_resnet18", "pair", "resnet34_resnet18"),
    ],
)
def test_unknown_names_give_the_nearest(name, what, nearest):
    with pytest.raises(UnknownNameError, match=f"unknown {what}") as caught:
        get_recipe(name)
    tail = caught.value.for_command().split("nearest: ")[1]
    assert nearest in tail
    assert "mdistiller list" in tail or "--plugin" in tail or what == "model"


@pytest.mark.parametrize(
    "name", ["cifar100", "cifar100.", "cifar100.dkd", "cifar100.dkd.", "digits..resnet8"]
)
def test_incomplete_names_say_the_form(name):
    with pytest.raises(ConfigError, match=r"METHOD\.TEACHER_STUDENT"):
        get_recipe(name)


def test_a_method_without_teacher_is_no_recipe_of_a_pair():
    with pytest.raises(ConfigError, match=r"takes no teacher; use cifar100\.student\.MODEL"):
        get_recipe("cifar100.none.resnet56_resnet20")


def test_quickstart_recipe_is_what_it_says(tmp_path):
    """The setting's text is the configs'."""
    teacher, *students = quickstart.runs_of(tmp_path, 3).values()
    assert teacher.data.train_limit is None
    assert teacher.data.label_noise == 0
    configs = {config.method.method_name: config for config in students[-3:]}
    assert list(configs) == ["none", "kd", "dkd"]
    for method, config in configs.items():
        assert config.seed == 2
        assert config.method == method_config(method)
        assert (config.teacher is None) == (method == "none")
        assert config.teacher is None or config.teacher.checkpoint == tmp_path / "teacher"
        # Students differ in nothing but the method.
        same = {"method": NoneConfig(), "teacher": None, "recipe": "", "out": None}
        assert config.model_copy(update=same) == configs["none"].model_copy(update=same)
        assert f"trains on {config.data.train_limit} of them" in quickstart.SETTING
        assert f"{config.data.label_noise:.0%} wrong labels" in quickstart.SETTING
        assert config.student.name in quickstart.SETTING


def test_other_methods_published_settings_for_a_pair():
    """The reference code base's reviewkd.yaml, and the authors of CAT-KD, GDKD, SDD and LSKD."""
    pair = "resnet32x4_resnet8x4"
    assert get_recipe(f"cifar100.reviewkd.{pair}").method.weight == 5.0
    assert get_recipe("cifar100.reviewkd.vgg13_vgg8").method.weight == 1.0  # not published: the default
    catkd = get_recipe("cifar100.catkd.vgg13_MobileNetV2").method
    assert (catkd.weight, catkd.resolution, catkd.normalize) == (15.0, 2, True)
    gdkd = get_recipe(f"cifar100.gdkd.{pair}").method
    assert (gdkd.w0, gdkd.w1, gdkd.w2) == (1.0, 2.0, 8.0)
    assert get_recipe(f"cifar100.sdd.{pair}").method.scales == (1, 2)
    assert get_recipe("cifar100.sdd-dkd.vgg13_MobileNetV2").method.base.beta == 6.0
    lskd = get_recipe("cifar100.lskd-dkd.vgg13_vgg8").method.base
    assert (lskd.alpha, lskd.beta, lskd.temperature) == (15.0, 30.0, 2.0)  # 15 times 1 and 2
    other = get_recipe("cifar100.lskd-dkd.vgg13_resnet8x4").method.base
    assert (other.alpha, other.beta, other.temperature) == (9.0, 54.0, 2.0)  # 9 times 1 and the teacher's 6


@pytest.mark.parametrize("name", [*list_methods(), "dkd+reviewkd", "lskd-ctkd-kd"])
def test_every_method_has_recipes(name):
    if name == "none":
        return
    config = get_recipe(f"cifar100.{name}.resnet32x4_resnet8x4")
    common = {"optim": {"lr": 0.05, "nesterov": False}, "batch_size": 64}
    # These authors have another rate, momentum or batch.
    own = {"mlkd": {"optim": {"lr": 0.05}}, **dict.fromkeys(("reviewkd", "nd", "wkd_l", "wkd_f"), common)}
    # SDD clips, and DeepKD has its own optimizer.
    own |= {"sdd": {"optim": {"clip_norm": None}}, "deepkd": {"optim": {"name": "sgd"}}}
    assert config.optim.nesterov == (name in ("reviewkd", "nd", "wkd_l", "wkd_f"))
    assert config.optim.clip_norm == (40.0 if name == "sdd" else None)
    assert (config.optim.name == "deepkd") == (name == "deepkd")
    assert_published_setting(config.replace(**own.get(name, {})), 0.05)
    assert ClassificationConfig.model_validate_json(config.model_dump_json()) == config


def test_fine_tuning_is_a_recipe_of_folders():
    config = get_recipe("folder.finetune.torchvision/resnet18")
    assert config.student.name == "torchvision/resnet18"
    assert config.optim.name == "adamw"
    assert config.optim.layer_decay < 1 < config.optim.head_lr
    assert not config.optim.norm_decay
    assert 0 < config.probe_epochs < config.epochs
    assert config.patience
    assert config.ema
    assert config.ema_warmup
    assert get_recipe("folder.student.torchvision/resnet18", pretrained=True) == config
    with pytest.raises(
        ConfigError, match=r"cifar100 has no recipe for fine-tuning; allowed: folder\.finetune"
    ):
        get_recipe("cifar100.finetune.resnet20")
    with pytest.raises(ConfigError, match="trains one model on the labels"):
        get_recipe("folder.finetune.resnet20", "kd")


def test_a_pretrained_student_of_another_family_keeps_the_published_setting():
    name = "cifar100.dkd.resnet56_resnet20"
    assert get_recipe(name, pretrained=True) == get_recipe(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("folder.teacher.resnet18", ["torchvision/resnet18", "timm/resnet18"]),
        ("folder.student.efficientnet_lite0", ["timm/efficientnet_lite0"]),
        (
            "folder.dkd.resnet50_resnet18",
            ["torchvision/resnet50_torchvision/resnet18", "timm/resnet50_timm/resnet18"],
        ),
        (
            "folder.kd.timm/resnet50_resnet18",
            ["timm/resnet50_torchvision/resnet18", "timm/resnet50_timm/resnet18"],
        ),
        ("imagenet.teacher.vit_b_16", ["torchvision/vit_b_16"]),
    ],
)
def test_photographs_suggest_models_of_the_libraries(name, nearest):
    pytest.importorskip("timm")
    with pytest.raises(UnknownNameError) as caught:
        get_recipe(name)
    assert [n for n in caught.value.nearest if "/" in n] == nearest


def test_a_name_like_none_suggests_like_names_of_the_libraries():
    pytest.importorskip("timm")
    with pytest.raises(UnknownNameError) as caught:
        get_recipe("folder.teacher.mobilnet_v2")
    assert "torchvision/mobilenet_v2" in caught.value.nearest
    assert not set(caught.value.nearest) & set(list_models())


@pytest.mark.parametrize("name", ["cifar100.kd.resnet56_resnet8", "cifar100.kd.resnet8"])
def test_a_recipe_with_a_teacher_of_its_own(name):
    config = get_recipe(name, teacher="resnet110")
    assert config == get_recipe("cifar100.kd.resnet110_resnet8")
    pair = get_recipe("cifar100.dkd.resnet8x4", teacher="resnet32x4")
    assert pair == get_recipe("cifar100.dkd.resnet32x4_resnet8x4")  # tuned for the pair
    own = get_recipe(name, teacher="self")
    assert own == get_recipe("cifar100.kd.self_resnet8")


def test_a_detector_takes_a_teacher_of_its_architecture_or_another():
    config = get_recipe("coco.kd.fasterrcnn_resnet50_resnet18", teacher="fasterrcnn_resnet101")
    assert config == get_recipe("coco.kd.fasterrcnn_resnet101_resnet18")
    assert config == get_recipe("coco.kd.fasterrcnn_resnet18", teacher="fasterrcnn_resnet101")
    other = get_recipe("coco.pkd.fasterrcnn_resnet18", teacher="retinanet_resnet50")
    assert other.recipe == "coco.pkd.retinanet_resnet50_fasterrcnn_resnet18"
    assert other == get_recipe(other.recipe)
    assert (other.teacher.name, other.student.name) == ("retinanet_resnet50", "fasterrcnn_resnet18")


# configs/imagenet/{kd,dkd}.yaml of the reference code base, and no scale of CIFAR's features.
@pytest.mark.parametrize("pair", ["torchvision/resnet50_torchvision/resnet18", "vgg13_wrn_16_1"])
def test_a_folder_has_imagenets_settings_and_measured_weights(pair):
    kd = get_recipe(f"folder.kd.{pair}").method
    assert (kd.task_weight, kd.weight, kd.temperature) == (0.5, 0.5, 1.0)
    dkd = get_recipe(f"folder.dkd.{pair}").method
    assert (dkd.task_weight, dkd.alpha, dkd.beta, dkd.temperature, dkd.warmup) == (1, 1, 1, 1, 0)
    assert get_recipe(f"folder.dist.{pair}").method.temperature == 1
    review = get_recipe(f"folder.reviewkd.{pair}").method
    assert (review.weight, review.warmup, review.student_taps) == ("auto", 0, ())
    for name in ("at", "fitnet", "ofd", "rkd", "sp"):
        assert get_recipe(f"folder.{name}.{pair}").method.weight == "auto", name
        for family in ("cifar100", "digits", "imagenet"):
            given = get_recipe(f"{family}.{name}.resnet20_resnet8").method
            assert given.weight > 0, (family, name)
    both = get_recipe(f"folder.dkd+fitnet.{pair}").method
    assert (both.dkd.temperature, both.fitnet.weight, both.task_weight) == (1, "auto", 1)


def test_no_weight_is_measured_against_ones_own_average():
    config = get_recipe("folder.fitnet.self_vgg8")
    assert config.method.weight == 100
    assert get_recipe("folder.dkd.self_vgg8").method.temperature == 1
    ClassificationConfig.model_validate_json(config.model_dump_json())


OWN = "ImageNet's; auto weights are measured before the first step"


@pytest.mark.parametrize(
    ("recipe", "changes", "line"),
    [
        ("folder.dkd.vgg13_vgg8", {}, OWN),
        ("folder.dkd.vgg13_vgg8", {"beta": "auto"}, f"{OWN}; changed: method.beta auto for 1"),
        (
            "folder.dkd+at.vgg13_vgg8",
            {"dkd": {"beta": 2.0}},
            f"{OWN}; changed: method.dkd.beta 2 for 1",
        ),
        ("digits.dkd.vgg13_vgg8", {}, "default, not published"),
    ],
)
def test_the_line_about_settings_has_their_source_and_what_changed(recipe, changes, line):
    config = get_recipe(recipe)
    assert describe_source(config.replace(method=changes) if changes else config) == line


def test_another_method_of_a_run_has_its_recipes_settings():
    run = get_recipe("folder.kd.vgg13_vgg8").replace(epochs=3)
    changed = set_method(run, "dkd")
    assert changed == get_recipe("folder.dkd.vgg13_vgg8").replace(epochs=3)
    assert set_method(get_recipe("cifar100.kd.vgg13_vgg8"), "dkd").method.beta == 6
