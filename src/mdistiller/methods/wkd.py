r"""Wasserstein distances for KD (WKD; Lv, Yang, Li: NeurIPS 2024, arXiv 2412.08139).

KL compares each class with itself only. A transport cost compares probabilities across classes: moving
probability to a similar class is cheap. For features, the Wasserstein distance between two Gaussians with
diagonal covariances is the distance between their means and standard deviations.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import (
    Card,
    Example,
    Losses,
    Method,
    MethodConfig,
    Needs,
    Scalar,
    exact,
    promote,
    unit,
)
from mdistiller.methods.class_means import class_shares
from mdistiller.methods.features import (
    FeatureConfig,
    FeatureMethod,
    check_channels,
    classifier,
    stages,
    sum_pairs,
)
from mdistiller.methods.fitnet import regressor
from mdistiller.methods.kd import (
    AnyLogits,
    Loss,
    Mask,
    Reduction,
    Target,
    absent_classes,
    check_target,
    reduce_samples,
    soften,
)
from mdistiller.methods.registry import register_method
from mdistiller.taps import Taps, probe
from mdistiller.types import IGNORED, Batch, DataInfo, Outputs

_EPS = 1e-8  # the authors' lower limit of costs and of Sinkhorn's divisors
_LOW = -1e30  # a logit whose probability is 0
Distances = Float[Tensor, "c c"]
"""Distances between classes [C, C], 0 on the diagonal."""


def cosine_distances(prototypes: Float[Tensor, "c d"]) -> Distances:
    """Computes 1 − cosine between vectors of the classes [C, D], such as the rows of a classifier."""
    with exact(prototypes):
        rows = unit(promote(prototypes))
        return 1 - rows @ rows.T


def cka_distances(features: Float[Tensor, "c n d"]) -> Distances:
    r"""Computes 1 − linear CKA between the features of n images of each class [C, n, D].

    $$\mathrm{CKA}_{ij} = \frac{\| \bar X_i^\top \bar X_j \|^2}{\| \bar X_i^\top \bar X_i \| \,
    \| \bar X_j^\top \bar X_j \|}$$

    with the centered n × D features of a class. The result depends on the order of the images in a class.
    Computed from the n × n products $X X^\top$ where n ≤ D, which give the same numbers in less work.

    Source: Lv et al., NeurIPS 2024, section 3.1; Kornblith et al., ICML 2019.
    """
    with exact(features):
        x = promote(features)
        x = x - x.mean(1, keepdim=True)
        if x.shape[1] <= x.shape[2]:
            return cosine_distances((x @ x.transpose(1, 2)).flatten(1))
        products = torch.stack([(own.T @ x).square().sum((1, 2)) for own in x])
        norms = products.diagonal().sqrt()
        return 1 - products / (norms[:, None] * norms)


def class_distances(teacher: nn.Module, images: Iterable[Batch], tap: str | None, classes: int) -> Distances:
    """Computes `cka_distances` between the classes of a teacher's outputs.

    Args:
        teacher: the teacher, in evaluation mode.
        images: all training images with their classes.
        tap: a feature map, each position of which counts as an image; None: the logits.
        classes: number of classes C.

    Raises:
        ConfigError: a class with fewer than two images, or a tap that is no map.
    """
    found: list[list[Tensor]] = [[] for _ in range(classes)]
    taps = Taps(teacher, [] if tap is None else [tap])
    with torch.no_grad():
        for batch in images:
            logits, features = taps(batch.image)
            values = logits if tap is None else features[tap]
            for label in batch.label.unique().tolist():
                if label >= 0:
                    found[label].append(values[batch.label == label].float().cpu())
    taps.remove()
    count = min(sum(map(len, parts)) for parts in found)
    if count < 2:
        raise ConfigError("method.distances: CKA needs two training images of each class; allowed is a file")
    x = torch.stack([torch.cat(parts)[:count] for parts in found])
    if tap is not None:
        if x.ndim != 5:
            raise ConfigError(
                f"method.distances: the teacher's {tap} is no map; allowed: cka-logits, or a file"
            )
        x = x.flatten(3).transpose(2, 3).flatten(1, 2)
    return cka_distances(x)


def transport_cost(
    student: Tensor, teacher: Tensor, present: Tensor, cost: Tensor, regularization: float, iterations: int
) -> Tensor:
    r"""Computes the transport costs $\sum_{ij} c_{ij} \pi_{ij}$ between probabilities [B, C], [B].

    The plan π is that of Sinkhorn's iterations with the kernel $\exp(-c / \eta)$. Absent classes, where
    `present` [B, C] is False, have probability 0 in both models, and so no part in the plan.
    """
    kernel = (-cost / regularization).exp()
    u = present / present.sum(1, keepdim=True, dtype=student.dtype)
    v = u
    for _ in range(iterations):
        v = teacher / (u @ kernel + _EPS)
        u = student / (v @ kernel.T + _EPS)
    return ((u @ (kernel * cost)) * v).sum(1)


def wkd_l_samples(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    distances: Tensor,
    temperature: float,
    regularization: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Computes the target's loss and the transport cost, [B] each without weights, as in `wkd_l_loss`."""
    student, teacher = soften(student_logits, teacher_logits, 1.0)
    check_target(student, target)
    classes = student.shape[1]
    if list(distances.shape) != [classes, classes]:
        raise ConfigError(
            f"distances between classes must have the shape [{classes}, {classes}]; "
            f"got {list(distances.shape)}"
        )
    share = class_shares(target, classes, student.dtype)
    chosen = target.argmax(1, keepdim=True) if target.is_floating_point() else target[:, None]
    absent = absent_classes(student, teacher)
    log_p = student.log_softmax(1).masked_fill(absent, 0.0)
    matched = -(share * teacher.softmax(1) * log_p).sum(1)
    present = (~absent).scatter(1, chosen, False)
    with exact(student):
        p, q = ((x / temperature).masked_fill(~present, _LOW).softmax(1) for x in (student, teacher))
        cost = promote(distances).to(p.dtype).clamp(min=0) + _EPS
        transport = transport_cost(p, q, present, cost, regularization, iterations)
    return matched, transport


def wkd_l_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: Target,
    distances: Distances,
    *,
    weight: float = 600.0,
    temperature: float = 8.0,
    regularization: float = 0.05,
    iterations: int = 10,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORED,
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the target's cross-entropy and the transport cost between the other classes' probabilities.

    $$\frac1B \sum_b \Big( -p^T_t \log p^S_t +
    w \sum_{i, j \ne t} c_{ij}\, \pi_{ij}(\hat p^S, \hat p^T) \Big), \quad
    \hat p = \sigma(z_{\setminus t} / T)$$

    with the probabilities p at temperature 1, and the plan π that Sinkhorn's iterations with the kernel
    $\exp(-c / \eta)$ give after a fixed number of steps. Neither part is zero where the student equals the
    teacher. The gradient goes through the iterations. Computed in $O(BC + C^2)$ memory.

    Args:
        student_logits: [..., C], C ≥ 2; B counts all leading positions.
        teacher_logits: [..., C], detached.
        target: int64 [...] class ids, or float [..., C] soft labels: the first part is then an expectation,
            and the second leaves the likeliest class out.
        distances: [C, C], the cost of moving probability from a class of the student to one of the teacher;
            negative values count as 0.
        weight: weight w of the transport cost.
        temperature: T > 0 of the transported probabilities; there is no factor T².
        regularization: η > 0, the strength of the plan's entropy.
        iterations: number of Sinkhorn's iterations.
        reduction: as in `dkd_loss`.
        ignore_index: as in `dkd_loss`.
        mask: as in `dkd_loss`.

    Raises:
        ConfigError: as `kd_loss`; a target or distances of another shape.

    Source: Lv et al., NeurIPS 2024, equations 4 to 6; equals the authors' code.
    """
    settings = distances, temperature, regularization, iterations

    def samples(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        matched, transport = wkd_l_samples(student, teacher, target, *settings)
        return matched + weight * transport

    return reduce_samples(samples, student_logits, teacher_logits, target, reduction, ignore_index, mask)


def wkd_f_loss(
    student_map: Float[Tensor, "b c _ _"],
    teacher_map: Float[Tensor, "b c _ _"],
    *,
    mean_weight: float = 4.0,
    grid: int = 1,
    eps: float = 1e-5,
) -> Scalar:
    r"""Computes squared distances between the means and the standard deviations of channels over space.

    $$\frac{1}{B G^2} \sum_b \sum_g \big( \lambda \, \| \mu^T_{bg} - \mu^S_{bg} \|^2 +
    \| \sigma^T_{bg} - \sigma^S_{bg} \|^2 \big), \quad \sigma = \sqrt{\mathrm{var} + \epsilon}$$

    over the cells g of a grid of G × G, with the divisor n − 1 in the variance of a cell of n positions, and
    variance 0 for n = 1. With λ = 1 and ε = 0, it is the squared Wasserstein distance between Gaussians with
    diagonal covariances. The two maps may differ in height and width.

    Args:
        student_map: [B, C, H, W], with the teacher's channels.
        teacher_map: [B, C, H', W'], detached.
        mean_weight: weight λ of the means.
        grid: number G of cells along each side.
        eps: ε > 0, which keeps the gradient of a constant channel finite.

    Raises:
        ConfigError: not two maps with one B and C; a grid below 1.

    Source: Lv et al., NeurIPS 2024, section 3.2; equals the authors' code.
    """
    check_channels(student_map, teacher_map)
    if grid < 1:
        raise ConfigError(f"grid must be at least 1; got {grid}")
    (mean_s, std_s), (mean_t, std_t) = (_moments(promote(x), grid, eps) for x in (student_map, teacher_map))
    squares = mean_weight * (mean_s - mean_t).square() + (std_s - std_t).square()
    return squares.sum() / (len(student_map) * grid**2)


def _moments(x: Tensor, grid: int, eps: float) -> tuple[Tensor, Tensor]:
    """Computes means and standard deviations of a map [B, C, H, W] in each cell, [B, C, G²] each.

    The cells are those of adaptive average pooling.
    """
    height, width = x.shape[2:]
    means, deviations = [], []
    for row in range(grid):
        rows = slice(row * height // grid, -(-(row + 1) * height // grid))
        for column in range(grid):
            columns = slice(column * width // grid, -(-(column + 1) * width // grid))
            cell = x[:, :, rows, columns].flatten(2)
            variance, mean = torch.var_mean(cell, dim=2, correction=int(cell.shape[2] > 1))
            means.append(mean)
            deviations.append((variance + eps).sqrt())
    return torch.stack(means, 2), torch.stack(deviations, 2)


def _decay(progress: Tensor, start: float) -> Tensor | float:
    """Returns the weight of a cosine decay: 1 up to `progress` = `start`, 0 at the end."""
    if start >= 1:
        return 1.0
    done = ((progress - start) / (1 - start)).clamp(min=0.0)
    return (1 + torch.cos(math.pi * done)) / 2


class WKDLConfig(MethodConfig):
    """Hyperparameters of WKD-L; the defaults are the authors' for resnet32x4 → resnet8x4."""

    weight: float = Field(default=600.0, ge=0)
    """Weight of the transport cost, before the decay."""
    temperature: float = Field(default=8.0, gt=0)
    """Temperature of the transported probabilities."""
    distances: Literal["cka-maps", "cka-logits"] | Path | None = None
    """Distances between classes: a file of `torch.save` with a tensor [C, C], or 1 − linear CKA of the
    teacher's last stage (each position counts) or logits over all training images, computed at the first
    step. None: 1 − cosine between the rows of the teacher's classifier."""
    sharpness: float = Field(default=1.0, ge=0)
    """κ: the cost is 1 − exp(−κ d) of a distance d; 0: the distance itself."""
    regularization: float = Field(default=0.05, gt=0)
    """Strength η of the entropy of the transport plan."""
    iterations: int = Field(default=10, ge=1)
    """Number of Sinkhorn's iterations."""
    decay_start: float = Field(default=150 / 240, ge=0, le=1)
    """Fraction of training from which the weight falls to zero along a cosine; 1: no decay."""


@register_method("wkd_l")
class WKDL(Method[WKDLConfig]):
    """Moves the student's probabilities to the teacher's at a cost that is lower between similar classes."""

    Config = WKDLConfig
    needs = Needs(labels=True)
    card = Card(
        "Lv, Yang, Li: Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation, "
        "NeurIPS 2024",
        "Some classes are close relatives: confusing them costs less",
        example=Example(),
    )
    distances: Tensor | None

    def __init__(self, config: WKDLConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        self.needs = replace(self.needs, progress=config.decay_start < 1 and config.weight > 0)
        # In a tuple the models are no submodules of the method.
        self._classifier: tuple[nn.Linear, ...] = ()
        self._pending: tuple[nn.Module, Callable[[], Iterable[Batch]]] | None = None
        distances = None
        if isinstance(config.distances, str):
            if data.images is None:
                raise ConfigError(
                    f"method.distances: got {config.distances!r}, which reads the training images through "
                    "mdistiller.train; allowed in your own loop: a file, or None"
                )
            self._pending = teacher, data.images
            distances = torch.zeros(2 * (probe(teacher, (), data).logits.shape[1],))
        elif config.distances is not None:
            distances = _read_distances(config.distances)
        else:
            self._classifier = (classifier(teacher),)
        # A file is read again when a run resumes.
        self.register_buffer("distances", distances, persistent=self._pending is not None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _compute_distances(self) -> None:
        """Computes the distances, unless a resumed run has restored them."""
        assert self._pending is not None
        assert self.distances is not None
        teacher, images = self._pending
        if not self.distances.any():
            tap = stages(teacher)[-1] if self.config.distances == "cka-maps" else None
            self.distances.copy_(class_distances(teacher, images(), tap, len(self.distances)))
        self._pending = None

    def costs(self) -> Tensor:
        """Returns the cost between the classes, [C, C], without gradient."""
        distances = self.distances
        if distances is None:
            distances = cosine_distances(promote(self._classifier[0].weight.detach()))
        sharpness = self.config.sharpness
        return -torch.expm1(-sharpness * distances) if sharpness else distances

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        if self._pending is not None:
            self._compute_distances()
        settings = self.costs(), c.temperature, c.regularization, c.iterations
        matched, transport = wkd_l_samples(student.logits, teacher.logits, batch.label, *settings)
        weight = c.weight * _decay(progress, c.decay_start)
        return {"wkd_target": matched.mean(), "wkd_transport": weight * transport.mean()}


def _read_distances(path: Path) -> Tensor:
    problem = "no such file"
    if path.is_file():
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if isinstance(found, Tensor) and found.ndim == 2 and found.shape[0] == found.shape[1]:
                return found.float()
            problem = f"it has {list(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
    raise ConfigError(f"method.distances: got {path}; allowed is a tensor [C, C] of torch.save: {problem}")


class WKDFConfig(FeatureConfig):
    """Hyperparameters of WKD-F; the defaults are the authors' for resnet32x4 → resnet8x4."""

    weight: float = Field(default=0.08, ge=0)  # no `auto`: it is measured at the end of the decay
    """Weight of the loss, before the decay."""
    mean_weight: float = Field(default=4.0, ge=0)
    """Weight of the means; standard deviations have 1."""
    grid: int = Field(default=1, ge=1)
    """Number of cells along each side of a map, each with its own Gaussian."""
    bottleneck: int = Field(default=0, ge=0)
    """Inner channels of a projector of three convolutions; 0: one convolution."""
    decay_start: float = Field(default=150 / 240, ge=0, le=1)
    """Fraction of training from which the weight falls to zero along a cosine; 1: no decay."""


@register_method("wkd_f")
class WKDF(FeatureMethod[WKDFConfig]):
    """Matches means and standard deviations of the channels, the Gaussians of a feature map."""

    Config = WKDFConfig
    card = Card(
        WKDL.card.paper,
        "Positions do not correspond: matches channel statistics",
        example=Example(("stage3",), ("stage3",), 66_304),
    )
    taps_by_default = "last stage"

    def __init__(self, config: WKDFConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        self.needs = replace(self.needs, progress=config.decay_start < 1 and config.weight > 0)
        shapes = zip(self.student_shapes, self.teacher_shapes, strict=True)
        self.projectors = nn.ModuleList(_projector(s, t, config.bottleneck) for s, t in shapes)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config

        def loss(project: nn.Module, s: Tensor, t: Tensor) -> Tensor:
            return wkd_f_loss(promote(project(s)), t, mean_weight=c.mean_weight, grid=c.grid)

        weight = self.weight * _decay(progress, c.decay_start)
        return {"wkd_f": weight * sum_pairs(loss, self.projectors, *self.read(student, teacher, batch.image))}


def _projector(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], inner: int) -> nn.Module:
    """Builds layers that give a student's map the teacher's channels; a bottleneck keeps the size."""
    if not inner or len(student_shape) != 4 or len(teacher_shape) != 4:
        return regressor(student_shape, teacher_shape, relu=True)
    channels = teacher_shape[1]
    return nn.Sequential(
        nn.Conv2d(student_shape[1], inner, 1),
        nn.Conv2d(inner, inner, 3, padding=1),
        nn.Conv2d(inner, channels, 1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
