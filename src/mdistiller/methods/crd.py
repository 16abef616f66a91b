"""Contrastive Representation Distillation (Tian, Krishnan, Isola: ICLR 2020, arXiv 1910.10699)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, Needs, Scalar, exact, promote, unit
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Weight
from mdistiller.methods.gather import gather
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def crd_loss(positive: Float[Tensor, " b"], negatives: Float[Tensor, "b k"], *, num_data: int) -> Scalar:
    r"""Computes noise-contrastive estimation of the true partner of an embedding among K drawn ones.

    $$-\frac1B \sum_b \Big(\log h(s_b) + \sum_k \log\big(1 - h(s_{bk})\big)\Big), \quad
    h(s) = \frac{e^s}{e^s + K/N}$$

    Args:
        positive: [B], scores of the true partners: cosine over temperature, less the logarithm of the
            normalization constant.
        negatives: [B, K], scores of the drawn embeddings.
        num_data: N, the number of embeddings from which the negatives are drawn.

    Returns:
        The loss in nats.

    Raises:
        ConfigError: scores that are not [B] and [B, K] with K ≥ 1, or `num_data` below 1.

    Source: Tian et al., ICLR 2020, equations 10 and 19 (there M is the size of the data, N the number of
    negatives).
    """
    if negatives.ndim != 2 or positive.shape != negatives.shape[:1] or negatives.shape[1] < 1 or num_data < 1:
        raise ConfigError(
            "positive and negative scores must be [B] and [B, K], K ≥ 1, of num_data ≥ 1; "
            f"got {list(positive.shape)}, {list(negatives.shape)} and {num_data}"
        )
    noise = math.log(negatives.shape[1] / num_data)
    positive, negatives = promote(positive), promote(negatives)
    return -(F.logsigmoid(positive - noise) + F.logsigmoid(noise - negatives).sum(1)).mean()


class CRDConfig(FeatureConfig):
    """Hyperparameters of CRD; the defaults are those of the authors' code for CIFAR-100."""

    weight: Weight = 0.8
    """Weight of the CRD loss."""
    feature_dim: int = Field(default=128, ge=1)
    """Size of the common embedding."""
    negatives: int = Field(default=16384, ge=1)
    """Number of negatives per sample."""
    temperature: float = Field(default=0.07, gt=0)
    """Divisor of the cosines."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Share of the old embedding when a sample updates the memory."""
    mode: Literal["exact", "relaxed"] = "exact"
    """Positive of a sample: the sample itself (`exact`) or one drawn from its class (`relaxed`)."""


@register_method("crd")
class CRD(FeatureMethod[CRDConfig]):
    """Contrasts the embedding of an image with the other model's embeddings of images of other classes.

    A memory holds both embeddings of every training image. Negatives and positives depend only on a seed, the
    number of steps and the sample's index: they are the same on any number of processes, in any order of the
    batch, compiled or not.
    """

    Config = CRDConfig
    sequences = True
    card = Card(
        "Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020",
        "You want embeddings that transfer, and a memory bank of all training images fits",
        example=Example(("pooled",), ("pooled",), 65_792),
    )
    needs = Needs(labels=True, index=True, logits=False)
    taps_by_default = "pooled"

    # State, which is saved.
    student_memory: Tensor
    teacher_memory: Tensor
    log_z: Tensor
    seed: Tensor
    step: Tensor
    # Tables of the data: the class of each image, the images sorted by class, the start of each class in
    # that order, and its size.
    classes: Tensor
    by_class: Tensor
    starts: Tensor
    sizes: Tensor

    def __init__(self, config: CRDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        if len(self.student_taps) != 1:
            raise ConfigError(f"method 'crd' compares one pair of features; got {list(self.student_taps)}")
        if data.labels is None:
            raise ConfigError(
                "method 'crd' draws its negatives from other classes and needs the class of every training "
                "image: labels=..., int64 [N]"
            )
        classes, sizes = data.labels.cpu().unique(return_inverse=True, return_counts=True)[1:]
        if len(sizes) < 2:
            raise ConfigError("method 'crd' draws negatives from other classes; all labels are of one class")
        self.num_data = len(classes)
        self.replace = config.negatives > self.num_data - int(sizes.max())

        dim = config.feature_dim
        self.student_embed = nn.Linear(self.student_shapes[0][1], dim)
        self.teacher_embed = nn.Linear(self.teacher_shapes[0][1], dim)
        # Vectors of norm 1 on average, like those that will replace them.
        bound = math.sqrt(3 / dim)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(self.num_data, dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("by_class", classes.argsort(stable=True), persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("sizes", sizes, persistent=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        """Returns `{"crd": …}`; in training, it then updates the memory with the batch's embeddings."""
        (s,), (t,) = self.embeddings(student, teacher)
        with exact(s):
            s, t = _embed(self.student_embed, s), _embed(self.teacher_embed, t)
            # Each embedding is compared with the memory of the other model.
            pairs = (s, self.teacher_memory), (t, self.student_memory)
            with torch.no_grad():
                chosen = self.draw(batch.index)
                scores = [(x @ memory.T).gather(1, chosen) / self.config.temperature for x, memory in pairs]
                log_z = self._log_constants(scores)
            losses = [
                self._loss(x, memory, chosen, score - constant)
                for (x, memory), score, constant in zip(pairs, scores, log_z, strict=True)
            ]
            if self.training:
                self._remember(s, t, batch.index, log_z)
        return {"crd": self.weight * (losses[0] + losses[1])}

    def draw(self, index: Tensor) -> Tensor:
        """Draws the positive and the K negatives of each sample for the next pass, [B, 1 + K].

        The negatives are uniform over the images of other classes and all different, or drawn with
        replacement if some class leaves fewer than K images.
        """
        own = self.classes[index]
        start, size = self.starts[own][:, None], self.sizes[own][:, None]
        key = _hash(_hash(self.seed + self.step) ^ index)[:, None]
        count = self.config.negatives if self.replace else self.num_data
        # Column 0 is for the positive.
        noise = _hash(key + torch.arange(count + 1, device=index.device))
        positive = index[:, None]
        if self.config.mode == "relaxed":
            positive = self.by_class[start + noise[:, :1] % size]
        noise = noise[:, 1:]
        if self.replace:
            # The images of all other classes follow the class in `by_class`, cyclically.
            position = (start + size + noise % (self.num_data - size)) % self.num_data
            return torch.cat([positive, self.by_class[position]], 1)
        noise = noise.masked_fill(own[:, None] == self.classes, 2**32)
        negatives = noise.topk(self.config.negatives, largest=False, sorted=False).indices
        return torch.cat([positive, negatives], 1)

    def _loss(self, x: Tensor, memory: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """Computes the loss of embeddings `x` [B, D] from their scores [B, 1 + K] with the memory's rows.

        The gradient is computed here, because memory, step and constants change before the backward pass, and
        a compiled backward pass may recompute values from the changed ones (pytorch/pytorch#197039).
        """
        with torch.no_grad():
            value = crd_loss(scores[:, 0], scores[:, 1:], num_data=self.num_data)
            noise = math.log(self.config.negatives / self.num_data)
            slopes = torch.cat([-(noise - scores[:, :1]).sigmoid(), (scores[:, 1:] - noise).sigmoid()], 1)
            # All N products cost less than gathering K vectors per sample, here and in `forward`.
            spread = slopes.new_zeros(len(x), self.num_data).scatter_add(1, chosen, slopes)
            gradient = spread @ memory / (self.config.temperature * len(x))
        return value + ((x - x.detach()) * gradient).sum()

    @torch.no_grad()
    def _log_constants(self, scores: list[Tensor]) -> Tensor:
        """Returns the logarithms of both normalization constants, [2], which the first batch determines."""
        first = torch.stack([x.logsumexp((0, 1)) - math.log(x.numel() / self.num_data) for x in scores])
        of_all = gather(first[None])
        first = of_all.logsumexp(0) - math.log(len(of_all))
        return torch.where(self.step == 0, first, self.log_z)

    @torch.no_grad()
    def _remember(self, student: Tensor, teacher: Tensor, index: Tensor, log_z: Tensor) -> None:
        index = gather(index)
        # If a sampler gives a sample twice, its first embedding counts, on every process and device.
        first = (index[:, None] == index).int().argmax(1)
        for memory, new in ((self.student_memory, student), (self.teacher_memory, teacher)):
            mixed = self.config.momentum * memory[index] + (1 - self.config.momentum) * gather(new)
            memory.index_copy_(0, index, unit(mixed)[first])
        self.log_z.copy_(log_z)
        self.step.add_(1)


def _embed(layer: nn.Module, feature: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return unit(promote(layer(feature.to(layer.weight.dtype))))


def _hash(x: Tensor) -> Tensor:
    """Hashes the lower 32 bits of integers ≥ 0 to 32 random-looking bits.

    A generator of torch cannot give a sample the same numbers on every process.
    """
    for _ in range(2):
        x = (x ^ (x >> 16)) & 0xFFFFFFFF
        x = (x * 0x45D9F3B) & 0xFFFFFFFF  # a factor below 2³¹: int64 does not overflow
    return x ^ (x >> 16)
