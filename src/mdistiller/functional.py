"""Pure distillation losses: functions of tensors without state.

A loss also has a gradient for the teacher, so the teacher's tensors should be detached (`torch.no_grad()` or
`detach()`).
"""

from mdistiller.methods.abkd import abkd_loss
from mdistiller.methods.at import at_loss
from mdistiller.methods.binary_kd import binary_kd_loss, multilabel_dkd_loss
from mdistiller.methods.catkd import catkd_loss
from mdistiller.methods.crd import crd_loss
from mdistiller.methods.crld import crld_loss
from mdistiller.methods.cwd import cwd_loss
from mdistiller.methods.deepkd import deepkd_loss
from mdistiller.methods.deit import deit_loss
from mdistiller.methods.dist import dist_loss
from mdistiller.methods.dkd import dkd_loss, nckd_loss, tckd_loss
from mdistiller.methods.gdkd import gdkd_loss
from mdistiller.methods.ikl import ikl_loss
from mdistiller.methods.itrd import itrd_correlation_loss, itrd_mutual_information_loss
from mdistiller.methods.kd import kd_loss
from mdistiller.methods.kdsvd import kdsvd_loss
from mdistiller.methods.linear import linear_dkd_loss, linear_kd_loss
from mdistiller.methods.luminet import luminet_loss
from mdistiller.methods.mlkd import mlkd_loss
from mdistiller.methods.nd import nd_loss
from mdistiller.methods.nkd import nkd_loss
from mdistiller.methods.normkd import normkd_loss
from mdistiller.methods.nst import nst_loss
from mdistiller.methods.ofa import ofa_loss
from mdistiller.methods.ofd import ofd_loss, ofd_margin
from mdistiller.methods.pkt import pkt_loss
from mdistiller.methods.pld import pld_loss
from mdistiller.methods.reviewkd import hcl_loss
from mdistiller.methods.rkd import rkd_loss
from mdistiller.methods.rld import rld_loss
from mdistiller.methods.semckd import semckd_loss
from mdistiller.methods.simkd import simkd_loss
from mdistiller.methods.sp import sp_loss
from mdistiller.methods.srd import srd_loss
from mdistiller.methods.srrl import srrl_loss
from mdistiller.methods.tokens import tokens_loss
from mdistiller.methods.ttm import ttm_loss, wttm_loss
from mdistiller.methods.vid import vid_loss
from mdistiller.methods.vkd import vkd_loss
from mdistiller.methods.wkd import wkd_f_loss, wkd_l_loss

__all__ = [
    "abkd_loss",
    "at_loss",
    "binary_kd_loss",
    "catkd_loss",
    "crd_loss",
    "crld_loss",
    "cwd_loss",
    "deepkd_loss",
    "deit_loss",
    "dist_loss",
    "dkd_loss",
    "gdkd_loss",
    "hcl_loss",
    "ikl_loss",
    "itrd_correlation_loss",
    "itrd_mutual_information_loss",
    "kd_loss",
    "kdsvd_loss",
    "linear_dkd_loss",
    "linear_kd_loss",
    "luminet_loss",
    "mlkd_loss",
    "multilabel_dkd_loss",
    "nckd_loss",
    "nd_loss",
    "nkd_loss",
    "normkd_loss",
    "nst_loss",
    "ofa_loss",
    "ofd_loss",
    "ofd_margin",
    "pkt_loss",
    "pld_loss",
    "rkd_loss",
    "rld_loss",
    "semckd_loss",
    "simkd_loss",
    "sp_loss",
    "srd_loss",
    "srrl_loss",
    "tckd_loss",
    "tokens_loss",
    "ttm_loss",
    "vid_loss",
    "vkd_loss",
    "wkd_f_loss",
    "wkd_l_loss",
    "wttm_loss",
]
