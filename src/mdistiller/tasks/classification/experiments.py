"""Experiments of the paper: pairs × settings, with the published accuracies, as grids of cells."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from mdistiller.config import RunConfig
from mdistiller.methods import MethodConfig, get_method, list_methods
from mdistiller.methods.dkd import DKDConfig
from mdistiller.methods.kd import KDConfig
from mdistiller.recipes import get_recipe
from mdistiller.recipes.describe import find_published, status
from mdistiller.recipes.experiments import Cell, Scale, Teacher, register_experiments
from mdistiller.recipes.family import split_pair
from mdistiller.recipes.published import UNPUBLISHED, find_top1, list_tables
from mdistiller.tasks.classification.recipes import CIFAR100_PAIRS, IMAGENET_MODELS
from mdistiller.types import Line

Family = Literal["cifar100", "imagenet"]


def models_of(pair: str) -> tuple[str, str]:
    """Splits a cell's pair into teacher and student, by their names in recipes."""
    return split_pair(pair, IMAGENET_MODELS)


class Setting(NamedTuple):
    """Column of a table.

    method: a method's name or its config; `none` for the student alone.
    noise: fraction of wrong training labels.
    policy: augmentation policy.
    early: end the teacher's training after a quarter of the epochs.
    """

    method: str | MethodConfig
    noise: float = 0.0
    policy: Literal["none", "autoaugment"] = "none"
    early: bool = False


_SCALES: dict[Scale, Line] = {
    "small": {"data": {"train_limit": 5000}, "epochs": 12, "eval_every": 4},
    "smoke": {"data": {"train_limit": 60, "test_limit": 50}, "epochs": 1, "batch_size": 20},
}


def build_cell(pair: str, name: str, setting: Setting, scale: Scale, family: Family) -> Cell:
    """Builds a cell, without its published accuracy; `family` has the recipes of the paper's scale."""
    data = {"small": "cifar100", "smoke": "digits"}.get(scale, family)
    (model, student), method = models_of(pair), setting.method
    method_name = method if isinstance(method, str) else method.method_name
    recipe = f"{data}.student.{student}" if method == "none" else f"{data}.{method_name}.{pair}"
    config = get_recipe(recipe)
    if isinstance(method, MethodConfig):
        config = config.replace(method=method)
    config = _changed(config, setting.noise, setting.policy, scale)
    if config.teacher is None:
        return Cell(pair, name, config, None)
    if data == "imagenet":
        return Cell(pair, name, config, Teacher(model, None))
    # The paper's teachers train on the same wrong labels. With little data and few epochs such a teacher is
    # too weak, so at the small scales the teacher has clean labels.
    noise = setting.noise if scale in ("paper", "quarter") else 0.0
    training = _changed(get_recipe(f"{data}.teacher.{model}"), noise, "none", scale)
    key = f"{model}-noise{noise:g}" if noise else model
    if setting.early:
        training, key = training.replace(epochs=-(-training.epochs // 4)), f"{key}-early"
    return Cell(pair, name, config, Teacher(key, training))


def _changed(config: RunConfig, noise: float, policy: str, scale: Scale) -> RunConfig:
    config = config.replace(data={"label_noise": noise}, augment={"policy": policy})
    if scale == "quarter":  # learning-rate drops and warm-ups are fractions, so they shrink with the epochs
        return config.replace(epochs=config.epochs // 4)
    return config.replace(**_SCALES.get(scale, {}))


MAIN = "resnet32x4_resnet8x4"
NCKD, BOTH = DKDConfig(alpha=0.0, beta=1.0), DKDConfig(alpha=1.0, beta=1.0)
PARTS = {"NCKD alone": NCKD, "TCKD + NCKD": BOTH}
NOISES, HALVES = (0.1, 0.2, 0.3), ("confident", "unsure")
# α and β.
_ABLATION = (*((1, beta) for beta in (1, 2, 4, 8, 10)), *((alpha, 8) for alpha in (0, 0.2, 0.5, 2, 4)))

_METHODS = ("KD", "FitNet", "RKD", "CRD", "OFD", "ReviewKD", "DKD")
SETTINGS = {
    "baseline": Setting("none"),
    **{name: Setting(name.lower()) for name in (*_METHODS, "DIST")},
    "ESKD": Setting("eskd", early=True),
    "LSKD+DKD": Setting("lskd-dkd"),
    # Each part at weight 1. KD is TCKD + (1 - p_t) NCKD, with p_t the teacher's confidence.
    "KD (TCKD + NCKD)": Setting(KDConfig(task_weight=1.0, weight=1.0)),
    "TCKD alone": Setting(DKDConfig(alpha=1.0, beta=0.0)),
    "NCKD alone": Setting(NCKD),
    **{f"AutoAugment: {name}": Setting(part, policy="autoaugment") for name, part in PARTS.items()},
    **{f"noise {x}: {name}": Setting(part, noise=x) for x in NOISES for name, part in PARTS.items()},
    **{f"T 1: {name}": Setting(part.replace(temperature=1.0, warmup=0.01)) for name, part in PARTS.items()},
    **{f"NCKD on the {half} half": Setting(NCKD.replace(nckd_samples=half)) for half in HALVES},
    **{f"α {a}, β {b}": Setting(DKDConfig(alpha=a, beta=b)) for a, b in _ABLATION},
    **{f"α 1, β {beta}": Setting(DKDConfig(alpha=1, beta=beta)) for beta in ("auto", "auto-sample")},
}
"""Columns of tables by name; any other name is that of a method."""

BASIC = ("baseline", "KD", "DKD")


def _cifar100(pair: str, scale: Scale) -> tuple[str, ...]:
    more = ("TCKD alone", "NCKD alone", "ReviewKD", "CRD", "DIST", "LSKD+DKD")
    return (*BASIC, *more) if pair == MAIN or scale != "paper" else BASIC


def _every_method(pair: str, scale: Scale) -> tuple[str, ...]:
    named = ("baseline", *_METHODS)
    known = {SETTINGS[name].method for name in named}
    return (*named, *(m for m in list_methods() if m not in known and get_method(m).needs.teacher))


class Experiment(NamedTuple):
    """Table or figure of the paper.

    title: its subject.
    pairs: pairs TEACHER_STUDENT at the paper's scale.
    settings: names of its columns, or a function that returns those of a pair at a scale.
    family: the recipes' data at the paper's scale.
    small: pairs at the small scale.
    tables: tables of accuracies of settings that are no recipes; the first one with the cell counts.
    """

    title: str
    pairs: Iterable[str]
    settings: tuple[str, ...] | Callable[[str, Scale], tuple[str, ...]]
    family: Family = "cifar100"
    small: tuple[str, ...] = ("resnet56_resnet20",)
    tables: tuple[str, ...] = list_tables()

    def cells(self, scale: Scale) -> list[Cell]:
        """Builds the cells at a scale, each run of a pair once; those on the paper's data have accuracies."""
        found: list[Cell] = []
        for pair in {"small": self.small, "smoke": ("resnet14_resnet8",)}.get(scale, self.pairs):
            for name in self.settings(pair, scale) if callable(self.settings) else self.settings:
                setting = SETTINGS.get(name, Setting(name))
                cell = build_cell(pair, name, setting, scale, self.family)
                if any((cell.pair, cell.config) == (known.pair, known.config) for known in found):
                    continue  # such as DKD, where the tuned β of the pair is a fixed one of the experiment
                if scale in ("paper", "quarter"):
                    cell = cell._replace(status=self._status(cell, setting))
                found.append(cell)
        return found

    def _status(self, cell: Cell, setting: Setting) -> str:
        """Returns the published accuracy of a recipe, or of a setting in a table, in words."""
        is_recipe = isinstance(setting.method, str)
        runs = find_published(cell.config.recipe).runs if is_recipe and not setting.early else ()
        if runs:
            return status(runs)
        top1, checked = find_top1(cell.pair, cell.setting, self.tables)
        if top1 is None:
            return UNPUBLISHED if is_recipe else "not published"
        return f"{top1:.2f} (best)" if checked else f"{top1:.2f} (best, unverified)"


R34_R18, R50_V1, WRN = "resnet34_resnet18", "resnet50_mobilenetv1", "wrn_40_2_wrn_16_2"
_SPLIT_PAIRS = (MAIN, "resnet32x4_ShuffleV1", WRN, "wrn_40_2_ShuffleV1")
_BETA_PAIRS = ("resnet56_resnet20", WRN, "vgg13_vgg8", MAIN)
_CIFAR100_PAIRS = (
    *(MAIN, WRN, "wrn_40_2_ShuffleV1", "vgg13_vgg8"),
    *("vgg13_MobileNetV2", "resnet56_resnet20", "resnet32x4_ShuffleV2"),
)
_WRN_16_2 = tuple(f"{teacher}_wrn_16_2" for teacher in ("wrn_28_2", "wrn_40_2", "wrn_16_4", "wrn_28_4"))
EXPERIMENTS = {
    "cifar100": Experiment(
        "CIFAR-100: baselines, KD, DKD, and other methods on the first pair", _CIFAR100_PAIRS, _cifar100
    ),
    "table1": Experiment(
        "Table 1: effect of the target-class and the non-target-class part alone",
        _SPLIT_PAIRS,
        ("baseline", "KD (TCKD + NCKD)", "TCKD alone", "NCKD alone"),
        tables=("table1",),
    ),
    "table2": Experiment(
        "Table 2: gain of TCKD over NCKD under AutoAugment",
        (MAIN, "resnet32x4_ShuffleV1"),
        tuple(f"AutoAugment: {part}" for part in PARTS),
    ),
    "table3": Experiment(
        "Table 3: gain of TCKD over NCKD under wrong training labels",
        [MAIN],
        tuple(f"noise {noise}: {part}" for noise in NOISES for part in PARTS),
    ),
    "table4": Experiment(
        "Table 4: gain of TCKD over NCKD on ImageNet",
        [R34_R18],
        tuple(f"T 1: {part}" for part in PARTS),
        family="imagenet",
    ),
    "table5": Experiment(
        "Table 5: NCKD on samples for which the teacher is certain or unsure",
        [MAIN],
        ("NCKD alone", *(f"NCKD on the {half} half" for half in HALVES)),
    ),
    "ablation": Experiment(
        "Ablation: 1 − p_t against a free weight of NCKD, β, and α",
        [MAIN],
        ("KD (TCKD + NCKD)", *(f"α {alpha}, β {beta}" for alpha, beta in _ABLATION)),
    ),
    "table6": Experiment("Table 6: CIFAR-100, similar architectures", CIFAR100_PAIRS[:6], _every_method),
    "table7": Experiment("Table 7: CIFAR-100, different architectures", CIFAR100_PAIRS[6:], _every_method),
    "table8": Experiment("Table 8: ImageNet, ResNet-34 → ResNet-18", [R34_R18], BASIC, family="imagenet"),
    "table9": Experiment("Table 9: ImageNet, ResNet-50 → MobileNetV1", [R50_V1], BASIC, family="imagenet"),
    "table11": Experiment(
        "Table 11: bigger wide ResNets are not always better teachers",
        _WRN_16_2,
        ("KD", "ESKD", "DKD"),
        small=("resnet56_resnet20", "wrn_40_2_resnet20", "resnet32x4_resnet20"),
    ),
    "table12": Experiment(
        "Table 12: teachers of other architectures are not always better",
        ("vgg13_wrn_16_2", "wrn_16_4_wrn_16_2", "ResNet50_wrn_16_2"),
        ("KD", "ESKD", "DKD"),
        small=("vgg13_resnet20", "resnet56_resnet20"),
    ),
    "figure2": Experiment("Figure 2: time of a step and extra parameters against accuracy", [MAIN], _METHODS),
    "figure3": Experiment("Figure 3: the student's features after KD and after DKD", [MAIN], ("KD", "DKD")),
    "figure4": Experiment("Figure 4: difference between the logits' correlations", [MAIN], ("KD", "DKD")),
    "beta": Experiment(
        "Adaptive β: from the teacher's logit gap, beside fixed and tuned β",
        _BETA_PAIRS,
        ("DKD", "α 1, β 8", "α 1, β auto", "α 1, β auto-sample"),
        small=_BETA_PAIRS,
    ),
}

register_experiments(EXPERIMENTS)
