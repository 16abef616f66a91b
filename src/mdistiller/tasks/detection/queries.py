r"""Distillation of detectors that predict a set, by their queries: DETRDistill's logits, and LD of the sides.

Which query finds an object differs from model to model. So each query of the teacher meets one of the
student, by an assignment of the least cost in each image.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Losses, Method, MethodConfig, Needs, promote
from mdistiller.types import Batch, Outputs

_CLASSES, _L1, _GIOU = 1.0, 5.0, 2.0  # the authors' factors of DETRDistill's costs and losses


def match_queries(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns the teacher's queries to the student's, in each image at the least total cost.

    The cost of a pair is that of `detrdistill_loss`: classes, L1 and generalized overlap.

    Args:
        student: logits [B, Q, C] and boxes [B, Q, 4], centers and sizes as fractions of the image.
        teacher: the same, with queries of any number.

    Returns:
        Positions of the image, the student's query and the teacher's, each int64 [pairs]; min(Q, Q') pairs of
        an image.
    """
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import box_convert, generalized_box_iou

    if student[0].shape[2] != teacher[0].shape[2]:
        raise ConfigError(f"student and teacher have {student[0].shape[2]} and {teacher[0].shape[2]} classes")
    found = []
    with torch.no_grad():
        for image, (logits, boxes, their_logits, their_boxes) in enumerate(
            zip(*student, *teacher, strict=True)
        ):
            z, p = promote(logits), promote(their_logits).sigmoid()
            # The sum over classes of the binary cross-entropy, softplus(z) - p z.
            cost = _CLASSES * (F.softplus(z).sum(1, keepdim=True) - z @ p.T)
            ours, theirs = promote(boxes), promote(their_boxes)
            cost += _L1 * torch.cdist(ours, theirs, p=1)
            corners = (box_convert(x, "cxcywh", "xyxy") for x in (ours, theirs))
            cost -= _GIOU * generalized_box_iou(*corners)
            pairs = linear_sum_assignment(cost.cpu().numpy())
            found.append([torch.full((len(pairs[0]),), image), *map(torch.from_numpy, pairs)])
    rows = [torch.cat(part).to(student[0].device) for part in zip(*found, strict=True)]
    return rows[0], rows[1], rows[2]


def detrdistill_loss(
    student_logits: Float[Tensor, "n c"],
    teacher_logits: Float[Tensor, "n c"],
    student_boxes: Float[Tensor, "n 4"],
    teacher_boxes: Float[Tensor, "n 4"],
) -> tuple[Tensor, Tensor]:
    r"""Computes the losses of classes and of boxes, means over n pairs of queries.

    With $p = \sigma(z)$ they are $\frac1n \sum_{i,c} \mathrm{BCE}(p^S_{ic}, p^T_{ic})$ and
    $\frac1n \sum_i 5\,|b^S_i - b^T_i|_1 + 2\,(1 - \mathrm{GIoU}(b^S_i, b^T_i))$.

    Args:
        student_logits: before a sigmoid for each class, [n, C].
        teacher_logits: of the same shape.
        student_boxes: centers and sizes as fractions of the image, [n, 4].
        teacher_boxes: of the same shape.

    Returns:
        Two scalars.

    Source: Chang et al., ICCV 2023, equations 3 and 4; factors and means are those of the authors' code,
    which compares classes and boxes of all queries, also of those without an object.
    """
    from torchvision.ops import box_convert, generalized_box_iou_loss

    target = promote(teacher_logits).sigmoid()
    classes = F.binary_cross_entropy_with_logits(promote(student_logits), target, reduction="none")
    ours, theirs = promote(student_boxes), promote(teacher_boxes)
    corners = (box_convert(x, "cxcywh", "xyxy") for x in (ours, theirs))
    boxes = _L1 * (ours - theirs).abs().sum(1) + _GIOU * generalized_box_iou_loss(*corners)
    return _CLASSES * classes.sum(1).mean(), boxes.mean()


def ld_loss(
    student_sides: Float[Tensor, "n 4 s"],
    student_places: Float[Tensor, "n 4 s"],
    teacher_sides: Float[Tensor, "n 4 t"],
    teacher_places: Float[Tensor, "n 4 t"],
    weight: Float[Tensor, " n"],
    temperature: float,
) -> Float[Tensor, ""]:
    r"""Computes the divergence of the distributions over the sides of boxes at temperature T.

    $$\frac{1}{\sum_i w_i} \sum_i w_i\, \frac14 \sum_{e=1}^4 \frac{T^2}{s}\,
    \mathrm{KL}\big(q_{ie} \,\|\, \mathrm{softmax}(z^S_{ie} / T)\big)$$

    q is the teacher's softmax at T. LD's detectors measure a side from one point, so their bins are the same;
    D-FINE's queries measure it from boxes of their own. Each bin of the teacher therefore gives its
    probability to the student's two bins around its place, more to the nearer one. Equal places change
    nothing.

    Args:
        student_sides: logits of the bins, [n, 4, s].
        student_places: coordinate of each bin, rising or falling from bin to bin, of the same shape.
        teacher_sides: logits [n, 4, t].
        teacher_places: of the same shape.
        weight: w, [n].
        temperature: T.

    Returns:
        A scalar.

    Source: Zheng et al., CVPR 2022, section 3; T² and the mean over bins are of the authors' code.
    """
    target = (promote(teacher_sides) / temperature).softmax(2)
    places, grid = promote(teacher_places), promote(student_places)
    sign = torch.where(grid[..., -1:] < grid[..., :1], -1.0, 1.0)
    places, grid = (places * sign).contiguous(), (grid * sign).contiguous()
    right = torch.searchsorted(grid, places).clamp(1, grid.shape[2] - 1)
    low, high = grid.gather(2, right - 1), grid.gather(2, right)
    share = ((places - low) / (high - low).clamp(min=torch.finfo(grid.dtype).tiny)).clamp(0, 1)
    moved = torch.zeros_like(grid).scatter_add(2, right - 1, target * (1 - share))
    moved = moved.scatter_add(2, right, target * share)
    own = (promote(student_sides) / temperature).log_softmax(2)
    losses = temperature**2 * F.kl_div(own, moved, reduction="none").mean(2).mean(1)
    return (weight * losses).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


class QueryMethod(Method):
    """Base class of methods that compare the queries of two detectors."""

    needs = Needs(one_class=False)
    student_taps: tuple[str, ...] = ("queries.logits", "queries.boxes")
    teacher_taps: tuple[str, ...] = student_taps


class DETRDistillConfig(MethodConfig):
    """Hyperparameters of DETRDistill's distillation of logits; the defaults are the authors'."""

    own_name = "detrdistill"

    weight: float = Field(default=1.0, ge=0)
    """Weight of the distillation of classes."""
    box_weight: float = Field(default=1.0, ge=0)
    """Weight of the distillation of boxes, five times their L1 distance and twice that of overlap."""


class DETRDistill(QueryMethod):
    """Matches the predictions of the student's queries with the teacher's, layer by layer of the decoder.

    It is the first of the paper's three parts, the Hungarian matching of logits. Where one decoder has fewer
    layers than the other, the last ones are compared.
    """

    Config = DETRDistillConfig
    config: DETRDistillConfig
    name = "detrdistill"
    card = Card(
        "Chang, Wang, Xu, Chen, Yang, Zhao: DETRDistill: A Universal Knowledge Distillation Framework for "
        "DETR-families, ICCV 2023",
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        ours, theirs = ([o.features[name] for name in self.student_taps] for o in (student, teacher))
        losses = []
        for i in range(1, min(ours[0].shape[1], theirs[0].shape[1]) + 1):
            (logits, boxes), (target, target_boxes) = ([x[:, -i] for x in part] for part in (ours, theirs))
            image, mine, his = match_queries((logits, boxes), (target, target_boxes))
            matched = logits[image, mine], target[image, his], boxes[image, mine], target_boxes[image, his]
            losses.append(torch.stack(detrdistill_loss(*matched)))
        classes, places = torch.stack(losses).sum(0)
        return {
            "detrdistill": self.config.weight * classes,
            "detrdistill_boxes": self.config.box_weight * places,
        }


class LDConfig(MethodConfig):
    """Hyperparameters of localization distillation; the defaults are the authors'."""

    own_name = "ld"

    weight: float = Field(default=0.25, ge=0)
    """Weight of the loss."""
    temperature: float = Field(default=10.0, gt=0)
    """Temperature of the distributions over the bins of a side."""


class LD(QueryMethod):
    """Matches the distributions over the sides of boxes, of queries that are matched as in DETRDistill.

    A pair's weight is the teacher's highest probability of a class.
    """

    Config = LDConfig
    config: LDConfig
    name = "ld"
    card = Card(
        "Zheng, Ye, Wang, Ren, Zuo, Hou, Cheng: Localization Distillation for Dense Object Detection, "
        "CVPR 2022",
    )
    student_taps = (*QueryMethod.student_taps, "queries.sides", "queries.places")
    teacher_taps = student_taps

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        ours, theirs = ([o.features[name][:, -1] for name in self.student_taps] for o in (student, teacher))
        image, mine, his = match_queries((ours[0], ours[1]), (theirs[0], theirs[1]))
        weight = promote(theirs[0][image, his]).sigmoid().amax(1)
        sides = ours[2][image, mine], ours[3][image, mine], theirs[2][image, his], theirs[3][image, his]
        return {"ld": self.config.weight * ld_loss(*sides, weight, self.config.temperature)}
