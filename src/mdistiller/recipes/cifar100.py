"""CIFAR-100 as in the DKD paper and its published code (whose setting is that of CRD, ICLR 2020).

240 epochs, batch 64, SGD with momentum 0.9 and weight decay 5e-4, learning rate 0.05 (0.01 for MobileNetV2
and the ShuffleNets) divided by 10 at epochs 150, 180 and 210, temperature 4, DKD warm-up over 20 epochs.
"""

from statistics import mode

from mdistiller.config import OptimConfig
from mdistiller.methods import MethodConfig
from mdistiller.methods.dkd import DKDConfig
from mdistiller.models import ModelConfig
from mdistiller.recipes.published import HYPERPARAMETERS, scaled_beta
from mdistiller.tasks.classification.config import ClassificationConfig

PAIRS = HYPERPARAMETERS["cifar100"]
SMALL_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher: a teacher itself, or a baseline."""
    lr = 0.01 if model in SMALL_RATE else 0.05
    return ClassificationConfig(student=ModelConfig(name=model), optim=OptimConfig(lr=lr))


def _beta(teacher: str, student: str) -> float:
    """Returns DKD's β: for other students the teacher's most frequent one, for other teachers 8.

    According to the paper, the best β depends on the teacher: on the gap of its target logit.
    """
    published = {pair: methods["dkd"]["beta"] for pair, methods in PAIRS.items()}
    usual = mode([beta for pair, beta in published.items() if pair.startswith(f"{teacher}_")] or [8.0])
    return published.get(f"{teacher}_{student}", usual)


def tune(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with its published hyper-parameters for a pair; DKD's β follows `_beta`."""
    changes = PAIRS.get(f"{teacher}_{student}", {}).get(method.method_name, {})
    if not method.task_weight:  # a part of another method, which keeps the weight 0
        changes = {name: value for name, value in changes.items() if name != "task_weight"}
    if isinstance(method, DKDConfig):
        changes = changes | {"beta": scaled_beta(method, _beta(teacher, student))}
    return method.replace(**changes)
