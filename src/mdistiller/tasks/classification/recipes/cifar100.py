"""CIFAR-100 as in the DKD paper and its published code, whose setting is that of CRD, ICLR 2020.

Settings and accuracies of methods and pairs are in `published/cifar100.toml`. No published settings for
CIFAR-10 are in the files, so its recipes have those of CIFAR-100.
"""

from statistics import mode

from mdistiller.data import DataConfig
from mdistiller.methods import MethodConfig
from mdistiller.models import ModelConfig
from mdistiller.recipes.apply import train_as, tune
from mdistiller.recipes.published import all_runs, default_run, run_of
from mdistiller.tasks.classification.config import ClassificationConfig

DATA = "cifar100"
PAIRS = (
    *("resnet56_resnet20", "resnet110_resnet32", "resnet32x4_resnet8x4", "wrn_40_2_wrn_16_2"),
    *("wrn_40_2_wrn_40_1", "vgg13_vgg8", "resnet32x4_ShuffleV1", "wrn_40_2_ShuffleV1", "vgg13_MobileNetV2"),
    *("ResNet50_MobileNetV2", "resnet32x4_ShuffleV2"),
)
"""Pairs of the DKD paper's tables 6 and 7."""


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher: a teacher itself, or a baseline."""
    config = ClassificationConfig(student=ModelConfig(name=model))
    return train_as(config, run_of(DATA, "none", model))


def cifar10(model: str) -> ClassificationConfig:
    """Returns the run of one model on CIFAR-10, with the settings of CIFAR-100."""
    return baseline(model).replace(data=DataConfig(kind="cifar10"))


def _beta(teacher: str, student: str) -> float:
    """Returns DKD's β: for other students the teacher's most frequent one, for other teachers 8.

    According to the paper, the best β depends on the teacher: on the gap of its target logit.
    """
    default: float = default_run(DATA, "dkd", "").fields["beta"]
    published = {run.pair: run.fields["beta"] for run in all_runs(DATA) if run.method == "dkd"}
    own = [beta for pair, beta in published.items() if pair in PAIRS and pair.startswith(f"{teacher}_")]
    return published.get(f"{teacher}_{student}", mode(own or [default]))


def tune_pair(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with its published hyperparameters for a pair; DKD's β follows `_beta`."""
    return tune(DATA, method, f"{teacher}_{student}", _beta(teacher, student))
