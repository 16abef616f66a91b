r"""Global and patch tokens of a foundation model (AM-RADIO, CVPR 2024, arXiv 2312.06709; PHI-S, 2410.01680).

A head maps the student's embedding and the positions of its last map to the teacher's width, without labels
and classes. PHI-S standardizes the teacher's features first, with one scale for all dimensions.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, Scalar, promote
from mdistiller.methods.features import FeatureConfig, FeatureMethod, stages, to_map
from mdistiller.methods.registry import register_method
from mdistiller.models.layouts import layout_of
from mdistiller.models.own_input import without_own_input
from mdistiller.taps import Taps, resolve
from mdistiller.types import Batch, DataInfo, Outputs

Distance = Literal["cosine", "l1", "smooth_l1", "l2"]
_DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean(),
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "l2": F.mse_loss,
}
_IMAGES = 4096  # from which PHI-S estimates mean and covariance


def tokens_loss(
    student_tokens: Float[Tensor, "b *n d"],
    teacher_tokens: Float[Tensor, "b *n d"],
    *,
    distance: Distance = "cosine",
) -> Scalar:
    r"""Computes the mean distance between vectors: $1 - \cos(s, t)$, or a mean over the dimensions.

    l1: $|s - t|$. l2: $(s - t)^2$. smooth_l1: $(s - t)^2 / 2$ below 1, $|s - t| - 1/2$ above.

    Args:
        student_tokens: [B, D] or [B, N, D], mapped to the teacher's width.
        teacher_tokens: the same shape, detached.
        distance: cosine, l1, smooth_l1 or l2.

    Raises:
        ConfigError: other shapes, or an unknown distance.

    Source: Ranzinger et al., CVPR 2024, section 3.4, whose patch loss is 0.9 cosine + 0.1 smooth_l1.
    """
    if student_tokens.shape != teacher_tokens.shape or student_tokens.ndim not in (2, 3):
        raise ConfigError(
            "student and teacher tokens must have one shape [B, D] or [B, N, D]; "
            f"got {list(student_tokens.shape)} and {list(teacher_tokens.shape)}"
        )
    if distance not in _DISTANCES:
        raise ConfigError(f"distance: got {distance!r}; allowed: {', '.join(_DISTANCES)}")
    return _DISTANCES[distance](promote(student_tokens), promote(teacher_tokens))


def hadamard(order: int) -> Tensor | None:
    """Returns a Hadamard matrix, float64 [order, order] of ±1, by the rules of Sylvester and Paley.

    None where they give none: orders above 2 that are no multiple of 4, and a few others.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 2 == 0 and (half := hadamard(order // 2)) is not None:
        return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    q = order - 1
    if order % 4 or any(q % d == 0 for d in range(2, int(q**0.5) + 1)):
        return None
    squares = {i * i % q for i in range(1, q)}
    signs = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)])
    core = torch.ones(order, order, dtype=torch.float64)
    core[1:, 0], core[1:, 1:] = -1, signs[(torch.arange(q)[:, None] - torch.arange(q)) % q]
    return core.fill_diagonal_(1)


def phi_s(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    r"""Returns the matrix $\phi H U^\top$ of PHI-S, float64, which gives centered features variance 1.

    $U \Lambda U^\top$ is the covariance, $H$ a normalized Hadamard matrix, and $\phi^{-2}$ the mean of
    $\Lambda$: a rotation and one scale.

    Raises:
        ConfigError: no Hadamard matrix of this order is known here, or the features are constant.

    Source: Ranzinger et al., PHI-S, arXiv 2410.01680, section 3.
    """
    width = len(covariance)
    matrix = hadamard(width)
    values, vectors = torch.linalg.eigh(covariance.double().cpu())
    mean = values.clamp(min=0).mean()
    if matrix is None or not mean > 0:
        why = f"have {width} dimensions, without a known Hadamard matrix" if mean > 0 else "are constant"
        raise ConfigError(f"standardize: the teacher's features {why}; allowed: false, with any distance")
    return matrix @ vectors.T / (width * mean).sqrt()


class TokensConfig(FeatureConfig):
    """Settings of the token losses."""

    global_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss between embeddings, and between taps that are vectors."""
    patch_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss between taps that are maps or tokens, whose grid becomes the teacher's."""
    global_loss: dict[Distance, float] = Field(default={"cosine": 1.0})
    """Distances between embeddings, with weights: cosine, l1, smooth_l1, l2. On the command line, name and
    weight in turn."""
    patch_loss: dict[Distance, float] = Field(default={"cosine": 1.0})
    """Distances between patches, with weights. RADIO: cosine 0.9 smooth_l1 0.1."""
    standardize: bool = False
    """Standardize the teacher's features by PHI-S, from up to 4,096 training images, before the first step;
    with l2 as the distance."""
    head: Literal["linear", "mlp"] = "linear"
    """Layers from the student's width to the teacher's. `mlp`: two, with GELU in between."""


class PhiS(nn.Module):
    """Standardization of vectors [..., D] by PHI-S: mean and matrix, zeros until `fit`."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.zeros(width, width))

    def fit(self, vectors: Iterable[Tensor]) -> None:
        """Sets mean and matrix from batches of vectors [N, D]."""
        count, total = 0, torch.zeros_like(self.mean, dtype=torch.float64)
        products = torch.zeros_like(self.matrix, dtype=torch.float64)
        for part in vectors:
            part = part.double()
            count, total, products = count + len(part), total + part.sum(0), products + part.T @ part
        mean = total / count
        self.mean.copy_(mean)
        self.matrix.copy_(phi_s(products / count - torch.outer(mean, mean)))

    def forward(self, x: Tensor) -> Tensor:
        return (promote(x) - self.mean) @ self.matrix.T


@register_method("tokens")
class Tokens(FeatureMethod[TokensConfig]):
    """Matches the teacher's embedding and patches, each behind a head of its own."""

    Config = TokensConfig
    card = Card(
        "Ranzinger, Heinrich, Kautz, Molchanov: AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024",
        "A foundation model as the teacher, with or without labels",
        example=Example(("stage3", "pooled"), ("stage3", "pooled"), 131_584),
    )

    def __init__(self, config: TokensConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        if not config.global_weight + config.patch_weight > 0:
            raise ConfigError("method tokens: got global_weight 0 and patch_weight 0; one must be above 0")
        taps = data.taps
        if taps is None and not (config.student_taps and config.teacher_taps):
            pairs = [(last_patches(student), last_patches(teacher))] if config.patch_weight else []
            pairs += [("pooled", "pooled")] * bool(config.global_weight and not data.are_embeddings)
            taps = tuple(s for s, _ in pairs), tuple(t for _, t in pairs)
        elif data.taps is not None and config.global_weight:
            raise ConfigError(
                f"global_weight: got {config.global_weight:g}; a detector or segmentation model has no "
                "embedding; allowed: 0"
            )
        self._embeds = data.are_embeddings and config.global_weight > 0
        super().__init__(config, student, teacher, data._replace(taps=taps))
        if self._embeds:
            self.needs = replace(self.needs, logits=True)
        shapes = [*zip(self.student_shapes, self.teacher_shapes, strict=True)]
        for ours, theirs in shapes:
            if len(ours) != len(theirs) or len(ours) not in (2, 4):
                raise ConfigError(
                    f"method tokens compares maps with maps and vectors with vectors; got {list(ours)} of "
                    f"the student and {list(theirs)} of the teacher"
                )
        self.heads = nn.ModuleList(self._head(ours[1], theirs[1]) for ours, theirs in shapes)
        self.standards = nn.ModuleList(PhiS(theirs[1]) for _, theirs in shapes if config.standardize)
        self._pending = (teacher, data) if config.standardize else None
        if config.standardize and data.images is None:
            raise ConfigError(
                "method.standardize: it reads the training images of classifiers and of task embed through "
                "mdistiller.train; allowed otherwise: false"
            )

    def _head(self, width: int, out: int) -> nn.Module:
        if self.config.head == "linear":
            return nn.Linear(width, out)
        return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def read(
        self, student: Outputs, teacher: Outputs, inputs: object = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        ours, theirs = super().read(student, teacher, inputs)
        return ([*ours, student.logits], [*theirs, teacher.logits]) if self._embeds else (ours, theirs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fit(self) -> None:
        """Computes mean and covariance of the teacher's features, unless a resumed run has restored them."""
        assert self._pending is not None
        teacher, data = self._pending
        assert data.images is not None
        taps = Taps(teacher, self.teacher_taps, data.logits_of)
        for i, standard in enumerate(self.standards):
            assert isinstance(standard, PhiS)
            if not standard.matrix.any():
                standard.fit(self._vectors(taps, data.images(), i))
        taps.remove()
        self._pending = None

    def _vectors(self, taps: Taps, images: Iterable[Batch], pair: int) -> Iterable[Tensor]:
        names, layouts, seen = self.teacher_taps, self.teacher_layouts, 0
        for batch in images:
            with torch.no_grad():
                logits, found = taps(batch.image)
            maps = [to_map(found[name], layouts[name], batch.image) for name in names]
            yield _tokens([*maps, logits][pair]).flatten(0, -2)
            seen += len(batch.image)
            if seen >= _IMAGES:
                return

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        if self._pending is not None:
            self._fit()
        losses: dict[str, list[Tensor]] = {}
        for i, (ours, theirs) in enumerate(zip(*self.read(student, teacher, batch.image), strict=True)):
            kind = "patch" if theirs.ndim == 4 else "global"
            if theirs.ndim == 4 and ours.shape[2:] != theirs.shape[2:]:
                ours = F.interpolate(promote(ours), theirs.shape[2:], mode="bilinear", antialias=True)
            target = self.standards[i](_tokens(theirs)) if self.standards else _tokens(theirs)
            found, weight = self.heads[i](_tokens(ours)), getattr(self.config, f"{kind}_weight")
            for distance, share in getattr(self.config, f"{kind}_loss").items():
                loss = weight * share * tokens_loss(found, target, distance=distance)
                losses.setdefault(f"tokens_{kind}", []).append(loss)
        return {name: torch.stack(parts).sum() for name, parts in losses.items()}


def last_patches(model: nn.Module) -> str:
    """Returns the tap of the last patches: behind the last norm of a transformer, or else the last stage."""
    stage = stages(model)[-1]
    if layout_of(model, resolve(model, [stage])[stage]).kind == "tokens":
        paths = dict(without_own_input(model).named_modules())
        return next((name for name in ("norm", "layernorm", "encoder.ln") if name in paths), stage)
    return stage


def _tokens(feature: Tensor) -> Tensor:
    """Returns a map [B, C, H, W] as tokens [B, H · W, C], and a vector as it is."""
    return feature.flatten(2).transpose(1, 2) if feature.ndim == 4 else feature
