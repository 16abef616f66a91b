"""Cases of official_losses.py: inputs, settings, and how the authors' loss and ours are called.

A case gets the authors' function or class and one set of inputs, and returns the authors' value and ours.
Methods with layers get the authors' weights.
"""
# ruff: noqa: D103
# The decorator says what each case compares.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller import functional as ours
from mdistiller.methods import Method, MethodConfig, method_config
from mdistiller.methods.compose import build_method
from mdistiller.methods.crd import CRD, CRDConfig
from mdistiller.methods.features import FeatureConfig
from mdistiller.methods.lskd import standardize
from mdistiller.methods.simkd import ReusedClassifier
from mdistiller.tasks.detection.adapter import Level
from mdistiller.tasks.detection.dense_methods import bckd_loss
from mdistiller.tasks.detection.distiller import object_masks
from mdistiller.tasks.detection.level_methods import FGD, MGD, FGDConfig, MGDConfig, pkd_loss
from mdistiller.tasks.detection.levels import OBJECTS, Pyramid
from mdistiller.tasks.segmentation.maps import cirkd_loss, skd_loss
from mdistiller.training.dot import DOT
from mdistiller.types import Batch, DataInfo, Outputs

Pair = tuple[Tensor, Tensor]
Maps = list[Tensor]
Inputs = Callable[[], list[tuple[Any, ...]]]


class Case(NamedTuple):
    """Comparison of one loss.

    Attributes:
        method: name of the method.
        repository: short name of the authors' repository.
        file: the file of the loss.
        function: function or class in it.
        inputs: draws the sets of inputs.
        run: returns the authors' value and ours.
        also: FILE:NAME of a second part of the authors' code; `run` gets both.
        note: settings, or the reason for another bound.
        dtype: type of the inputs, float64 unless the authors' code converts to float32.
        bound: largest difference, in place of the usual one.
    """

    method: str
    repository: str
    file: str
    function: str
    inputs: Inputs
    run: Callable[..., Pair]
    also: str = ""
    note: str = ""
    dtype: str = "float64"
    bound: float | None = None


CASES: list[Case] = []
NOT_COMPARED = {
    "vkd": "the authors' loss is written in their training loop (roymiles/vkd, engine.py)",
    "fgfi": "likewise (twangnh/Distilling-Object-Detectors, trainval_net_sup.py)",
    "srrl": "its softmax regression term, likewise (train_imagenet_distillation.py)",
    "pld": "the authors' code is a listing in their paper; no repository of theirs is known",
    "eskd": "KD until a given step; no repository of the authors is known",
    "bckd, crosskd": "the losses of boxes, and CrossKD's scaling of maps, need mmcv",
    "ofa": "its projectors, which differ on purpose (docs/methods/ofa.md)",
    "tokens": "distances of PyTorch; RADIO's code has a license that forbids commercial use",
    "ctkd": "mode `instance`, of which the authors published no code",
}


def case(repository: str, file: str, function: str, inputs: Inputs, **options: Any) -> Callable[[Any], Any]:
    """Adds a case; the decorated function has the method's name."""

    def add(run: Callable[..., Pair]) -> Callable[..., Pair]:
        CASES.append(Case(run.__name__, repository, file, function, inputs, run, **options))
        return run

    return add


# Inputs. Tensors of the student require a gradient.


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Draws a tensor of the student."""
    return (scale * torch.randn(shape)).requires_grad_()


def logits() -> list[tuple[Any, ...]]:
    """Draws logits of both models and class ids."""
    shapes = (16, 10), (64, 100), (7, 1000)
    return [(normal(*s, scale=3), 3 * torch.randn(s), torch.randint(s[1], s[:1])) for s in shapes]


def unlikely_logits() -> list[tuple[Any, ...]]:
    """Draws logits and class ids; the teacher ranks the target last."""
    return [(s, t, t.argmin(1)) for s, t, _ in logits()]


def views() -> list[tuple[Any, ...]]:
    """Draws logits of a weak and then a strong view of each image."""
    shapes = (32, 10), (128, 100)
    return [(normal(*s, scale=3), 3 * torch.randn(s), torch.randint(s[1], (s[0] // 2,))) for s in shapes]


def vectors(scale: float = 1.0) -> list[tuple[Any, ...]]:
    """Draws embeddings of one width and class ids."""
    shapes = (16, 32), (64, 128)
    return [
        (normal(*s, scale=scale), scale * (torch.randn(s) + 0.5), torch.randint(10, s[:1])) for s in shapes
    ]


def maps() -> list[tuple[Any, ...]]:
    """Draws feature maps of equal shapes."""
    shapes = (4, 16, 8, 8), (8, 24, 7, 7)
    return [(normal(*s), torch.randn(s) + 0.2) for s in shapes]


def stages(
    batch: int = 8, sizes: Sequence[tuple[int, int]] = ((8, 8), (8, 4), (2, 4))
) -> list[tuple[Any, ...]]:
    """Draws two stages of each model, of other channels and of equal, twice and half the size."""
    return [
        (
            [normal(batch, c, s // (1 + i), s // (1 + i)) for i, c in enumerate((12, 20))],
            [torch.randn(batch, c, t // (1 + i), t // (1 + i)) for i, c in enumerate((16, 28))],
        )
        for s, t in sizes
    ]


def equal_stages() -> list[tuple[Any, ...]]:
    """Draws stages with the teacher's sizes."""
    return stages(sizes=((8, 8), (16, 16)))


# Stand-ins for models and settings.


class Net(nn.Module):
    """Model with stages of given channels and sizes, which methods are built for but not run with."""

    def __init__(self, features: Sequence[Tensor], classes: int = 10) -> None:
        super().__init__()
        inputs, self.stages = 3, nn.ModuleList()
        for x in features:
            width, size = x.shape[1], tuple(x.shape[2:])
            layers = nn.AdaptiveAvgPool2d(size), nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width)
            self.stages.append(nn.Sequential(*layers))
            inputs = width
        self.head = nn.Linear(inputs, classes)
        names = [f"stage{i + 1}" for i in range(len(features))]
        self.tap_points = {name: f"stages.{i}" for i, name in enumerate(names)}
        self.tap_points |= {f"{name}.preact": f"stages.{i}" for i, name in enumerate(names)}
        self.tap_points |= {"last_map": f"stages.{len(names) - 1}", "pooled": "head:input"}

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class Given(nn.Module):
    """Model of the authors' code base that returns given features, with a stem's in front."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        super().__init__()
        pooled = features[-1].mean((2, 3))
        found = [features[0], *features]
        self.features: dict[str, Any] = {"feats": found, "preact_feats": found, "pooled_feat": pooled}
        self.logits = torch.zeros(len(pooled), 10)
        self.norms = [nn.BatchNorm2d(x.shape[1]) for x in features]
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def get_stage_channels(self) -> list[int]:
        """Returns the channels of the stem and the stages."""
        return [x.shape[1] for x in self.features["feats"]]

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Returns the batch norms in front of the stages' last ReLUs."""
        return self.norms

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.logits, self.features


def settings(**values: Any) -> Any:
    """Returns a config of the authors' code bases; mappings become objects with attributes."""
    return SimpleNamespace(**{k: settings(**v) if isinstance(v, dict) else v for k, v in values.items()})


def outputs(features: Sequence[Tensor]) -> Outputs:
    """Returns what a tapped `Net` would return for features."""
    names = {f"stage{i + 1}": x for i, x in enumerate(features)}
    names |= {f"{name}.preact": x for name, x in names.items()}
    pooled = features[-1].mean((2, 3))
    return Outputs(torch.zeros(len(pooled), 10), {**names, "last_map": features[-1], "pooled": pooled})


def batch_of(label: Tensor) -> Batch:
    """Returns a batch of images with these labels, at the first indices."""
    return Batch(torch.zeros(len(label), 3, 1, 1), label, torch.arange(len(label)))


def method_for(name: str, s: Maps, t: Maps, **values: Any) -> Method:
    """Builds our method for models with these features."""
    return build_for(method_config(name, **values), Net(s), Net(t), batch_size=len(s[0]))


def build_for(config: MethodConfig, student: nn.Module, teacher: nn.Module, **data: Any) -> Method:
    """Builds our method for two models."""
    return build_method(config, student, teacher, DataInfo((3, 32, 32), are_maps=True, **data))


def total(method: Method, student: Outputs, teacher: Outputs, label: Tensor | None = None) -> Tensor:
    """Returns the sum of a method's losses at the end of training."""
    label = torch.zeros(len(student.logits), dtype=torch.int64) if label is None else label
    losses = method(student, teacher, batch_of(label), torch.tensor(1.0))
    return torch.stack(list(losses.values())).sum()


def take(target: nn.Module, source: nn.Module | Iterable[Tensor]) -> None:
    """Copies parameters in their order, reshaped; an embedding keeps its first rows."""
    given = source.parameters() if isinstance(source, nn.Module) else source
    for p, q in zip(target.parameters(), given, strict=True):
        p.data.copy_(q.data.flatten()[: p.numel()].view_as(p))


def loss_of(distiller: nn.Module, count: int, **given: Any) -> Tensor:
    """Returns the distillation losses of a distiller of the authors' code base for `count` images."""
    given = {"image": None, "target": torch.zeros(count, dtype=torch.int64), "epoch": 1000, **given}
    losses = distiller.forward_train(**given)[1]  # type: ignore[operator]
    return torch.stack([x.squeeze() for name, x in losses.items() if name != "loss_ce"]).sum()


def two_views(distiller: Any, s: Tensor, t: Tensor, weak: str, strong: str) -> Tensor:
    """Returns the losses of a distiller whose models get two images; here an image is the pair of logits."""
    distiller.student, distiller.teacher = (lambda x, i=i: (x[i], {}) for i in (0, 1))
    views = zip(s.chunk(2), t.chunk(2), strict=True)
    return loss_of(distiller, len(s) // 2, **dict(zip((weak, strong), views, strict=True)))


class FixedCRD(CRD):
    """CRD with given draws."""

    chosen: Tensor

    def draw(self, index: Tensor) -> Tensor:
        """Returns the given draws."""
        return self.chosen


def level(
    method: Callable[..., Method], config: FeatureConfig, s: Tensor, t: Tensor, **features: Tensor
) -> tuple[Method, Callable[[], Tensor]]:
    """Builds a detection method for one level, whose sums are of as many positions as the maps have.

    The second result computes the loss.
    """
    stride = math.sqrt(800 * 1333 / s[0, 0].numel())
    student, teacher = (Pyramid({"p3": Level(stride, x.shape[1])}) for x in (s, t))
    config = config.replace(student_taps=("p3",), teacher_taps=("p3",))
    side = math.ceil(stride) * s.shape[2]
    built = method(config, student, teacher, DataInfo((3, side, side), are_maps=True))
    logits = torch.zeros(len(s), 2)
    return built, lambda: total(built, Outputs(logits, {"p3": s, **features}), Outputs(logits, {"p3": t}))


def theta_and_logits() -> list[tuple[Any, ...]]:
    """Draws logits and the number from which CTKD's temperature is computed."""
    return [(s, t, torch.tensor([-1.3]).requires_grad_()) for s, t, _ in logits()]


def level_maps() -> list[tuple[Any, ...]]:
    """Draws a level of each model; the student's has other channels in the second pair."""
    return [(normal(4, c, 12, 12), torch.randn(4, 16, 12, 12)) for c in (16, 8)]


D = "mdistiller/distillers/"
BASE = "mdistiller"  # the reference code base, whose versions of older methods papers compare with
LOSSES = "lib/models/losses/"
MMDET = "mmdet/models/losses/kd_loss.py"


@case(BASE, D + "KD.py", "kd_loss", logits)
def kd(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    return f(s, t, 4.0), ours.kd_loss(s, t)


@case(BASE, D + "DKD.py", "dkd_loss", logits)
def dkd(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    return f(s, t, y, 1.0, 8.0, 4.0), ours.dkd_loss(s, t, y)


@case(BASE, D + "AT.py", "at_loss", stages)
def at(f: Any, s: Maps, t: Maps) -> Pair:
    return f(s, t, 2), ours.at_loss(s, t)


@case(
    BASE,
    D + "CRD.py",
    "CRD",
    stages,
    note="with given negatives; theirs adds 1e-7 to the denominators",
    bound=1e-6,
)
def crd(f: Any, s: Maps, t: Maps) -> Pair:
    """Compares two steps, the second with the memory that the first has updated."""
    images, count = 40, 4000
    sizes = {"STUDENT_DIM": s[-1].shape[1], "TEACHER_DIM": t[-1].shape[1], "DIM": 16}
    nce = {"K": count, "MOMENTUM": 0.5, "TEMPERATURE": 0.07}
    loss = {"CE_WEIGHT": 1, "FEAT_WEIGHT": 0.8}
    theirs = f(Given(s), Given(t), settings(CRD={"LOSS": loss, "FEAT": sizes, "NCE": nce}), images)
    data = DataInfo((3, 32, 32), labels=torch.arange(images) % 10, are_maps=True)
    method = FixedCRD(CRDConfig(feature_dim=16, negatives=count), Net(s), Net(t), data)
    take(method, [*theirs.embed_s.parameters(), *theirs.embed_t.parameters()])
    method.student_memory.copy_(theirs.contrast.memory_v1)
    method.teacher_memory.copy_(theirs.contrast.memory_v2)
    index = torch.arange(len(s[0]))
    official, own = torch.zeros(()), torch.zeros(())
    for _ in range(2):
        method.chosen = torch.cat([index[:, None], torch.randint(images, (len(index), count))], 1)
        official = official + loss_of(theirs, len(index), index=index, contrastive_index=method.chosen)
        own = own + total(method, outputs(s), outputs(t))
    return official, own


@case(BASE, D + "FitNet.py", "FitNet", stages)
def fitnet(f: Any, s: Maps, t: Maps) -> Pair:
    config = {"LOSS": {"CE_WEIGHT": 1, "FEAT_WEIGHT": 100}, "HINT_LAYER": 2, "INPUT_SIZE": (32, 32)}
    theirs = f(Given(s), Given(t), settings(FITNET=config))
    method = method_for("fitnet", s, t, student_taps=("stage2",), teacher_taps=("stage2",))
    take(method, theirs.conv_reg)
    return loss_of(theirs, len(s[0])), total(method, outputs(s), outputs(t))


@case(
    BASE,
    D + "KDSVD.py",
    "kdsvd_loss",
    equal_stages,
    note="rounding of singular vectors, which theirs computes in float32",
    dtype="float32",
    bound=1e-4,
)
def kdsvd(f: Any, s: Maps, t: Maps) -> Pair:
    return f(s, t, 1), ours.kdsvd_loss(s, t)


@case(BASE, D + "NST.py", "nst_loss", stages)
def nst(f: Any, s: Maps, t: Maps) -> Pair:
    return f(s, t), ours.nst_loss(s, t)


@case(BASE, D + "OFD.py", "OFD", equal_stages, note="theirs has margins in float32", dtype="float32")
def ofd(f: Any, s: Maps, t: Maps) -> Pair:
    given, teacher = Given(t), Net(t)
    config = {"LOSS": {"CE_WEIGHT": 1, "FEAT_WEIGHT": 0.001}, "CONNECTOR": {"KERNEL_SIZE": 1}}
    theirs = f(Given(s), given, settings(OFD=config))
    for stage, norm in zip(teacher.stages, given.norms, strict=True):
        stage[-1].load_state_dict(norm.state_dict())  # type: ignore[index]
    method = build_for(method_config("ofd"), Net(s), teacher)
    take(method, theirs.connectors)
    return loss_of(theirs, len(s[0])), total(method, outputs(s), outputs(t))


@case(
    BASE,
    D + "PKT.py",
    "pkt_loss",
    vectors,
    note="theirs adds 1e-7 to norms, ours 1e-12 to their squares",
    bound=1e-6,
)
def pkt(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    return f(s, t), ours.pkt_loss(s, t)


@case(BASE, D + "RKD.py", "rkd_loss", vectors)
def rkd(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    return f(s, t), ours.rkd_loss(s, t)


@case(BASE, D + "ReviewKD.py", "ReviewKD", stages, note="after the warm-up")
def reviewkd(f: Any, s: Maps, t: Maps) -> Pair:
    sides, teacher_sides = ([1, *(x.shape[2] for x in reversed(maps))] for maps in (s, t))
    widths, teacher_widths = ([x.shape[1] for x in (*maps, maps[-1])] for maps in (s, t))
    config = {"SHAPES": sides, "OUT_SHAPES": teacher_sides, "IN_CHANNELS": widths, "CE_WEIGHT": 1}
    config |= {"OUT_CHANNELS": teacher_widths, "REVIEWKD_WEIGHT": 1, "WARMUP_EPOCHS": 20}
    config |= {"STU_PREACT": False, "MAX_MID_CHANNEL": 512}
    theirs = f(Given(s), Given(t), settings(REVIEWKD=config))
    method = method_for("reviewkd", s, t)
    take(method, [p for abf in reversed(theirs.abfs) for p in abf.parameters()])
    return loss_of(theirs, len(s[0])), total(method, outputs(s), outputs(t))


@case(BASE, D + "SP.py", "similarity_loss", maps)
def sp(f: Any, s: Tensor, t: Tensor) -> Pair:
    return f(s, t), ours.sp_loss(s, t)


@case(BASE, D + "VID.py", "VID", stages)
def vid(f: Any, s: Maps, t: Maps) -> Pair:
    loss = {"CE_WEIGHT": 1, "FEAT_WEIGHT": 1}
    config = {"LOSS": loss, "INIT_PRED_VAR": 5.0, "EPS": 1e-5, "INPUT_SIZE": (32, 32)}
    theirs = f(Given(s), Given(t), settings(VID=config))
    method = method_for("vid", s, t)
    take(method, [*theirs.regressors.parameters(), *theirs.log_scales])
    return loss_of(theirs, len(s[0])), total(method, outputs(s), outputs(t))


@case(
    BASE,
    "mdistiller/engine/dot.py",
    "DistillationOrientedTrainer",
    lambda: [(torch.randn(80),)],
    note="parameters after four steps with weight decay",
)
def dot(f: Any, parameters: Tensor) -> Pair:
    """Compares parameters after four steps on two quadratic losses; the second reaches half of them."""
    task, distillation = torch.randn(2, 40)
    pair = [[x.clone().requires_grad_() for x in parameters.chunk(2)] for _ in range(2)]
    theirs = f(pair[0], lr=0.1, momentum=0.85, momentum_kd=0.95, weight_decay=5e-4)
    deltas = {"task": -0.05, "distillation": 0.05}
    own = DOT(pair[1], lr=0.1, momentum=0.9, deltas=deltas, weight_decay=5e-4)

    def losses(p: Maps) -> tuple[Tensor, Tensor]:
        return (p[0] - task).square().sum() + p[1].square().sum(), (p[0] - distillation).square().sum()

    for _ in range(4):
        task_loss, other = losses(pair[0])
        theirs.zero_grad(set_to_none=True)
        other.backward(retain_graph=True)
        theirs.step_kd()
        theirs.zero_grad(set_to_none=True)
        task_loss.backward()
        theirs.step()
        task_loss, other = losses(pair[1])
        own.backward({"task": task_loss}, {"kd": other})
        own.step()
    return torch.cat(pair[0]).detach(), torch.cat(pair[1]).detach()


@case("LSKD", D + "KD.py", "kd_loss", logits, note="around KD")
def lskd(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    return f(s, t, 2.0, True), ours.kd_loss(standardize(s), standardize(t), temperature=2.0)


@case(
    "SDD",
    D + "SDD_DKD.py",
    "multi_dkd",
    equal_stages,
    also="mdistiller/models/cifar/utils.py:SPP",
    note="around DKD",
)
def sdd(f: tuple[Any, Any], s: Maps, t: Maps) -> Pair:
    loss, cells = f
    student, teacher = Net(s), Net(t)
    label = torch.randint(10, (len(s[0]),))
    pairs = (s[-1], student.head), (t[-1], teacher.head)
    regions = [head(cells("[1,2,4]")(x)[0].transpose(1, 2)).transpose(1, 2) for x, head in pairs]
    config = method_config("sdd-dkd", base=method_config("dkd", task_weight=0.0))
    method = build_for(config, student, teacher)
    given = outputs(t)._replace(logits=teacher.head(t[-1].mean((2, 3))))
    return loss(*regions, label, 1.0, 8.0, 4.0), total(method, outputs(s), given, label)


@case("MLKD", D + "KD_ours.py", "KD_ours", views, note="two views")
def mlkd(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    config = {"TEMPERATURE": 4.0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}}
    theirs = two_views(f(None, None, settings(KD=config)), s, t, "image_weak", "image_strong")
    method = build_for(method_config("mlkd"), nn.Identity(), nn.Identity())
    return theirs, total(method, Outputs(s, {}), Outputs(t, {}))


@case(
    "CTKD",
    "distiller_zoo/KD.py",
    "DistillKL",
    theta_and_logits,
    also="models/temp_global.py:Global_T",
    note="around KD, mode `global`, after the curriculum; with the gradient of the temperature",
)
def ctkd(f: tuple[Any, Any], s: Tensor, t: Tensor, theta: Tensor) -> Pair:
    """Compares the loss, and the reversed gradient of the temperature after the curriculum."""
    divergence, layer = (part() for part in f)
    del layer.global_T
    layer.global_T = theta
    shape = [torch.zeros(2, 8, 4, 4)]
    base = method_config("kd", task_weight=0.0, weight=1.0)
    method = build_for(method_config("ctkd", base=base), Net(shape), Net(shape))
    del method.theta.theta  # type: ignore[union-attr]
    method.theta.theta = theta  # type: ignore[union-attr, assignment]
    found = total(method, Outputs(s, {}), Outputs(t, {}))
    return divergence(s, t, 1 + 20 * layer(t, s, -1.0).sigmoid()), found


@case("DIST-code", LOSSES + "dist_kd.py", "DIST", logits)
def dist(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    return f(2.0, 2.0, 4.0)(s, t), ours.dist_loss(s, t)


@case("DeiT", "losses.py", "DistillationLoss", logits, note="hard, and soft times the number of classes")
def deit(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    hard, soft = (
        f(lambda *x: 0.0, lambda x: t, kind, 1.0, 3.0)(None, (s, s), None) for kind in ("hard", "soft")
    )
    return hard + soft * s.shape[1], ours.deit_loss(s, t) + ours.deit_loss(s, t, hard=False)


@case("NKD", "mmcls/models/dis_losses/nkd.py", "NKDLoss", logits)
def nkd(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    return f("", True, 3.0, 1.5)(s, t, y), ours.nkd_loss(s, t, y, gamma=1.5)


@case("NormKD", D + "NormKD.py", "kd_loss_normal", logits)
def normkd(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    return f(s, t, 2.0), ours.normkd_loss(s, t)


@case("GDKD", D + "GDKD.py", "gdkd_loss", logits)
def gdkd(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    return f(s, t, y, 5, "best", 1.0, 1.0, 8.0, 4.0, "forward")[0], ours.gdkd_loss(s, t)


@case("RLD", D + "RLD.py", "rld_loss", logits)
def rld(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    return f(s, t, y, 1.0, 8.0, 4.0, False, 4.0), ours.rld_loss(s, t, y)


@case("TTM", "distiller_zoo/ttm.py", "TTM", logits)
def ttm(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    return f(0.1)(s, t), ours.ttm_loss(s, t)


@case("TTM", "distiller_zoo/wttm.py", "WTTM", logits)
def wttm(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    return f(0.2)(s, t), ours.wttm_loss(s, t)


@case("CAT-KD", D + "CAT_KD.py", "CAT_loss", maps)
def catkd(f: Any, s: Tensor, t: Tensor) -> Pair:
    return f(s, t, 2, True), ours.catkd_loss(s, t)


@case("SimKD", "models/util.py", "SimKD", stages)
def simkd(f: Any, s: Maps, t: Maps) -> Pair:
    feature, target = s[-1], t[-1]
    theirs = f(s_n=feature.shape[1], t_n=target.shape[1], factor=2)
    model = ReusedClassifier(Net(s), target.shape[1], 10, factor=2)
    take(model.projector, theirs)
    mapped, wanted, _ = theirs(feature, target, nn.Linear(target.shape[1], 10))
    if feature.shape[2] > target.shape[2]:
        feature = F.adaptive_avg_pool2d(feature, target.shape[2:])  # type: ignore[arg-type]
    return F.mse_loss(mapped, wanted), ours.simkd_loss(model.projector(feature), target)


@case(
    "SemCKD",
    "models/util.py",
    "SelfA",
    stages,
    also="distiller_zoo/SemCKD.py:SemCKDLoss",
    note="without its KD term",
)
def semckd(f: tuple[Any, Any], s: Maps, t: Maps) -> Pair:
    widths = [x.shape[1] for x in s], [x.shape[1] for x in t]
    attend, loss = f
    theirs = attend(len(s), len(t), len(s[0]), *widths)
    method = method_for("semckd", s, t, weight=1.0, kd_weight=0.0)
    for i, embed in enumerate(method.queries):  # type: ignore[arg-type]
        take(embed, getattr(theirs, f"query_weight{i}"))
    for j, embed in enumerate(method.keys):  # type: ignore[arg-type]
        take(embed, getattr(theirs, f"key_weight{j}"))
    for i, row in enumerate(method.aligners):  # type: ignore[arg-type]
        for j, align in enumerate(row):
            take(align, getattr(theirs, f"regressor{i}{j}"))
    return loss()(*theirs(s, t)), total(method, outputs(s), outputs(t))


@case("SRRL", "distiller_zoo/AIN.py", "statm_loss", maps, note="the feature matching term")
def srrl(f: Any, s: Tensor, t: Tensor) -> Pair:
    weight = torch.randn(10, s.shape[1])
    return f()(s, t), ours.srrl_loss(s.mean((2, 3)), t.mean((2, 3)), weight, regression_weight=0.0)


@case(
    "ITRD",
    "distiller_zoo/IT.py",
    "ITLoss",
    lambda: vectors(1e4),
    note="inputs of size 1e4, where our 1e-8 under the root has no effect",
)
def itrd(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    width = s.shape[1]
    theirs = f(SimpleNamespace(s_dim=width, t_dim=width, n_data=len(s), alpha_it=1.01))
    correlation = ours.itrd_correlation_loss(theirs.embed(s), t, alpha=1.01)
    information = ours.itrd_mutual_information_loss(s, t)
    given = theirs.forward_correlation_it(s, t), theirs.forward_mutual_it(s, t)
    return torch.stack(given), torch.stack([correlation, information])


@case(
    "DIST-code",
    LOSSES + "diffkd/diffkd.py",
    "DiffKD",
    equal_stages,
    also=LOSSES + "kl_div.py:KLDivergence",
    note="maps and logits, the same random draws; theirs has the schedule in float32",
    bound=1e-6,
)
def diffkd(f: tuple[Any, Any], s: Maps, t: Maps) -> Pair:
    """Compares the sum of all losses on the last map and on logits, with equal draws."""
    width, teacher_width = s[-1].shape[1], t[-1].shape[1]
    diffusion_of, divergence = f
    of_maps = diffusion_of(width, teacher_width, 3, 5, use_ae=True, ae_channels=16)
    of_logits = diffusion_of(10, 10, 1, 5)
    method = method_for("diffkd", s, t, latent_channels=16)
    encoder, decoder = of_maps.ae.encoder, of_maps.ae.decoder
    take(method.encoders, encoder)  # type: ignore[arg-type]
    take(method.decoders, decoder)  # type: ignore[arg-type]
    layers = "trans", "model", "noise_adapter", "proj"
    for diffusion, theirs in ((method.diffusions, of_maps), (method.logits, of_logits)):
        take(diffusion, [p for name in layers for p in getattr(theirs, name).parameters()])  # type: ignore[arg-type]
    student = outputs(s)._replace(logits=s[-1].mean((2, 3))[:, :10])
    teacher = outputs(t)._replace(logits=t[-1].mean((2, 3))[:, :10])
    torch.manual_seed(1)
    refined, latent, noise, code = of_maps(s[-1], t[-1])
    loss = F.mse_loss(refined, latent) + noise + code
    refined, wanted, noise, _ = of_logits(student.logits[:, :, None, None], teacher.logits[:, :, None, None])
    loss = loss + noise + divergence(tau=1.0)(refined, wanted)
    torch.manual_seed(1)
    return loss, total(method, student, teacher)


@case("WKD", D + "WKD.py", "wkd_logit_loss_with_speration", logits, dtype="float32")
def wkd_l(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    points = torch.randn(s.shape[1], 8)
    distances = 1 - F.normalize(points) @ F.normalize(points).T
    found = ours.wkd_l_loss(s, t, y, distances, weight=600.0, temperature=8.0)
    return f(s, t, y, 8.0, 600.0, distances, 0.05, 10), found


@case("WKD", D + "WKD.py", "wkd_feature_loss", maps, note="grids of 1, 2 and 3")
def wkd_f(f: Any, s: Tensor, t: Tensor) -> Pair:
    parts = [4 * mean + std for mean, std in (f(s, t, 1e-5, grid) for grid in (1, 2, 3))]
    return torch.stack(parts), torch.stack([ours.wkd_f_loss(s, t, grid=grid) for grid in (1, 2, 3)])


@case("ND", "CIFAR/utils.py", "DirectNormLoss", vectors)
def nd(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    means = torch.randn(10, s.shape[1])
    given = {str(i): mean.tolist() for i, mean in enumerate(means)}
    return f()(s, t, given, y), ours.nd_loss(s, t, means, y)


@case("ABKD", "base_to_new_classification/losses/abkl.py", "ABKL", logits)
def abkd(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    config = settings(TRAINER={"PROMPTKD": {"TEMPERATURE": 4.0}}, ab_alpha=0.8, ab_beta=0.3)
    return f(config)(s, t), ours.abkd_loss(s, t)


@case("DKL", f"DKLv1/KD-dkl/{D}IKL_KD.py", "dkl_loss", logits, note="both kinds of weights")
def ikl(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    weights = torch.randn_like(t).softmax(1)
    theirs = f(s, t, 4.0, 1.0, 8.0), f(s, t, 4.0, 1.0, 8.0, weights, True)
    return torch.stack(theirs), torch.stack([ours.ikl_loss(s, t), ours.ikl_loss(s, t, weights)])


@case("LumiNet", D + "Luminet.py", "luminet_loss", logits)
def luminet(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    return f(s, t, y, 33.0, 4.0), 33.0**2 * ours.luminet_loss(s, t)


@case(
    "DeepKD",
    D + "_base.py",
    "Distiller",
    unlikely_logits,
    note="the teacher ranks the target last: else theirs counts it among the k classes",
)
def deepkd(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    plugin = f(nn.Identity(), nn.Identity()).deepkd_plugin
    target, others = plugin(s, t, y, 1.0, 8.0, 4.0, 20, DKD=True, topk=5, epoch=20)
    return target + others, ours.deepkd_loss(s, t, y, k=5)


@case("CRLD", D + "CRLD.py", "CRLD", views)
def crld(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    config = {"CE_WEIGHT": 1, "WV_WEIGHT": 2.0, "CV_WEIGHT": 0.5, "TEMPERATURE": 4.0}
    config |= {"TAU_W": 0.6, "TAU_S": 0.4}
    theirs = two_views(f(None, None, settings(CRLD=config)), s, t, "image_w", "image_s")
    return theirs, ours.crld_loss(s, t, weak_threshold=0.6, strong_threshold=0.4)


@case("OFA", "distillers/ofa.py", "ofa_loss", logits, note="the loss, without projectors")
def ofa(f: Any, s: Tensor, t: Tensor, y: Tensor) -> Pair:
    mask = F.one_hot(y, s.shape[1])
    return f(s, t, mask, 1.5, 2.0), ours.ofa_loss(s, t, y, gamma=1.5, temperature=2.0)


@case(
    "SRD",
    "imagenet/torchdistill/losses/single.py",
    "OurDistillationLoss",
    lambda: [(normal(n, 512), torch.randn(n, 512)) for n in (16, 64)],
    note="ours adds 1e-5 in the logarithm",
    bound=1e-9,
)
def srd(f: Any, s: Tensor, t: Tensor) -> Pair:
    theirs = f()
    return theirs.forward_loss(s, t), ours.srd_loss(theirs.embed(s), t)


@case("L2D", "criterion/distiller_zoo/logits_based/mld.py", "MLD", logits)
def binary_kd(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    return f("mean")(s, t), ours.binary_kd_loss(s, t)


@case("CWD", "SemSeg-distill/utils/criterion.py", "CriterionCWD", maps)
def cwd(f: Any, s: Tensor, t: Tensor) -> Pair:
    return f("channel", "kl", 4.0)(s, t), ours.cwd_loss(s, t)


@case(
    "SKD",
    "utils/criterion.py",
    "CriterionPairWiseforWholeFeatAfterPool",
    maps,
    note="the pair-wise term",
    dtype="float32",
)
def skd(f: Any, s: Tensor, t: Tensor) -> Pair:
    return f(0.5, 0)([s], [t]), skd_loss(s, t)


@case(
    "CIRKD",
    "losses/cirkd_mini_batch.py",
    "CriterionMiniBatchCrossImagePair",
    maps,
    note="the mini-batch pixel-to-pixel term",
)
def cirkd(f: Any, s: Tensor, t: Tensor) -> Pair:
    return f(0.1)(s, t), cirkd_loss(s, t)


@case(
    "MGD",
    "det/mmdet/distillation/losses/mgd.py",
    "FeatureLoss",
    level_maps,
    note="the same random mask; sums of as many positions as the map has",
)
def mgd(f: Any, s: Tensor, t: Tensor) -> Pair:
    theirs = f(s.shape[1], t.shape[1], "", 2e-5, 0.65)
    method, run = level(MGD, MGDConfig(), s, t)
    take(method, theirs)
    torch.manual_seed(1)
    value = theirs(s, t)
    torch.manual_seed(1)
    return value, run()


@case(
    "FGD",
    "mmdet/distillation/losses/fgd.py",
    "FeatureLoss",
    level_maps,
    note="with boxes; sums of as many positions as the map has",
)
def fgd(f: Any, s: Tensor, t: Tensor) -> Pair:
    theirs = f(s.shape[1], t.shape[1], "", 0.5, 1e-3, 5e-4, 5e-4, 5e-6)
    for p in theirs.parameters():  # the last layers start at zero
        nn.init.normal_(p, std=0.3)
    corner = torch.rand(4, 3, 2) * 60
    boxes = list(torch.cat([corner, corner + 5 + torch.rand(4, 3, 2) * 25], 2))
    found = SimpleNamespace(features={"p3": s}, strides={"p3": 8}, objects=boxes)
    objects = object_masks(found)["p3" + OBJECTS]  # type: ignore[arg-type]
    method, run = level(FGD, FGDConfig(), s, t, **{"p3" + OBJECTS: objects})
    align = [] if theirs.align is None else [*theirs.align.parameters()]
    student = [*theirs.conv_mask_s.parameters(), *theirs.channel_add_conv_s.parameters()]
    teacher = [*theirs.conv_mask_t.parameters(), *theirs.channel_add_conv_t.parameters()]
    take(method, [*align, *student, *teacher])
    return theirs(s, t, boxes, [{"img_shape": (96, 96)}] * 4), run()


@case(
    "PKD",
    "mmrazor/models/losses/pkd_loss.py",
    "PKDLoss",
    maps,
    note="theirs, with the divisor n − 1, times n / (n − 1); it adds 1e-6 to deviations",
    bound=1e-5,
)
def pkd(f: Any, s: Tensor, t: Tensor) -> Pair:
    count = s[:, 0].numel()
    return f()(s, t) * count / (count - 1), pkd_loss(s, t)


@case("CrossKD", MMDET, "kd_quality_focal_loss", logits, note="the loss of classes")
def crosskd(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    return f(s, t, reduction="sum"), bckd_loss(s, t, 1.0)


@case("BCKD", MMDET, "NovelKDLoss", logits, note="the loss of classes")
def bckd(f: Any, s: Tensor, t: Tensor, _: Tensor) -> Pair:
    return f("sum")(s, t), bckd_loss(s, t, 1.0)
