"""Experiments of the paper: pairs × settings, with the published accuracies, as grids of cells.

Accuracies are from Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, unless stated otherwise. Those
with `checked` were read there or in the authors' README; the others were noted from memory, and tables mark
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from mdistiller.errors import UnknownNameError
from mdistiller.methods import MethodConfig, get_method, list_methods
from mdistiller.methods.dkd import DKDConfig
from mdistiller.methods.kd import KDConfig
from mdistiller.recipes.cells import Builder, Cell, Family, Scale

# Each part at weight 1. KD is TCKD + (1 - p_t) NCKD, with p_t the teacher's confidence.
TCKD, NCKD = DKDConfig(alpha=1.0, beta=0.0), DKDConfig(alpha=0.0, beta=1.0)
BOTH = DKDConfig(alpha=1.0, beta=1.0)
KD_FULL = KDConfig(task_weight=1.0, weight=1.0)

# Settings that are recipes, by their names in tables.
RECIPES = {
    "baseline": "none",
    "KD": "kd",
    "FitNet": "fitnet",
    "RKD": "rkd",
    "CRD": "crd",
    "OFD": "ofd",
    "ReviewKD": "reviewkd",
    "DKD": "dkd",
}
MAIN = "resnet32x4_resnet8x4"


def _columns(table: dict[str, tuple[float | None, ...]]) -> dict[str, dict[str, float | None]]:
    return {pair: dict(zip(RECIPES, values, strict=True)) for pair, values in table.items()}


# Tables 6 and 7 by pair, in the order of RECIPES. KD and DKD are checked.
TABLE6 = _columns(
    {
        "resnet56_resnet20": (69.06, 70.66, 69.21, 69.61, 71.16, 70.98, 71.89, 71.97),
        "resnet110_resnet32": (71.14, 73.08, 71.06, 71.82, 73.48, 73.23, 73.89, 74.11),
        MAIN: (72.50, 73.33, 73.50, 71.90, 75.51, 74.95, 75.63, 76.32),
        "wrn_40_2_wrn_16_2": (73.26, 74.92, 73.58, 73.35, 75.48, 75.24, 76.12, 76.24),
        "wrn_40_2_wrn_40_1": (71.98, 73.54, 72.24, 72.22, 74.14, 74.33, 75.09, 74.81),
        "vgg13_vgg8": (70.36, 72.98, 71.02, 71.48, 73.94, 73.95, 74.84, 74.68),
    }
)
TABLE7 = _columns(
    {
        "resnet32x4_ShuffleV1": (70.50, 74.07, None, 72.28, 75.11, 75.98, 77.45, 76.45),
        "wrn_40_2_ShuffleV1": (70.50, 74.83, None, 72.21, 76.05, 75.85, 77.14, 76.70),
        "vgg13_MobileNetV2": (64.60, 67.37, None, 64.52, 69.73, 69.48, 70.37, 69.71),
        "ResNet50_MobileNetV2": (64.60, 67.35, None, 64.43, 69.11, 69.04, 69.89, 70.35),
        "resnet32x4_ShuffleV2": (71.82, 74.45, None, 73.21, 75.65, 76.82, 77.78, 77.07),
    }
)


class Experiment(NamedTuple):
    """Table or figure of the paper.

    title: its subject.
    fill: adds its cells to a builder.
    extra: name of a measurement on the finished runs besides accuracy; may be empty.
    family: the recipes' data at the paper's scale.
    """

    title: str
    fill: Callable[[Builder], None]
    extra: str = ""
    family: Family = "cifar100"

    def cells(self, scale: Scale) -> list[Cell]:
        """Builds the cells at a scale."""
        build = Builder(scale, self.family)
        self.fill(build)
        return build.cells


def _add_recipes(build: Builder, pair: str, settings: Iterable[str]) -> None:
    known = (TABLE6 | TABLE7).get(pair, {})
    for name in settings:
        build.add(pair, name, RECIPES[name], known.get(name), checked=name in ("KD", "DKD"))


def _recipes(pair: str, *settings: str) -> Callable[[Builder], None]:
    """Returns the cells of some recipes for one pair."""

    def fill(build: Builder) -> None:
        for chosen in build.pairs(pair):
            _add_recipes(build, chosen, settings)

    return fill


def _cifar100(build: Builder) -> None:
    # ReviewKD, CRD, DIST and LSKD as published by their authors or in the paper.
    more: dict[str, tuple[str | MethodConfig, float]] = {
        "TCKD alone": (TCKD, 68.63),
        "NCKD alone": (NCKD, 74.26),
        "ReviewKD": ("reviewkd", 75.63),
        "CRD": ("crd", 75.51),
        "DIST": ("dist", 76.31),
        "LSKD+DKD": ("lskd-dkd", 77.01),
    }
    for pair in build.pairs(
        *(MAIN, "wrn_40_2_wrn_16_2", "wrn_40_2_ShuffleV1", "vgg13_vgg8"),
        *("vgg13_MobileNetV2", "resnet56_resnet20", "resnet32x4_ShuffleV2"),
    ):
        _add_recipes(build, pair, ["baseline", "KD", "DKD"])
        for setting, (method, top1) in more.items() if pair == MAIN or build.scale != "paper" else ():
            build.add(pair, setting, method, top1)


def _table1(build: Builder) -> None:
    settings: tuple[tuple[str, str | MethodConfig, float], ...] = (
        ("baseline", "none", 72.50),
        ("KD (TCKD + NCKD)", KD_FULL, 73.63),
        ("TCKD alone", TCKD, 68.63),
        ("NCKD alone", NCKD, 74.26),
    )
    for pair in build.pairs(MAIN, "resnet32x4_ShuffleV1", "wrn_40_2_wrn_16_2", "wrn_40_2_ShuffleV1"):
        for setting, method, top1 in settings:
            build.add(pair, setting, method, top1 if pair == MAIN else None)


def _table2(build: Builder) -> None:
    known = {MAIN: (73.82, 75.33), "resnet32x4_ShuffleV1": (77.13, 77.98)}
    for pair in build.pairs(*known):
        nckd, both = known.get(pair, (None, None))
        build.add(pair, "AutoAugment: NCKD alone", NCKD, nckd, policy="autoaugment")
        build.add(pair, "AutoAugment: TCKD + NCKD", BOTH, both, policy="autoaugment")


def _table3(build: Builder) -> None:
    for pair in build.pairs(MAIN):
        for noise in (0.1, 0.2, 0.3):
            build.add(pair, f"noise {noise}: NCKD alone", NCKD, noise=noise)
            build.add(pair, f"noise {noise}: TCKD + NCKD", BOTH, noise=noise)


R34_R18, R50_MOBILENET = "resnet34_resnet18", "resnet50_mobilenetv1"


def _table4(build: Builder) -> None:
    for pair in build.pairs(R34_R18):
        for setting, alpha, top1 in (("NCKD alone", 0.0, 70.71), ("TCKD + NCKD", 1.0, 71.03)):
            method = DKDConfig(alpha=alpha, beta=1.0, temperature=1.0, warmup=1 / 100)
            build.add(pair, f"T 1: {setting}", method, top1)


def _table5(build: Builder) -> None:
    for pair in build.pairs(MAIN):
        build.add(pair, "NCKD alone", NCKD, 74.26)
        for half in ("confident", "unsure"):
            build.add(pair, f"NCKD on the {half} half", NCKD.replace(nckd_samples=half))


def _ablation(build: Builder) -> None:
    of_beta = {1: 74.79, 2: 75.44, 4: 75.94, 8: 76.32, 10: 76.18}
    of_alpha = {0: 75.30, 0.2: 75.64, 0.5: 76.12, 2: 76.11, 4: 75.42}
    for pair in build.pairs(MAIN):
        build.add(pair, "KD (TCKD + NCKD)", KD_FULL, 73.63, checked=True)
        for beta, top1 in of_beta.items():
            build.add(pair, f"α 1, β {beta}", DKDConfig(alpha=1, beta=beta), top1, checked=beta in (1, 8))
        for alpha, top1 in of_alpha.items():
            build.add(pair, f"α {alpha}, β 8", DKDConfig(alpha=alpha, beta=8), top1)


def _every_method(pairs: Iterable[str]) -> Callable[[Builder], None]:
    """Returns the cells of the paper's table and of every other method of this package."""

    def fill(build: Builder) -> None:
        for pair in build.pairs(*pairs):
            _add_recipes(build, pair, RECIPES)
            for name in list_methods():
                if name not in RECIPES.values() and get_method(name).needs_teacher:
                    build.add(pair, name, name)

    return fill


def _imagenet(pair: str, baseline: float, kd: float, dkd: float) -> Callable[[Builder], None]:
    def fill(build: Builder) -> None:
        for chosen in build.pairs(pair):
            for setting, top1 in (("baseline", baseline), ("KD", kd), ("DKD", dkd)):
                build.add(chosen, setting, RECIPES[setting], top1, checked=setting != "baseline")

    return fill


# Teachers of wrn_16_2, the smallest first, with the accuracies of KD and DKD.
TABLE11 = {
    "wrn_28_2": (75.37, 75.92),
    "wrn_40_2": (74.92, 76.24),
    "wrn_16_4": (75.79, 76.00),
    "wrn_28_4": (75.04, 76.45),
}


def _teachers(teachers: Iterable[str], *small: str) -> Callable[[Builder], None]:
    """Returns the cells of several teachers for one student; ESKD's teacher was stopped early."""

    def fill(build: Builder) -> None:
        for pair in build.pairs(*(f"{teacher}_wrn_16_2" for teacher in teachers), small=small):
            kd, dkd = TABLE11.get(pair.removesuffix("_wrn_16_2"), (None, None))
            build.add(pair, "KD", "kd", kd, checked=pair in TABLE6)
            build.add(pair, "ESKD", "eskd", early=True)
            build.add(pair, "DKD", "dkd", dkd, checked=pair in TABLE6)

    return fill


def _beta(build: Builder) -> None:
    pairs = ("resnet56_resnet20", "wrn_40_2_wrn_16_2", "vgg13_vgg8", MAIN)
    for pair in build.pairs(*pairs, small=pairs):
        _add_recipes(build, pair, ["DKD"])  # with the tuned β
        for beta in ("auto", "auto-sample") if pair == MAIN else (8, "auto", "auto-sample"):
            # For MAIN, the tuned β is 8.
            build.add(pair, f"α 1, β {beta}", DKDConfig(alpha=1, beta=beta))


EXPERIMENTS = {
    "cifar100": Experiment("CIFAR-100: baselines, KD, DKD, and other methods on the first pair", _cifar100),
    "table1": Experiment("Table 1: effect of the target-class and the non-target-class part alone", _table1),
    "table2": Experiment("Table 2: gain of TCKD over NCKD under AutoAugment", _table2),
    "table3": Experiment("Table 3: gain of TCKD over NCKD under wrong training labels", _table3),
    "table4": Experiment("Table 4: gain of TCKD over NCKD on ImageNet", _table4, family="imagenet"),
    "table5": Experiment("Table 5: NCKD on samples for which the teacher is certain or unsure", _table5),
    "ablation": Experiment("Ablation: 1 − p_t against a free weight of NCKD, β, and α", _ablation),
    "table6": Experiment("Table 6: CIFAR-100, similar architectures", _every_method(TABLE6)),
    "table7": Experiment("Table 7: CIFAR-100, different architectures", _every_method(TABLE7)),
    "table8": Experiment(
        "Table 8: ImageNet, ResNet-34 → ResNet-18", _imagenet(R34_R18, 69.75, 71.03, 71.70), family="imagenet"
    ),
    "table9": Experiment(
        "Table 9: ImageNet, ResNet-50 → MobileNetV1",
        _imagenet(R50_MOBILENET, 68.87, 70.50, 72.05),
        family="imagenet",
    ),
    "table11": Experiment(
        "Table 11: bigger wide ResNets are not always better teachers",
        _teachers(TABLE11, "resnet56_resnet20", "wrn_40_2_resnet20", "resnet32x4_resnet20"),
    ),
    "table12": Experiment(
        "Table 12: teachers of other architectures are not always better",
        _teachers(("vgg13", "wrn_16_4", "ResNet50"), "vgg13_resnet20", "resnet56_resnet20"),
    ),
    "table13": Experiment(
        "Table 13: the student's features on other data",
        _recipes("wrn_40_2_wrn_16_2", "baseline", "KD", "DKD"),
        "transfer",
    ),
    "figure2": Experiment(
        "Figure 2: time of a step and extra parameters against accuracy",
        _recipes(MAIN, *(name for name in RECIPES if name != "baseline")),
        "cost",
    ),
    "figure3": Experiment(
        "Figure 3: the student's features after KD and after DKD", _recipes(MAIN, "KD", "DKD"), "features"
    ),
    "figure4": Experiment(
        "Figure 4: difference between the logits' correlations", _recipes(MAIN, "KD", "DKD"), "correlation"
    ),
    "beta": Experiment("Adaptive β: from the teacher's logit gap, beside fixed and tuned β", _beta, "gap"),
}


def get_experiment(name: str) -> Experiment:
    """Returns an experiment.

    Raises:
        UnknownNameError: no such experiment.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
