r"""Logit standardisation (Sun, Ren, Li, Wang, Cao: CVPR 2024, arXiv 2403.01427).

One temperature for student and teacher asks the student for the teacher's range of logits, too. The z-score
of each sample's logits,

$$\mathcal{Z}(z) = \frac{z - \bar z}{\operatorname{std}(z)},$$

takes mean and scale away before any logit distillation, and leaves the relations between classes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Method, promote
from mdistiller.methods.compose import Wrapper, WrapperConfig
from mdistiller.methods.crld import CRLD
from mdistiller.methods.mlkd import MLKD
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs

_EPS = 1e-7


def standardise(logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    r"""Each row less its mean, over its standard deviation (with the divisor $C - 1$).

    A constant row has no shape: it becomes zeros and gets no gradient, where a plain division gives NaN.

    Args:
        logits: [B, C], C ≥ 2.

    Returns:
        [B, C], at least float32.

    Raises:
        ConfigError: another shape.

    Source: Sun et al., CVPR 2024, algorithm 1; as the authors' code, this adds 1e-7 to the deviation.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ConfigError(f"logits must have the shape [B, C], C ≥ 2; got {list(logits.shape)}")
    logits = promote(logits)
    variance, mean = torch.var_mean(logits, dim=1, keepdim=True)
    constant = variance <= _EPS**2
    # The root's gradient is infinite at 0, hence a stand-in there.
    deviation = variance.masked_fill(constant, 1.0).sqrt()
    return ((logits - mean) / (_EPS + deviation)).masked_fill(constant, 0.0)


# The authors' settings for CIFAR-100: base temperature 2, weight 9.
_BASE_DEFAULTS: dict[str, dict[str, Any]] = {
    "kd": {"temperature": 2.0, "weight": 9.0},
    "dkd": {"temperature": 2.0, "alpha": 9.0, "beta": 72.0},
    "mlkd": {
        "temperatures": (2.0, 3.0, 5.0, 2.0, 6.0),
        "strong_temperatures": (2.0, 3.0, 5.0),
        "repeated_temperatures": (2.0, 6.0),
        "weight": 9.0,
    },
}


class LSKDConfig(WrapperConfig):
    """Logit standardisation has no hyper-parameters of its own."""


@register_method("lskd")
class LSKD(Wrapper):
    """The base method on standardised logits; the task's loss is of the student's own logits.

    MLKD and CRLD also look at correlations or at confidences: there the divergences alone see standardised
    logits.
    """

    Config = LSKDConfig
    config: LSKDConfig
    paper = "Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024"
    year = 2024

    @classmethod
    def base_defaults(cls, base: type[Method]) -> dict[str, Any]:
        """The authors' settings of kd, dkd and mlkd, also inside of another wrapper."""
        if issubclass(base, Wrapper) and base.Base is not None:
            inner = base.Base.Config(task_weight=0.0, **cls.base_defaults(base.Base))
            return {"base": inner}
        return _BASE_DEFAULTS.get(base.name, {})

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """The task's loss, and the base's of standardised logits."""
        if isinstance(self.base, MLKD | CRLD):
            losses = self.base.distillation(student.logits, teacher.logits, standardise)
        else:
            losses = self.base_losses(
                Outputs(standardise(student.logits), student.features),
                Outputs(standardise(teacher.logits), teacher.features),
                batch,
                progress,
            )
        return {"task": self.task_loss(student, batch), **losses}
