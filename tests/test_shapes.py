"""The shapes in the losses' signatures hold: jaxtyping checks them here, and nowhere at run time."""

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from mdistiller import functional

B, C = 4, 5
LOGITS = (torch.randn(B, C), torch.randn(B, C))
LABELS = torch.zeros(B, dtype=torch.int64)
MAPS = (torch.randn(B, 6, 8, 8), torch.randn(B, 6, 8, 8))
VECTORS = (torch.randn(B, 6), torch.randn(B, 6))

# Valid arguments of every loss. `ofd_margin` takes a module and no tensor.
ARGUMENTS = {
    "at_loss": ([MAPS[0]], [MAPS[1]]),
    "catkd_loss": MAPS,
    "crd_loss": (torch.rand(B), torch.rand(B, 9)),
    "crld_loss": LOGITS,
    "dist_loss": LOGITS,
    "dkd_loss": (*LOGITS, LABELS),
    "gdkd_loss": LOGITS,
    "hcl_loss": ([MAPS[0]], [MAPS[1]]),
    "itrd_correlation_loss": VECTORS,
    "itrd_mutual_information_loss": VECTORS,
    "kd_loss": LOGITS,
    "kdsvd_loss": ([MAPS[0], MAPS[0]], [MAPS[1], MAPS[1]]),
    "mlkd_loss": LOGITS,
    "nckd_loss": (*LOGITS, LABELS),
    "nkd_loss": (*LOGITS, LABELS),
    "normkd_loss": LOGITS,
    "nst_loss": ([MAPS[0]], [MAPS[1]]),
    "ofa_loss": (*LOGITS, LABELS),
    "ofd_loss": (*MAPS, -torch.rand(6)),
    "pkt_loss": VECTORS,
    "rkd_loss": VECTORS,
    "rld_loss": (*LOGITS, LABELS),
    "semckd_loss": (torch.rand(B, 3, 2), torch.rand(B, 3, 2)),
    "simkd_loss": MAPS,
    "sp_loss": MAPS,
    "srrl_loss": (*VECTORS, torch.randn(C, 6)),
    "tckd_loss": (*LOGITS, LABELS),
    "ttm_loss": LOGITS,
    "vid_loss": (MAPS[0], torch.rand(6), MAPS[1]),
    "wttm_loss": LOGITS,
}
SOFT = ["dkd_loss", "nckd_loss", "nkd_loss", "ofa_loss", "tckd_loss"]
KEYWORDS = {"crd_loss": {"num_data": 50}}


def call(name, *arguments):
    checked = jaxtyped(typechecker=beartype)(getattr(functional, name))
    return checked(*arguments, **KEYWORDS.get(name, {}))


def broken(argument, change):
    return [change(x) for x in argument] if isinstance(argument, list) else change(argument)


def test_every_loss_is_here():
    assert {*ARGUMENTS, "ofd_margin"} == set(functional.__all__)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_right_shapes_pass(name):
    assert call(name, *ARGUMENTS[name]).shape == ()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_shapes_do_not(name):
    arguments = ARGUMENTS[name]
    for i, argument in enumerate(arguments):
        before, after = arguments[:i], arguments[i + 1 :]
        if name != "sp_loss":  # takes features of any rank
            with pytest.raises(TypeCheckError):
                call(name, *before, broken(argument, lambda x: x[None]), *after)
        if (name, i) != ("srrl_loss", 2):  # nothing else has as many rows as there are classes
            with pytest.raises(TypeCheckError):
                call(name, *before, broken(argument, lambda x: x[:-1]), *after)


@pytest.mark.parametrize("name", SOFT)
def test_targets_are_ids_or_rows(name):
    soft = torch.full((B, C), 0.2)
    assert call(name, *LOGITS, soft).shape == ()
    with pytest.raises(TypeCheckError):
        call(name, *LOGITS, soft[:, None])
