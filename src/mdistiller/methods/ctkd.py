r"""Curriculum Temperature (CTKD; Li, Li, Yang, Zhao, Song, Luo, Li, Yang: AAAI 2023, arXiv 2211.16231).

The temperature is learned adversarially: its module gets the gradient of the distillation loss times
$-\lambda$ and so makes the student's task harder. $\lambda$ grows along a cosine:

$$T = T_\mathrm{min} + T_\mathrm{range}\,\mathrm{sigmoid}(\theta), \qquad
\lambda = \lambda_\mathrm{min} + \tfrac12 (\lambda_\mathrm{max} - \lambda_\mathrm{min})
\Big(1 - \cos \frac{\pi \min(e, E)}{E}\Big)$$
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, LogitMethod, Losses, Method, exact, promote, ramp
from mdistiller.methods.compose import Wrapper, WrapperConfig
from mdistiller.methods.registry import register_method
from mdistiller.taps import probe
from mdistiller.types import Batch, DataInfo, Outputs


class GlobalTheta(nn.Module):
    """Learned number for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return self.theta


class InstanceTheta(nn.Module):
    """Two-layer perceptron from both predictions to one number per sample.

    The classes are sorted by the teacher's probability, so θ does not depend on their names. The last layer
    starts at zero, with all samples in the middle of the range.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * classes, width)
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Returns θ [B] from logits [B, C], which get no gradient."""
        student, teacher = (promote(x.detach()).softmax(1) for x in (student_logits, teacher_logits))
        teacher, order = teacher.sort(dim=1, descending=True)
        predictions = torch.cat([teacher, student.gather(1, order)], 1).to(self.hidden.weight.dtype)
        return self.last(self.hidden(predictions).relu())[:, 0]


class CTKDConfig(WrapperConfig):
    """Hyperparameters of CTKD; the defaults are the authors' for CIFAR-100."""

    mode: Literal["global", "instance"] = "global"
    """Mode: `global`, one temperature for all samples; `instance`, one per sample from a small network."""
    temperature_min: float = Field(default=1.0, gt=0)
    """Lower end of the learned temperature."""
    temperature_range: float = Field(default=20.0, gt=0)
    """Upper end of the learned temperature less its lower end."""
    lambda_min: float = Field(default=0.0, ge=0)
    """Strength of the reversed gradient at the start of training."""
    lambda_max: float = Field(default=1.0, ge=0)
    """Strength of the reversed gradient from the end of the curriculum on."""
    curriculum: float = Field(default=10 / 240, gt=0, le=1)
    """Fraction of training over which the strength grows from `lambda_min` to `lambda_max`."""
    width: int = Field(default=256, gt=0)
    """Hidden units of the network in mode `instance`."""


@register_method("ctkd")
class CTKD(Wrapper[CTKDConfig]):
    """Applies the base method at a temperature that is learned to make the student's task harder.

    The base's own temperature has no effect.
    """

    Config = CTKDConfig
    base: LogitMethod
    card = Card(
        "Li et al.: Curriculum Temperature for Knowledge Distillation, AAAI 2023",
        "You would rather learn the temperature than choose it; wraps any logit method",
        example=Example(extra_parameters=1),
    )

    def __init__(
        self, config: CTKDConfig, base: LogitMethod, student: nn.Module, teacher: nn.Module, data: DataInfo
    ) -> None:
        super().__init__(config, base, student, teacher, data)
        changes = config.lambda_min != config.lambda_max
        self.needs = replace(self.needs, progress=self.needs.progress or changes)
        self.base_temperature: float = config.base.temperature  # type: ignore[attr-defined]
        hotter = config.base.replace(temperature=2 * self.base_temperature)
        self._check_scale(type(base)(hotter, student, teacher, data))
        if config.mode == "global":
            self.theta: nn.Module = GlobalTheta()
        else:
            classes = probe(student, (), data).logits.shape[1]
            self.theta = InstanceTheta(classes, config.width)

    @classmethod
    def check_base(cls, base: type[Method]) -> None:
        if not issubclass(base, LogitMethod) or "temperature" not in base.Config.model_fields:
            raise ConfigError(
                f"method {cls.name!r} wraps methods of logits with a temperature, such as 'kd' and 'dkd'; "
                f"{base.name!r} is none"
            )

    def _check_scale(self, hotter: LogitMethod) -> None:
        # `forward` scales the logits, which must have the effect of another temperature.
        student = torch.tensor([[3.0, 1.0, -2.0], [0.5, -1.0, 2.0]], dtype=torch.float64)
        teacher, label = student.flip(1), torch.tensor([0, 1])
        wanted = hotter.sample_losses(student, teacher, label)
        scaled = self.base.sample_losses(student / 2, teacher / 2, label)
        if not all(torch.allclose(wanted[name], 4 * scaled[name]) for name in wanted):
            raise ConfigError(
                f"method {self.name!r} learns the base's temperature; the temperature of {self.base.name!r} "
                "does not divide all logits and multiply the loss by its square"
            )

    def temperature(self, student_logits: Tensor, teacher_logits: Tensor, progress: Tensor) -> Tensor:
        """Returns the temperature, [1], or [B] in mode `instance`, with a reversed gradient."""
        c = self.config
        with exact(student_logits):
            theta = self.theta(student_logits, teacher_logits)
        done = (progress / c.curriculum).clamp(max=1.0)
        strength = c.lambda_min + (c.lambda_max - c.lambda_min) * (1 - torch.cos(math.pi * done)) / 2
        # The value is theta, and the gradient is multiplied by −strength.
        theta = theta.detach() - strength * (theta - theta.detach())
        return c.temperature_min + c.temperature_range * theta.sigmoid()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        ratio = self.temperature(student.logits, teacher.logits, progress) / self.base_temperature
        losses = self.base.sample_losses(
            promote(student.logits) / ratio[:, None], promote(teacher.logits) / ratio[:, None], batch.label
        )
        weight = ramp(progress, self.base.warmup)
        return {name: weight * (ratio.square() * value).mean() for name, value in losses.items()}
