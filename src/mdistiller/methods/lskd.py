"""Logit standardization (Sun, Ren, Li, Wang, Cao: CVPR 2024, arXiv 2403.01427).

A common temperature makes the student match the range of the teacher's logits. The z-score of each sample's
logits removes mean and scale before any logit distillation and keeps the relations between classes.
"""

import torch
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Logits, Losses, Needs, promote
from mdistiller.methods.compose import Wrapper, WrapperConfig, get_method, method_config
from mdistiller.methods.registry import register_method
from mdistiller.methods.views import PreparedMethod
from mdistiller.types import Batch, Outputs

_EPS = 1e-7


def standardize(logits: Logits) -> Logits:
    r"""Standardizes each row: $(z - \bar z) / \operatorname{std}(z)$, with the divisor $C - 1$ in std.

    The result is in at least float32. A constant row becomes zeros and gets no gradient, where a plain
    division would give NaN.

    Raises:
        ConfigError: a shape that is not [B, C], C ≥ 2.

    Source: Sun et al., CVPR 2024, algorithm 1; as in the authors' code, 1e-7 is added to the
    deviation.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ConfigError(f"logits must have the shape [B, C], C ≥ 2; got {list(logits.shape)}")
    logits = promote(logits)
    variance, mean = torch.var_mean(logits, dim=1, keepdim=True)
    constant = variance <= _EPS**2
    # The gradient of the root is infinite at 0.
    deviation = variance.masked_fill(constant, 1.0).sqrt()
    return ((logits - mean) / (_EPS + deviation)).masked_fill(constant, 0.0)


# The authors' settings for CIFAR-100: base temperature 2, weight 9.
_BASE_DEFAULTS: dict[str, dict[str, object]] = {
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
    """Settings of logit standardization, which has no hyperparameters of its own."""


@register_method("lskd")
class LSKD(Wrapper[LSKDConfig]):
    """Applies the base method to standardized logits.

    In a `PreparedMethod`, which also reads correlations or confidences, only the divergences get standardized
    logits.
    """

    Config = LSKDConfig
    card = Card(
        "Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024",
        "The student cannot match the scale of the teacher's logits; wraps any logit method",
        example=Example(),
    )
    needs = Needs(every_label=False)

    @classmethod
    def base_defaults(cls, base: str) -> dict[str, object]:
        """Returns the authors' settings for CIFAR-100, also for the base of another wrapper."""
        if issubclass(get_method(base), Wrapper):
            inner = base.partition("-")[2] or "kd"
            return {"base": method_config(inner, task_weight=0.0, **cls.base_defaults(inner))}
        return _BASE_DEFAULTS.get(base, {})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        if isinstance(self.base, PreparedMethod):
            return self.base.distillation(student.logits, teacher.logits, standardize)
        s, t = (Outputs(standardize(x.logits), x.features) for x in (student, teacher))
        return self.base(s, t, batch, progress)
