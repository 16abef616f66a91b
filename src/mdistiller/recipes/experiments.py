"""Experiments of the paper: pairs × settings, with the published accuracies, as grids of cells.

Accuracies are from Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, unless stated otherwise. Those
with `checked` were read there or in the authors' README; the others were noted from memory, and tables mark
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from mdistiller.errors import UnknownNameError
from mdistiller.methods import MethodConfig, get_method, list_methods
from mdistiller.methods.dkd import DKDConfig
from mdistiller.methods.kd import KDConfig
from mdistiller.recipes.cells import SMALL, SMOKE, Builder, Cell, Family, Scale

# Each part at weight 1. KD is TCKD + (1 - p_t) NCKD, with p_t the teacher's confidence.
TCKD, NCKD = DKDConfig(alpha=1.0, beta=0.0), DKDConfig(alpha=0.0, beta=1.0)
BOTH = DKDConfig(alpha=1.0, beta=1.0)
KD_FULL = KDConfig(task_weight=1.0, weight=1.0)

_METHODS = ("KD", "FitNet", "RKD", "CRD", "OFD", "ReviewKD", "DKD")
RECIPES = {"baseline": "none", **{name: name.lower() for name in _METHODS}}
"""Methods of the settings that are recipes."""
MAIN = "resnet32x4_resnet8x4"


def _by_setting(*top1: float | None) -> dict[str, float | None]:
    return dict(zip(RECIPES, top1, strict=True))


# Tables 6 and 7 by pair: baseline, KD, FitNet, RKD, CRD, OFD, ReviewKD, DKD. KD and DKD are checked.
TABLE6 = {
    "resnet56_resnet20": _by_setting(69.06, 70.66, 69.21, 69.61, 71.16, 70.98, 71.89, 71.97),
    "resnet110_resnet32": _by_setting(71.14, 73.08, 71.06, 71.82, 73.48, 73.23, 73.89, 74.11),
    MAIN: _by_setting(72.50, 73.33, 73.50, 71.90, 75.51, 74.95, 75.63, 76.32),
    "wrn_40_2_wrn_16_2": _by_setting(73.26, 74.92, 73.58, 73.35, 75.48, 75.24, 76.12, 76.24),
    "wrn_40_2_wrn_40_1": _by_setting(71.98, 73.54, 72.24, 72.22, 74.14, 74.33, 75.09, 74.81),
    "vgg13_vgg8": _by_setting(70.36, 72.98, 71.02, 71.48, 73.94, 73.95, 74.84, 74.68),
}
TABLE7 = {
    "resnet32x4_ShuffleV1": _by_setting(70.50, 74.07, None, 72.28, 75.11, 75.98, 77.45, 76.45),
    "wrn_40_2_ShuffleV1": _by_setting(70.50, 74.83, None, 72.21, 76.05, 75.85, 77.14, 76.70),
    "vgg13_MobileNetV2": _by_setting(64.60, 67.37, None, 64.52, 69.73, 69.48, 70.37, 69.71),
    "ResNet50_MobileNetV2": _by_setting(64.60, 67.35, None, 64.43, 69.11, 69.04, 69.89, 70.35),
    "resnet32x4_ShuffleV2": _by_setting(71.82, 74.45, None, 73.21, 75.65, 76.82, 77.78, 77.07),
}
R34_R18, R50_MOBILENET = "resnet34_resnet18", "resnet50_mobilenetv1"
# Tables 8 and 9. KD and DKD are checked.
IMAGENET = {
    R34_R18: {"baseline": 69.75, "KD": 71.03, "DKD": 71.70},
    R50_MOBILENET: {"baseline": 68.87, "KD": 70.50, "DKD": 72.05},
}


class Experiment(NamedTuple):
    """Table or figure of the paper.

    title: its subject.
    pairs: pairs TEACHER_STUDENT at the paper's scale.
    add: adds the cells of one pair.
    extra: name of a measurement on the finished runs besides accuracy; may be empty.
    family: the recipes' data at the paper's scale.
    small: pairs at the small scale.
    """

    title: str
    pairs: Iterable[str]
    add: Callable[[Builder, str], None]
    extra: str = ""
    family: Family = "cifar100"
    small: tuple[str, ...] = SMALL

    def cells(self, scale: Scale) -> list[Cell]:
        """Builds the cells at a scale."""
        build = Builder(scale, self.family)
        for pair in {"paper": self.pairs, "small": self.small, "smoke": SMOKE}[scale]:
            self.add(build, pair)
        return build.cells


def _recipes(build: Builder, pair: str, settings: Iterable[str] = ("baseline", "KD", "DKD")) -> None:
    known = (TABLE6 | TABLE7 | IMAGENET).get(pair, {})
    for name in settings:
        build.add(pair, name, RECIPES[name], known.get(name), checked=name in ("KD", "DKD"))


_distilled = partial(_recipes, settings=_METHODS)
_kd_and_dkd = partial(_recipes, settings=("KD", "DKD"))


def _cifar100(build: Builder, pair: str) -> None:
    _recipes(build, pair)
    # ReviewKD, CRD, DIST and LSKD as published by their authors or in the paper.
    more: dict[str, tuple[str | MethodConfig, float]] = {
        "TCKD alone": (TCKD, 68.63),
        "NCKD alone": (NCKD, 74.26),
        "ReviewKD": ("reviewkd", 75.63),
        "CRD": ("crd", 75.51),
        "DIST": ("dist", 76.31),
        "LSKD+DKD": ("lskd-dkd", 77.01),
    }
    for setting, (method, top1) in more.items() if pair == MAIN or build.scale != "paper" else ():
        build.add(pair, setting, method, top1)


def _table1(build: Builder, pair: str) -> None:
    settings: tuple[tuple[str, str | MethodConfig, float], ...] = (
        ("baseline", "none", 72.50),
        ("KD (TCKD + NCKD)", KD_FULL, 73.63),
        ("TCKD alone", TCKD, 68.63),
        ("NCKD alone", NCKD, 74.26),
    )
    for setting, method, top1 in settings:
        build.add(pair, setting, method, top1 if pair == MAIN else None)


TABLE2 = {MAIN: (73.82, 75.33), "resnet32x4_ShuffleV1": (77.13, 77.98)}


def _table2(build: Builder, pair: str) -> None:
    nckd, both = TABLE2.get(pair, (None, None))
    build.add(pair, "AutoAugment: NCKD alone", NCKD, nckd, policy="autoaugment")
    build.add(pair, "AutoAugment: TCKD + NCKD", BOTH, both, policy="autoaugment")


def _table3(build: Builder, pair: str) -> None:
    for noise in (0.1, 0.2, 0.3):
        build.add(pair, f"noise {noise}: NCKD alone", NCKD, noise=noise)
        build.add(pair, f"noise {noise}: TCKD + NCKD", BOTH, noise=noise)


def _table4(build: Builder, pair: str) -> None:
    for setting, alpha, top1 in (("NCKD alone", 0.0, 70.71), ("TCKD + NCKD", 1.0, 71.03)):
        method = DKDConfig(alpha=alpha, beta=1.0, temperature=1.0, warmup=1 / 100)
        build.add(pair, f"T 1: {setting}", method, top1)


def _table5(build: Builder, pair: str) -> None:
    build.add(pair, "NCKD alone", NCKD, 74.26)
    for half in ("confident", "unsure"):
        build.add(pair, f"NCKD on the {half} half", NCKD.replace(nckd_samples=half))


def _ablation(build: Builder, pair: str) -> None:
    build.add(pair, "KD (TCKD + NCKD)", KD_FULL, 73.63, checked=True)
    for beta, top1 in {1: 74.79, 2: 75.44, 4: 75.94, 8: 76.32, 10: 76.18}.items():
        build.add(pair, f"α 1, β {beta}", DKDConfig(alpha=1, beta=beta), top1, checked=beta in (1, 8))
    for alpha, top1 in {0: 75.30, 0.2: 75.64, 0.5: 76.12, 2: 76.11, 4: 75.42}.items():
        build.add(pair, f"α {alpha}, β 8", DKDConfig(alpha=alpha, beta=8), top1)


def _every_method(build: Builder, pair: str) -> None:
    _recipes(build, pair, RECIPES)
    for name in list_methods():
        if name not in RECIPES.values() and get_method(name).needs_teacher:
            build.add(pair, name, name)


# Teachers of wrn_16_2, the smallest first, with the accuracies of KD and DKD.
TABLE11 = {
    "wrn_28_2_wrn_16_2": (75.37, 75.92),
    "wrn_40_2_wrn_16_2": (74.92, 76.24),
    "wrn_16_4_wrn_16_2": (75.79, 76.00),
    "wrn_28_4_wrn_16_2": (75.04, 76.45),
}


def _teachers(build: Builder, pair: str) -> None:
    kd, dkd = TABLE11.get(pair, (None, None))
    build.add(pair, "KD", "kd", kd, checked=pair in TABLE6)
    build.add(pair, "ESKD", "eskd", early=True)
    build.add(pair, "DKD", "dkd", dkd, checked=pair in TABLE6)


def _beta(build: Builder, pair: str) -> None:
    _recipes(build, pair, ["DKD"])  # with the tuned β, which is 8 for MAIN
    for beta in ("auto", "auto-sample") if pair == MAIN else (8, "auto", "auto-sample"):
        build.add(pair, f"α 1, β {beta}", DKDConfig(alpha=1, beta=beta))


_SPLIT_PAIRS = (MAIN, "resnet32x4_ShuffleV1", "wrn_40_2_wrn_16_2", "wrn_40_2_ShuffleV1")
_BETA_PAIRS = ("resnet56_resnet20", "wrn_40_2_wrn_16_2", "vgg13_vgg8", MAIN)
EXPERIMENTS = {
    "cifar100": Experiment(
        "CIFAR-100: baselines, KD, DKD, and other methods on the first pair",
        (
            *(MAIN, "wrn_40_2_wrn_16_2", "wrn_40_2_ShuffleV1", "vgg13_vgg8"),
            *("vgg13_MobileNetV2", "resnet56_resnet20", "resnet32x4_ShuffleV2"),
        ),
        _cifar100,
    ),
    "table1": Experiment(
        "Table 1: effect of the target-class and the non-target-class part alone", _SPLIT_PAIRS, _table1
    ),
    "table2": Experiment("Table 2: gain of TCKD over NCKD under AutoAugment", TABLE2, _table2),
    "table3": Experiment("Table 3: gain of TCKD over NCKD under wrong training labels", [MAIN], _table3),
    "table4": Experiment(
        "Table 4: gain of TCKD over NCKD on ImageNet", [R34_R18], _table4, family="imagenet"
    ),
    "table5": Experiment(
        "Table 5: NCKD on samples for which the teacher is certain or unsure", [MAIN], _table5
    ),
    "ablation": Experiment("Ablation: 1 − p_t against a free weight of NCKD, β, and α", [MAIN], _ablation),
    "table6": Experiment("Table 6: CIFAR-100, similar architectures", TABLE6, _every_method),
    "table7": Experiment("Table 7: CIFAR-100, different architectures", TABLE7, _every_method),
    "table8": Experiment("Table 8: ImageNet, ResNet-34 → ResNet-18", [R34_R18], _recipes, family="imagenet"),
    "table9": Experiment(
        "Table 9: ImageNet, ResNet-50 → MobileNetV1", [R50_MOBILENET], _recipes, family="imagenet"
    ),
    "table11": Experiment(
        "Table 11: bigger wide ResNets are not always better teachers",
        TABLE11,
        _teachers,
        small=("resnet56_resnet20", "wrn_40_2_resnet20", "resnet32x4_resnet20"),
    ),
    "table12": Experiment(
        "Table 12: teachers of other architectures are not always better",
        ("vgg13_wrn_16_2", "wrn_16_4_wrn_16_2", "ResNet50_wrn_16_2"),
        _teachers,
        small=("vgg13_resnet20", "resnet56_resnet20"),
    ),
    "table13": Experiment(
        "Table 13: the student's features on other data", ["wrn_40_2_wrn_16_2"], _recipes, "transfer"
    ),
    "figure2": Experiment(
        "Figure 2: time of a step and extra parameters against accuracy", [MAIN], _distilled, "cost"
    ),
    "figure3": Experiment(
        "Figure 3: the student's features after KD and after DKD", [MAIN], _kd_and_dkd, "features"
    ),
    "figure4": Experiment(
        "Figure 4: difference between the logits' correlations", [MAIN], _kd_and_dkd, "correlation"
    ),
    "beta": Experiment(
        "Adaptive β: from the teacher's logit gap, beside fixed and tuned β",
        _BETA_PAIRS,
        _beta,
        "gap",
        small=_BETA_PAIRS,
    ),
}


def get_experiment(name: str) -> Experiment:
    """Returns an experiment.

    Raises:
        UnknownNameError: no such experiment.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
