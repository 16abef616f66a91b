r"""DiffKD: knowledge diffusion (Huang, Zhang, Zheng, You, Wang, Qian, Xu: NeurIPS 2023, arXiv 2305.15712).

A student's feature is taken for a noisy one of the teacher's. A small diffusion model learns to denoise noisy
features of the teacher; it then denoises the student's, which is compared with the teacher's afterwards. The
gap in capacity is left to the diffusion model, and the student learns from what remains.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Example, Losses, Needs, promote
from mdistiller.methods.features import (
    FeatureConfig,
    FeatureMethod,
    TapPair,
    embedding_tap,
    pool_to_smaller,
    vector_as_map,
)
from mdistiller.methods.kd import kd_loss
from mdistiller.methods.registry import register_method
from mdistiller.models.external import tap_points
from mdistiller.taps import probe
from mdistiller.types import Batch, DataInfo, Outputs

_TIMES = 1000  # time steps of the diffusion, with variances that grow linearly


def kept_signal() -> Tensor:
    r"""Computes $\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$ of all times, with β from 1e-4 to 0.02."""
    return (1 - torch.linspace(1e-4, 0.02, _TIMES)).cumprod(0)


def _layers(*channels: int) -> nn.Sequential:
    """Builds 1x1 convolutions, each with a batch norm, and ReLUs between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.block = nn.Sequential(
            *_layers(channels, inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            *_layers(inner, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Diffusion(nn.Module):
    """Diffusion model of the teacher's features, and the layers that bring the student's to it.

    Args:
        inputs: channels of the student's feature.
        channels: channels of the teacher's feature, or of its latent.
        spatial: whether features are maps (3x3 convolutions), or logits.
        steps: number of denoising steps.
    """

    signal: Tensor

    def __init__(self, inputs: int, channels: int, *, spatial: bool, steps: int) -> None:
        super().__init__()
        c = channels
        self.align = nn.Conv2d(inputs, c, 1)
        self.time = nn.Embedding(_TIMES, c)
        if spatial:
            self.noise = nn.Sequential(_Bottleneck(c, 4), _Bottleneck(c, 4), *_layers(c, c))
            self.adapter = nn.Sequential(_Bottleneck(c, 8), nn.AdaptiveAvgPool2d(1))
        else:
            last = nn.ReLU(), nn.Conv2d(4 * c, c, 1)
            self.noise = nn.Sequential(*_layers(c, 4 * c, c), *_layers(c, 4 * c), *last)
            self.adapter = _layers(c, 2 * c, c)
        self.share = nn.Linear(c, 2)
        self.project = _layers(c, c)
        self.register_buffer("signal", kept_signal(), persistent=False)
        # The student's features start in the middle of the noise, so only the second half of twice as many
        # steps is taken.
        stride = _TIMES // (2 * steps)
        self.schedule = [(t, max(t - stride, -1)) for t in range(stride * (steps - 1), -1, -stride)]
        signal = kept_signal().tolist()
        self.kept = [(signal[t], signal[before] if before >= 0 else 1.0) for t, before in self.schedule]

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        """Predicts the noise in features [B, C, H, W] at time steps int64 [B] or [1]."""
        return self.noise(x + self.time(time)[:, :, None, None])

    def denoise(self, student: Tensor) -> Tensor:
        """Returns the student's features [B, C', H, W] aligned and denoised, [B, C, H, W]."""
        x = self.align(student)
        noise = torch.randn_like(x)
        # The same noise level for all students would be wrong: a layer finds it for each sample.
        share = self.share(self.adapter(x).flatten(1)).softmax(1)[:, 0, None, None, None]
        x = share * x + (1 - share) * noise
        for (time, _), (now, before) in zip(self.schedule, self.kept, strict=True):
            noise = self.predict(x, torch.full((1,), time, device=x.device))
            clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
            x = before**0.5 * clean + (1 - before) ** 0.5 * noise
        return self.project(x)

    def noise_loss(self, teacher: Tensor) -> Tensor:
        """Computes the squared error of the predicted noise in the teacher's features [B, C, H, W]."""
        noise = torch.randn_like(teacher)
        time = torch.randint(0, _TIMES, (len(teacher),), device=teacher.device)
        kept = self.signal[time][:, None, None, None]
        noisy = kept.sqrt() * teacher + (1 - kept).sqrt() * noise
        return F.mse_loss(promote(self.predict(noisy, time)), promote(noise))


class DiffKDConfig(FeatureConfig):
    """Hyperparameters of DiffKD; the defaults are the authors'."""

    feature_weight: float = Field(default=1.0, ge=0)
    """Weight of the squared error of features."""
    logit_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergence of class probabilities."""
    noise_weight: float = Field(default=1.0, ge=0)
    """Weight of the losses that train the diffusion models."""
    autoencoder_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss that trains the autoencoder."""
    latent_channels: int | None = Field(default=None, ge=1)
    """Channels of the teacher's latent. None: half of its channels; the authors use 1024 on ImageNet."""
    steps: int = Field(default=5, ge=1, le=_TIMES // 2)
    """Number of denoising steps."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the class probabilities."""


@register_method("diffkd")
class DiffKD(FeatureMethod[DiffKDConfig]):
    """Denoises the student's last map and logits by diffusion models of the teacher's, then compares them."""

    Config = DiffKDConfig
    card = Card(
        "Huang, Zhang, Zheng, You, Wang, Qian, Xu: Knowledge Diffusion for Distillation, NeurIPS 2023",
        "The teacher is much larger and training time is cheap: five passes of a small denoiser",
        example=Example(("last_map",), ("last_map",), 628_016, reads_logits=True),
    )
    needs = Needs()

    def __init__(self, config: DiffKDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        self.diffusions, self.encoders, self.decoders = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for s, t in zip(self.student_shapes, self.teacher_shapes, strict=True):
            latent = config.latent_channels or max(1, t[1] // 2)
            self.encoders.append(_layers(t[1], latent))
            self.decoders.append(nn.Conv2d(latent, t[1], 1))
            self.diffusions.append(Diffusion(s[1], latent, spatial=True, steps=config.steps))
        classes = [probe(model, (), data).logits.shape[1] for model in (student, teacher)]
        self.logits = Diffusion(*classes, spatial=False, steps=config.steps)

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        """Returns the last maps: `last_map`, or the last stage of a transformer."""
        first, second = (
            ("last_map",) if "last_map" in tap_points(model) else embedding_tap(model)
            for model in (student, teacher)
        )
        return first, second

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        features, noises, codes = [], [], []
        layers = zip(self.diffusions, self.encoders, self.decoders, strict=True)
        for (diffusion, encode, decode), s, t in zip(
            layers, *self.read(student, teacher, batch.image), strict=True
        ):
            assert isinstance(diffusion, Diffusion)
            s, t = pool_to_smaller(vector_as_map(s), vector_as_map(t))
            latent = encode(t)
            codes.append(F.mse_loss(promote(decode(latent)), promote(t)))
            latent = latent.detach()
            features.append(F.mse_loss(promote(diffusion.denoise(s)), promote(latent)))
            noises.append(diffusion.noise_loss(latent))
        s, t = vector_as_map(student.logits), vector_as_map(teacher.logits)
        refined = self.logits.denoise(s).flatten(1)
        noises.append(self.logits.noise_loss(t))
        return {
            "diffkd_features": c.feature_weight * torch.stack(features).sum(),
            "diffkd_logits": c.logit_weight * kd_loss(refined, teacher.logits, temperature=c.temperature),
            "diffkd_noise": c.noise_weight * torch.stack(noises).sum(),
            "diffkd_autoencoder": c.autoencoder_weight * torch.stack(codes).sum(),
        }
