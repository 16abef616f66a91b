"""Promises of every loss in `functional`.

The gradient is right, half precision is promoted, extreme values stay finite, and `torch.compile` works.

`CASES` has the inputs of each loss. What only one loss promises is in the test module of its method.
"""

import contextlib
import math
from typing import NamedTuple

import pytest
import torch
from loss_checks import check_shapes, signature
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mdistiller import functional


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(*shape, other=None):
    return normal(*shape), normal(*(other or shape), seed=1)


LOGITS = 3 * normal(6, 7), 3 * normal(6, 7, seed=1)
IDS = torch.tensor([0, 6, 3, 3, 1, 5])
SOFT = uniform(6, 7).softmax(1)
MAPS = [normal(2, 3, 4, 4), normal(2, 2, 2, 2)], [normal(2, 2, 3, 3, seed=1), normal(2, 3, 2, 2, seed=1)]
POSITIVE = [uniform(2, 2, 4, 4), uniform(2, 1, 2, 4)], [uniform(2, 3, 4, 4), uniform(2, 3, 2, 4, seed=1)]
DISTANCES = uniform(7, 7).fill_diagonal_(0)

# Rows of the student and of the teacher.
ROWS = {
    "equal": ([3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]),
    "zeros against a certain teacher": ([0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, -1e4]),
    "certain against zeros": ([1e4, 0.0, 0.0, -1e4], [0.0, 0.0, 0.0, 0.0]),
    "teacher certain": ([0.0, 1.0, -1.0, 2.0], [1e4, 0.0, 0.0, 0.0]),
    "student certain": ([1e4, 0.0, 0.0, 0.0], [0.0, 1.0, -1.0, 2.0]),
    "certain of different classes": ([-1e4, 1e4, 0.0, 0.0], [1e4, -1e4, 0.0, 0.0]),
    "three classes": ([-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]),
    "both certain and equal": ([1e4, -1e4, -1e4, -1e4], [1e4, -1e4, -1e4, -1e4]),
    "two classes": ([1e4, -1e4], [-1e4, 1e4]),
    "two classes, calm": ([0.5, -0.5], [-1.0, 1.0]),
}
BATCHES = [(torch.tensor([s] * 4), torch.tensor([t] * 4)) for s, t in ROWS.values()]
MIXED = (
    torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 3.0], [0.0, 1e4, 0.0], [3.0, 3.0, 3.0]]),
    torch.tensor([[-1e4, 1e4, 0.0], [0.0, -1e4, 1e4], [0.0, 0.0, 0.0], [3.0, 3.0, 3.0]]),
)
BATCHES += [MIXED, tuple(x[:, :2] for x in MIXED)]


def ids(s, t):
    return s, t, torch.arange(len(s)) % s.shape[1]


def soft(s, t):
    return s, t, F.one_hot(torch.arange(len(s)) % s.shape[1], s.shape[1]) * 0.9 + 0.1 / s.shape[1]


def scaled(*scales, x=MAPS):
    return [tree_map(lambda y, scale=scale: scale * y.clamp(-3, 3), x) for scale in scales]


ALONE = BATCHES
WITH_IDS = [ids(s, t) for s, t in BATCHES]
WITH_TARGETS = WITH_IDS + [soft(s, t) for s, t in BATCHES]
VECTORS = torch.tensor([[1.0, 2, 3], [-1, 0, 1], [0, 1, 0]])


class Case(NamedTuple):
    """Inputs of a loss.

    inputs: arguments in float64, of one or several kinds.
    settings: keywords of the gradient's check; with the first ones, the loss is compiled.
    leaves: number of arguments with a gradient.
    extremes: arguments in any precision, whose values and gradients are finite.
    extreme_settings, extreme_leaves: as above, for them.
    least: lower limit of their losses.
    dtypes: their types.
    shapes: keywords of `check_shapes`.
    """

    inputs: list
    settings: list = [{}]  # noqa: RUF012
    leaves: int = 2
    extremes: list = []  # noqa: RUF012
    extreme_settings: list = [{}]  # noqa: RUF012
    extreme_leaves: int = 1
    least: float = -math.inf
    dtypes: tuple = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    shapes: dict = {}  # noqa: RUF012


HOT = {"temperature": 1.0}, {"temperature": 4.0}
DECOUPLED = Case([(*LOGITS, IDS), (*LOGITS, SOFT)], extremes=WITH_TARGETS, extreme_settings=HOT, least=-1e-3)
DECOUPLED = DECOUPLED._replace(shapes={"soft": SOFT})
GAMMAS = [{"gamma": 0.1}, {"gamma": 1.0}]
EMBEDDINGS = pair(6, 5)
ZERO_AND_LARGE = scaled(0.0, 1e4)

CASES = {
    "abkd_loss": Case(
        [LOGITS],
        extremes=ALONE,
        extreme_settings=[
            {"alpha": alpha, "beta": beta, "temperature": 1.0}
            for alpha, beta in [(0.8, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
        ],
    ),
    "at_loss": Case([MAPS], [{}, {"p": 1}, {"p": 3}], 2, ZERO_AND_LARGE, [{"p": 1}, {"p": 2}, {"p": 4}]),
    "binary_kd_loss": Case([LOGITS], extremes=ALONE),
    "catkd_loss": Case(
        [pair(2, 3, 4, 4, other=(2, 3, 8, 8))],
        [{}, {"normalize": False}],
        extremes=scaled(0.0, 1e-20, 1e4, x=pair(2, 3, 4, 4, other=(2, 3, 8, 8))),
    ),
    "crd_loss": Case(
        [(normal(4), normal(4, 5))],
        [{"num_data": 30}],
        extremes=[(torch.full((2,), x), torch.full((2, 3), x)) for x in (1e4, -1e4)],
        extreme_settings=[{"num_data": 10}],
        extreme_leaves=2,
    ),
    "crld_loss": Case([LOGITS], extremes=ALONE),
    "cwd_loss": Case([pair(2, 3, 3, 2)], extremes=scaled(0.0, 1e4, x=pair(2, 3, 4, 4))),
    "deepkd_loss": Case(
        [(*LOGITS, IDS)], [{"k": 3}], extremes=WITH_IDS, extreme_settings=[{"k": 1}, {"k": 2}]
    ),
    "deit_loss": Case(
        [LOGITS], [{}, {"hard": False}], 1, ALONE, [{"hard": True}, {"hard": False, "temperature": 1.0}]
    ),
    "dist_loss": Case([pair(6, 7)], extremes=ALONE, extreme_settings=HOT),
    "dkd_loss": DECOUPLED,
    "gdkd_loss": Case(
        [LOGITS],
        [{}, {"k": 1}, {"k": 4}, {"k": 7}],
        extremes=ALONE,
        extreme_settings=[{"k": 1}, {"k": 2}, {"k": 5}],
        least=-1e-3,
    ),
    "hcl_loss": Case([tuple([x] for x in pair(2, 3, 6, 6))], extremes=scaled(0.0, 1e4, x=(MAPS[0], MAPS[0]))),
    "ikl_loss": Case(
        [(*LOGITS, SOFT), LOGITS], leaves=3, extremes=ALONE, extreme_settings=[{"weight_temperature": 1.0}]
    ),
    "itrd_correlation_loss": Case([pair(6, 4)], extremes=scaled(0.0, 1e4, x=pair(6, 4))),
    "itrd_mutual_information_loss": Case([pair(6, 4)], extremes=scaled(0.0, 1e4, x=pair(6, 4))),
    # The second stage has fewer rows C·H than columns.
    "kdsvd_loss": Case([POSITIVE], [{"k": 1}, {"k": 2}], leaves=1),
    "kd_loss": Case([LOGITS], extremes=ALONE, extreme_settings=HOT, least=-1e-3),
    "luminet_loss": Case([LOGITS], extremes=ALONE, extreme_settings=[{"temperature": 0.7}]),
    "mlkd_loss": Case([LOGITS], extremes=ALONE),
    "multilabel_dkd_loss": Case([(*LOGITS, (SOFT > 0.14).double())], extremes=[soft(*x) for x in BATCHES]),
    "nd_loss": Case([(*EMBEDDINGS, normal(7, 5), IDS)], shapes={"own_rows": (2,), "soft": SOFT}),
    "nkd_loss": Case([(*LOGITS, IDS), (*LOGITS, SOFT)], extremes=WITH_TARGETS, shapes={"soft": SOFT}),
    "normkd_loss": Case([LOGITS], extremes=ALONE, dtypes=(torch.bfloat16, torch.float32, torch.float64)),
    "nst_loss": Case([MAPS], extremes=ZERO_AND_LARGE),
    "ofa_loss": Case(
        [(*LOGITS, IDS)],
        [{"gamma": 1.5}, {"gamma": 1.0}],
        extremes=WITH_TARGETS,
        extreme_settings=[{"gamma": 1.0}, {"gamma": 1.5}],
        extreme_leaves=2,
        shapes={"soft": SOFT},
    ),
    "ofd_loss": Case([(*pair(3, 4, 2, 5), -uniform(4))]),
    "pkt_loss": Case(
        [pair(5, 4, other=(5, 7))],
        extremes=[
            (torch.tensor(rows), VECTORS)
            for rows in ([[0.0, 0.0], [1e4, 1e4], [-1e4, -1e4]], [[0.0, 0.0]] * 3, [[2.0, 1.0]] * 3)
        ],
    ),
    "rkd_loss": Case(
        [pair(5, 4, other=(5, 7))],
        extremes=[
            (torch.tensor(rows), VECTORS)
            for rows in ([[0.0, 0.0]] * 3, [[1e4, -1e4], [-1e4, 1e4], [1e4, -1e4]])
        ],
    ),
    "pld_loss": Case([(*LOGITS, IDS)], extremes=WITH_IDS, extreme_settings=HOT, least=-1e-3),
    "rld_loss": Case([(*LOGITS, IDS)], extremes=WITH_IDS, extreme_settings=HOT, least=-1e-3),
    "semckd_loss": Case([(uniform(5, 2, 3), normal(5, 2, 3).softmax(2))]),
    "simkd_loss": Case([pair(2, 3, 2, 4, other=(2, 3, 4, 4))]),
    "sp_loss": Case(
        [pair(4, 3, 2, other=(4, 5))],
        extremes=scaled(0.0, 1e4, x=pair(4, 256, 8, 8, other=(4, 9))),
        shapes={"any_rank": True},
    ),
    "srd_loss": Case([EMBEDDINGS], extremes=scaled(0.0, 1e4, x=EMBEDDINGS)),
    "srrl_loss": Case([(*EMBEDDINGS, normal(3, 5))], leaves=3, shapes={"own_rows": (2,)}),
    "tokens_loss": Case(
        [EMBEDDINGS],
        [{"distance": name} for name in ("cosine", "smooth_l1", "l2")],
        extremes=scaled(0.0, 1e4, x=EMBEDDINGS),
    ),
    "ttm_loss": Case([LOGITS], extremes=ALONE, extreme_settings=GAMMAS),
    "vid_loss": Case([(normal(3, 4, 2, 2), 0.1 + uniform(4), normal(3, 4, 2, 2, seed=1))], leaves=3),
    "vkd_loss": Case([EMBEDDINGS], extremes=scaled(0.0, 1e4, x=EMBEDDINGS)),
    "wkd_f_loss": Case([pair(3, 4, 7, 6, other=(3, 4, 5, 5))], [{"grid": 2}]),
    "wkd_l_loss": Case(
        [(*LOGITS, IDS, DISTANCES)],
        [{"weight": 3.0, "regularization": 0.5}],
        extremes=[(*x, 1 - torch.eye(x[0].shape[1])) for x in WITH_IDS],
        shapes={"own_rows": (3,)},
    ),
    "wttm_loss": Case([LOGITS], extremes=ALONE, extreme_settings=GAMMAS),
}

SAMPLES = "reduction='mean', mask=None)"
TARGETS = "reduction='mean', ignore_index=-100, mask=None)"
SIGNATURES = {
    "abkd_loss": f"(student_logits, teacher_logits, *, alpha=0.8, beta=0.3, temperature=4.0, {SAMPLES}",
    "at_loss": "(student_features, teacher_features, *, p=2)",
    "binary_kd_loss": f"(student_logits, teacher_logits, *, temperature=1.0, {SAMPLES}",
    "catkd_loss": "(student_cams, teacher_cams, *, resolution=2, normalize=True)",
    "crd_loss": "(positive, negatives, *, num_data)",
    "crld_loss": "(student_logits, teacher_logits, *, within_weight=2.0, cross_weight=0.5, temperature=4.0, "
    "weak_threshold=0.9, strong_threshold=0.2)",
    "cwd_loss": "(student, teacher, *, temperature=4.0)",
    "deepkd_loss": "(student_logits, teacher_logits, target, *, k, alpha=1.0, beta=8.0, temperature=4.0, "
    f"{TARGETS}",
    "deit_loss": "(student_logits, teacher_logits, *, hard=True, temperature=3.0)",
    "dist_loss": "(student_logits, teacher_logits, *, beta=2.0, gamma=2.0, temperature=4.0)",
    "dkd_loss": "(student_logits, teacher_logits, target, *, alpha=1.0, beta=8.0, temperature=4.0, "
    f"{TARGETS}",
    "gdkd_loss": "(student_logits, teacher_logits, *, w0=1.0, w1=1.0, w2=8.0, k=5, temperature=4.0, "
    f"{SAMPLES}",
    "hcl_loss": "(student_features, teacher_features)",
    "ikl_loss": "(student_logits, teacher_logits, weights=None, *, alpha=1.0, beta=8.0, temperature=4.0, "
    f"weight_temperature=100.0, {SAMPLES}",
    "itrd_correlation_loss": "(student_embedding, teacher_embedding, *, alpha=1.01)",
    "itrd_mutual_information_loss": "(student_embedding, teacher_embedding)",
    "kd_loss": f"(student_logits, teacher_logits, target=None, *, temperature=4.0, {TARGETS}",
    "kdsvd_loss": "(student_features, teacher_features, *, k=1)",
    "luminet_loss": "(student_logits, teacher_logits, *, temperature=4.0)",
    "mlkd_loss": "(student_logits, teacher_logits, *, temperatures=(2.0, 3.0, 4.0, 5.0, 6.0))",
    "multilabel_dkd_loss": "(student_logits, teacher_logits, target, *, alpha=1.0, beta=1.0, "
    f"temperature=1.0, {SAMPLES}",
    "nd_loss": "(student_embedding, teacher_embedding, class_means, target)",
    "nkd_loss": f"(student_logits, teacher_logits, target, *, gamma=3.5, temperature=3.0, {TARGETS}",
    "normkd_loss": f"(student_logits, teacher_logits, *, temperature=2.0, {SAMPLES}",
    "nst_loss": "(student_features, teacher_features)",
    "ofa_loss": f"(student_logits, teacher_logits, target, *, gamma=1.0, temperature=1.0, {TARGETS}",
    "ofd_loss": "(student_feature, teacher_feature, margin)",
    "ofd_margin": "(batch_norm)",
    "pkt_loss": "(student_embedding, teacher_embedding)",
    "rkd_loss": "(student_embedding, teacher_embedding, *, distance_weight=25.0, angle_weight=50.0)",
    "pld_loss": f"(student_logits, teacher_logits, target, *, temperature=1.0, {TARGETS}",
    "rld_loss": "(student_logits, teacher_logits, target, *, alpha=1.0, beta=8.0, temperature=4.0, "
    f"confidence_temperature=4.0, {TARGETS}",
    "semckd_loss": "(distances, attention)",
    "simkd_loss": "(student_feature, teacher_feature)",
    "sp_loss": "(student_feature, teacher_feature)",
    "srd_loss": "(student_embedding, teacher_embedding, *, eps=0.0001)",
    "srrl_loss": "(student_embedding, teacher_embedding, classifier_weight, *, feature_weight=1.0, "
    "regression_weight=1.0)",
    "tokens_loss": "(student_tokens, teacher_tokens, *, distance='cosine')",
    "ttm_loss": f"(student_logits, teacher_logits, *, gamma=0.1, {SAMPLES}",
    "vid_loss": "(predicted_mean, predicted_variance, teacher_feature)",
    "vkd_loss": "(student_embedding, teacher_embedding)",
    "wkd_f_loss": "(student_map, teacher_map, *, mean_weight=4.0, grid=1, eps=1e-05)",
    "wkd_l_loss": "(student_logits, teacher_logits, target, distances, *, weight=600.0, temperature=8.0, "
    f"regularization=0.05, iterations=10, {TARGETS}",
    "wttm_loss": f"(student_logits, teacher_logits, *, gamma=0.2, {SAMPLES}",
}
KINDS = [(name, i) for name, case in CASES.items() for i in range(len(case.inputs))]
every_loss = pytest.mark.parametrize(("name", "kind"), KINDS)


def cast(inputs, dtype):
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


def with_leaves(inputs, count):
    """A copy of the inputs, and the tensors in the first `count` of them, which require a gradient."""
    leaves, spec = tree_flatten(inputs[:count])
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    return [*tree_unflatten(leaves, spec), *inputs[count:]], leaves


def test_every_loss_has_its_signature():
    assert {name: signature(getattr(functional, name)) for name in functional.__all__} == SIGNATURES
    assert set(functional.__all__) - set(CASES) == {"ofd_margin"}


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_those_of_the_annotations(name):
    case = CASES[name]
    check_shapes(name, *case.inputs[0], **case.settings[0], **case.shapes)


@every_loss
def test_gradient(name, kind):
    loss, case = getattr(functional, name), CASES[name]
    inputs = case.inputs[kind]
    count = case.leaves if len(inputs) >= case.leaves else 1  # IKL's own weights have no gradient
    _, spec = tree_flatten(inputs[:count])
    for settings in case.settings:
        _, leaves = with_leaves(inputs, count)
        assert gradcheck(
            lambda *x, more=settings: loss(*tree_unflatten(x, spec), *inputs[count:], **more), leaves
        )


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_promoted(name, kind, dtype, autocast):
    loss, case = getattr(functional, name), CASES[name]
    inputs, more = cast(case.inputs[kind], dtype), case.settings[0]
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        value = loss(*inputs, **more)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(*cast(inputs, torch.float32), **more), rtol=0, atol=0)


EXTREMES = [(name, dtype) for name, case in CASES.items() if case.extremes for dtype in case.dtypes]


@pytest.mark.parametrize(("name", "dtype"), EXTREMES)
def test_extremes_stay_finite(name, dtype):
    loss, case = getattr(functional, name), CASES[name]
    for extreme in case.extremes:
        for more in case.extreme_settings:
            inputs, leaves = with_leaves(cast(extreme, dtype), case.extreme_leaves)
            value = loss(*inputs, **more)
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.isfinite(value), (inputs, more)
            assert value >= case.least, (inputs, more)
            for gradient in torch.autograd.grad(value, leaves):
                assert torch.isfinite(gradient).all(), (inputs, more)


@every_loss
def test_compiles_whole(name, kind):
    """Without a graph break, with the value and the gradient of the eager loss."""
    loss, case = getattr(functional, name), CASES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, loss):
        inputs, leaves = with_leaves(case.inputs[kind], 1)
        value = function(*inputs, **case.settings[0])
        results.append((value, torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)
