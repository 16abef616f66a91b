"""The paper's experiments: pairs × settings, with the published figures, as grids of cells.

Figures are of Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, where nothing else is said. `checked`
ones were read there or in the authors' README; the others were taken down from memory, and tables say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mdistiller.errors import UnknownNameError
from mdistiller.methods import DKDConfig, KDConfig, MethodConfig, get_method, list_methods
from mdistiller.recipes.cells import Builder, Cell, Scale

# Each at weight 1. KD is TCKD + (1 - p_t) NCKD, with p_t the teacher's confidence.
TCKD, NCKD = DKDConfig(alpha=1.0, beta=0.0), DKDConfig(alpha=0.0, beta=1.0)
BOTH = DKDConfig(alpha=1.0, beta=1.0)
KD_FULL = KDConfig(task_weight=1.0, weight=1.0)

MAIN = "resnet32x4_resnet8x4"
# Tables 6 and 7: the student alone, then the methods. KD and DKD are checked.
TABLE6: dict[str, dict[str, float]] = {
    "resnet56_resnet20": {
        "alone": 69.06, "KD": 70.66, "FitNet": 69.21, "RKD": 69.61, "CRD": 71.16, "OFD": 70.98,
        "ReviewKD": 71.89, "DKD": 71.97,
    },
    "resnet110_resnet32": {
        "alone": 71.14, "KD": 73.08, "FitNet": 71.06, "RKD": 71.82, "CRD": 73.48, "OFD": 73.23,
        "ReviewKD": 73.89, "DKD": 74.11,
    },
    MAIN: {
        "alone": 72.50, "KD": 73.33, "FitNet": 73.50, "RKD": 71.90, "CRD": 75.51, "OFD": 74.95,
        "ReviewKD": 75.63, "DKD": 76.32,
    },
    "wrn_40_2_wrn_16_2": {
        "alone": 73.26, "KD": 74.92, "FitNet": 73.58, "RKD": 73.35, "CRD": 75.48, "OFD": 75.24,
        "ReviewKD": 76.12, "DKD": 76.24,
    },
    "wrn_40_2_wrn_40_1": {
        "alone": 71.98, "KD": 73.54, "FitNet": 72.24, "RKD": 72.22, "CRD": 74.14, "OFD": 74.33,
        "ReviewKD": 75.09, "DKD": 74.81,
    },
    "vgg13_vgg8": {
        "alone": 70.36, "KD": 72.98, "FitNet": 71.02, "RKD": 71.48, "CRD": 73.94, "OFD": 73.95,
        "ReviewKD": 74.84, "DKD": 74.68,
    },
}  # fmt: skip
TABLE7: dict[str, dict[str, float]] = {
    "resnet32x4_ShuffleV1": {
        "alone": 70.50, "KD": 74.07, "RKD": 72.28, "CRD": 75.11, "OFD": 75.98, "ReviewKD": 77.45,
        "DKD": 76.45,
    },
    "wrn_40_2_ShuffleV1": {
        "alone": 70.50, "KD": 74.83, "RKD": 72.21, "CRD": 76.05, "OFD": 75.85, "ReviewKD": 77.14,
        "DKD": 76.70,
    },
    "vgg13_MobileNetV2": {
        "alone": 64.60, "KD": 67.37, "RKD": 64.52, "CRD": 69.73, "OFD": 69.48, "ReviewKD": 70.37,
        "DKD": 69.71,
    },
    "ResNet50_MobileNetV2": {
        "alone": 64.60, "KD": 67.35, "RKD": 64.43, "CRD": 69.11, "OFD": 69.04, "ReviewKD": 69.89,
        "DKD": 70.35,
    },
    "resnet32x4_ShuffleV2": {
        "alone": 71.82, "KD": 74.45, "RKD": 73.21, "CRD": 75.65, "OFD": 76.82, "ReviewKD": 77.78,
        "DKD": 77.07,
    },
}  # fmt: skip
# Settings that are recipes, by what tables call them.
RECIPES = {
    "alone": "none",
    "KD": "kd",
    "FitNet": "fitnet",
    "RKD": "rkd",
    "CRD": "crd",
    "OFD": "ofd",
    "ReviewKD": "reviewkd",
    "DKD": "dkd",
}


class Experiment(NamedTuple):
    """A table or a figure of the paper.

    title: what it shows.
    cells: its runs at a scale.
    extra: what is measured on the finished runs, besides their accuracy; empty: nothing.
    """

    title: str
    cells: Callable[[Scale], list[Cell]]
    extra: str = ""


def _published(build: Builder, pair: str, settings: dict[str, float] | list[str]) -> None:
    """Cells of tables 6 and 7."""
    known = (TABLE6 | TABLE7).get(pair, {})
    for name in settings:
        build.add(pair, name, RECIPES[name], known.get(name), checked=name in ("KD", "DKD"))


def _cifar100(scale: Scale) -> list[Cell]:
    build = Builder(scale)
    # ReviewKD, CRD, DIST and LSKD as their authors or the paper give them.
    more: dict[str, tuple[str | MethodConfig, float]] = {
        "TCKD alone": (TCKD, 68.63),
        "NCKD alone": (NCKD, 74.26),
        "ReviewKD": ("reviewkd", 75.63),
        "CRD": ("crd", 75.51),
        "DIST": ("dist", 76.31),
        "LSKD+DKD": ("lskd-dkd", 77.01),
    }
    pairs = (
        MAIN,
        "wrn_40_2_wrn_16_2",
        "wrn_40_2_ShuffleV1",
        "vgg13_vgg8",
        "vgg13_MobileNetV2",
        "resnet56_resnet20",
        "resnet32x4_ShuffleV2",
    )
    for pair in build.pairs(pairs):
        _published(build, pair, ["alone", "KD", "DKD"])
        for setting, (method, figure) in more.items() if pair == MAIN or scale != "paper" else ():
            build.add(pair, setting, method, figure)
    return build.cells


def _table1(scale: Scale) -> list[Cell]:
    build = Builder(scale)
    known: dict[str, tuple[float | None, ...]] = {MAIN: (72.50, 73.63, 68.63, 74.26)}
    pairs = (MAIN, "resnet32x4_ShuffleV1", "wrn_40_2_wrn_16_2", "wrn_40_2_ShuffleV1")
    settings: tuple[tuple[str, str | MethodConfig], ...] = (
        ("alone", "none"),
        ("KD (TCKD + NCKD)", KD_FULL),
        ("TCKD alone", TCKD),
        ("NCKD alone", NCKD),
    )
    for pair in build.pairs(pairs):
        for (setting, method), figure in zip(settings, known.get(pair, (None,) * 4), strict=True):
            build.add(pair, setting, method, figure)
    return build.cells


def _table2(scale: Scale) -> list[Cell]:
    build = Builder(scale)
    known = {MAIN: (73.82, 75.33), "resnet32x4_ShuffleV1": (77.13, 77.98)}
    for pair in build.pairs(tuple(known)):
        alone, both = known.get(pair, (None, None))
        build.add(pair, "AutoAugment: NCKD alone", NCKD, alone, policy="autoaugment")
        build.add(pair, "AutoAugment: TCKD + NCKD", BOTH, both, policy="autoaugment")
    return build.cells


def _table3(scale: Scale) -> list[Cell]:
    build = Builder(scale)
    for pair in build.pairs((MAIN,)):
        for noise in (0.1, 0.2, 0.3):
            build.add(pair, f"noise {noise}: NCKD alone", NCKD, noise=noise)
            build.add(pair, f"noise {noise}: TCKD + NCKD", BOTH, noise=noise)
    return build.cells


R34_R18, R50_MOBILENET = "resnet34_resnet18", "resnet50_mobilenetv1"


def _table4(scale: Scale) -> list[Cell]:
    build = Builder(scale, "imagenet")
    for pair in build.pairs((R34_R18,)):
        for setting, alpha, figure in (("NCKD alone", 0.0, 70.71), ("TCKD + NCKD", 1.0, 71.03)):
            method = DKDConfig(alpha=alpha, beta=1.0, temperature=1.0, warmup=1 / 100)
            build.add(pair, f"T 1: {setting}", method, figure)
    return build.cells


def _table5(scale: Scale) -> list[Cell]:
    build = Builder(scale)
    for pair in build.pairs((MAIN,)):
        build.add(pair, "NCKD alone", NCKD, 74.26)
        for half in ("confident", "unsure"):
            method = NCKD.model_copy(update={"nckd_samples": half})
            build.add(pair, f"NCKD on the {half} half", method)
    return build.cells


def _ablation(scale: Scale) -> list[Cell]:
    build = Builder(scale)
    of_beta = {1: 74.79, 2: 75.44, 4: 75.94, 8: 76.32, 10: 76.18}
    of_alpha = {0: 75.30, 0.2: 75.64, 0.5: 76.12, 2: 76.11, 4: 75.42}
    for pair in build.pairs((MAIN,)):
        build.add(pair, "KD (TCKD + NCKD)", KD_FULL, 73.63, checked=True)
        for beta, figure in of_beta.items():
            method = DKDConfig(alpha=1, beta=beta)
            build.add(pair, f"α 1, β {beta}", method, figure, checked=beta in (1, 8))
        for alpha, figure in of_alpha.items():
            build.add(pair, f"α {alpha}, β 8", DKDConfig(alpha=alpha, beta=8), figure)
    return build.cells


def _every_method(pairs: dict[str, dict[str, float]], scale: Scale) -> list[Cell]:
    """What the paper's table has, then every other method of this package."""
    build = Builder(scale)
    others = [
        name for name in list_methods() if name not in RECIPES.values() and get_method(name).needs_teacher
    ]
    for pair in build.pairs(tuple(pairs)):
        _published(build, pair, list(RECIPES))
        for name in others:
            build.add(pair, name, name)
    return build.cells


def _table6(scale: Scale) -> list[Cell]:
    return _every_method(TABLE6, scale)


def _table7(scale: Scale) -> list[Cell]:
    return _every_method(TABLE7, scale)


def _imagenet(pair: str, figures: dict[str, float], scale: Scale) -> list[Cell]:
    build = Builder(scale, "imagenet")
    for chosen in build.pairs((pair,)):
        for setting, figure in figures.items():
            build.add(chosen, setting, RECIPES[setting], figure, checked=setting in ("KD", "DKD"))
    return build.cells


def _table8(scale: Scale) -> list[Cell]:
    return _imagenet(R34_R18, {"alone": 69.75, "KD": 71.03, "DKD": 71.70}, scale)


def _table9(scale: Scale) -> list[Cell]:
    return _imagenet(R50_MOBILENET, {"alone": 68.87, "KD": 70.50, "DKD": 72.05}, scale)


# Teachers of wrn_16_2, the smallest first, with the figures of KD and DKD.
TABLE11 = {
    "wrn_28_2": (75.37, 75.92),
    "wrn_40_2": (74.92, 76.24),
    "wrn_16_4": (75.79, 76.00),
    "wrn_28_4": (75.04, 76.45),
}


def _bigger(
    known: dict[str, tuple[float | None, float | None]], small: tuple[str, ...], scale: Scale
) -> list[Cell]:
    """Teachers of different size for one student; ESKD learns from one that was stopped early."""
    build = Builder(scale)
    for pair in build.pairs(tuple(f"{teacher}_wrn_16_2" for teacher in known), small):
        kd, dkd = known.get(pair.removesuffix("_wrn_16_2"), (None, None))
        build.add(pair, "KD", "kd", kd, checked=pair in TABLE6)
        build.add(pair, "ESKD", "eskd", early=True)
        build.add(pair, "DKD", "dkd", dkd, checked=pair in TABLE6)
    return build.cells


def _table11(scale: Scale) -> list[Cell]:
    small = ("resnet56_resnet20", "wrn_40_2_resnet20", "resnet32x4_resnet20")
    return _bigger({**TABLE11}, small, scale)


def _table12(scale: Scale) -> list[Cell]:
    known = {"vgg13": (None, None), "wrn_16_4": TABLE11["wrn_16_4"], "ResNet50": (None, None)}
    return _bigger(known, ("vgg13_resnet20", "resnet56_resnet20"), scale)


def _compare(scale: Scale, pair: str, settings: list[str]) -> list[Cell]:
    build = Builder(scale)
    for chosen in build.pairs((pair,)):
        _published(build, chosen, settings)
    return build.cells


def _table13(scale: Scale) -> list[Cell]:
    return _compare(scale, "wrn_40_2_wrn_16_2", ["alone", "KD", "DKD"])


def _figure2(scale: Scale) -> list[Cell]:
    return _compare(scale, MAIN, [name for name in RECIPES if name != "alone"])


def _kd_and_dkd(scale: Scale) -> list[Cell]:
    return _compare(scale, MAIN, ["KD", "DKD"])


def _beta(scale: Scale) -> list[Cell]:
    build = Builder(scale)
    pairs = ("resnet56_resnet20", "wrn_40_2_wrn_16_2", "vgg13_vgg8", MAIN)
    for pair in build.pairs(pairs, pairs):
        _published(build, pair, ["DKD"])  # tuned
        if pair != MAIN:  # whose tuned value it is
            build.add(pair, "α 1, β 8", DKDConfig(alpha=1, beta=8))
        for beta in ("auto", "auto-sample"):
            build.add(pair, f"α 1, β {beta}", DKDConfig(alpha=1, beta=beta))
    return build.cells


EXPERIMENTS = {
    "cifar100": Experiment(
        "CIFAR-100: students alone, by KD, by DKD, and other methods on the first pair", _cifar100
    ),
    "table1": Experiment("Table 1: what the target-class and the non-target-class part do alone", _table1),
    "table2": Experiment("Table 2: what TCKD adds to NCKD under AutoAugment", _table2),
    "table3": Experiment("Table 3: what TCKD adds to NCKD under wrong training labels", _table3),
    "table4": Experiment("Table 4: what TCKD adds to NCKD on ImageNet", _table4),
    "table5": Experiment("Table 5: NCKD on the samples of which the teacher is certain or unsure", _table5),
    "ablation": Experiment("Ablation: 1 − p_t against a free weight of NCKD, β, and α", _ablation),
    "table6": Experiment("Table 6: CIFAR-100, teacher and student of one kind", _table6),
    "table7": Experiment("Table 7: CIFAR-100, teacher and student of different kinds", _table7),
    "table8": Experiment("Table 8: ImageNet, ResNet-34 → ResNet-18", _table8),
    "table9": Experiment("Table 9: ImageNet, ResNet-50 → MobileNetV1", _table9),
    "table11": Experiment("Table 11: bigger wide ResNets are not always better teachers", _table11),
    "table12": Experiment("Table 12: teachers of other kinds are not always better", _table12),
    "table13": Experiment("Table 13: the student's features on other data", _table13, "transfer"),
    "figure2": Experiment("Figure 2: time a step and extra parameters against accuracy", _figure2, "cost"),
    "figure3": Experiment("Figure 3: the student's features, by KD and by DKD", _kd_and_dkd, "features"),
    "figure4": Experiment("Figure 4: how far the logits' correlations are", _kd_and_dkd, "correlation"),
    "beta": Experiment("Adaptive β: from the teacher's logit gap, beside fixed and tuned", _beta, "gap"),
}


def get_experiment(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        UnknownNameError: no such experiment.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
