"""Pure distillation losses: functions of tensors without state.

A loss also has a gradient for the teacher, so the teacher's tensors should be detached (`torch.no_grad()` or
`detach()`).
"""

from mdistiller.methods.abkd import abkd_loss as abkd_loss
from mdistiller.methods.at import at_loss as at_loss
from mdistiller.methods.binary_kd import (
    binary_kd_loss as binary_kd_loss,
    multilabel_dkd_loss as multilabel_dkd_loss,
)
from mdistiller.methods.catkd import catkd_loss as catkd_loss
from mdistiller.methods.crd import crd_loss as crd_loss
from mdistiller.methods.crld import crld_loss as crld_loss
from mdistiller.methods.cwd import cwd_loss as cwd_loss
from mdistiller.methods.deepkd import deepkd_loss as deepkd_loss
from mdistiller.methods.deit import deit_loss as deit_loss
from mdistiller.methods.dist import dist_loss as dist_loss
from mdistiller.methods.dkd import dkd_loss as dkd_loss
from mdistiller.methods.gdkd import gdkd_loss as gdkd_loss
from mdistiller.methods.ikl import ikl_loss as ikl_loss
from mdistiller.methods.itrd import (
    itrd_correlation_loss as itrd_correlation_loss,
    itrd_mutual_information_loss as itrd_mutual_information_loss,
)
from mdistiller.methods.kd import kd_loss as kd_loss
from mdistiller.methods.kdsvd import kdsvd_loss as kdsvd_loss
from mdistiller.methods.luminet import luminet_loss as luminet_loss
from mdistiller.methods.mlkd import mlkd_loss as mlkd_loss
from mdistiller.methods.nd import nd_loss as nd_loss
from mdistiller.methods.nkd import nkd_loss as nkd_loss
from mdistiller.methods.normkd import normkd_loss as normkd_loss
from mdistiller.methods.nst import nst_loss as nst_loss
from mdistiller.methods.ofa import ofa_loss as ofa_loss
from mdistiller.methods.ofd import ofd_loss as ofd_loss, ofd_margin as ofd_margin
from mdistiller.methods.pkt import pkt_loss as pkt_loss
from mdistiller.methods.pld import pld_loss as pld_loss
from mdistiller.methods.reviewkd import hcl_loss as hcl_loss
from mdistiller.methods.rkd import rkd_loss as rkd_loss
from mdistiller.methods.rld import rld_loss as rld_loss
from mdistiller.methods.semckd import semckd_loss as semckd_loss
from mdistiller.methods.simkd import simkd_loss as simkd_loss
from mdistiller.methods.sp import sp_loss as sp_loss
from mdistiller.methods.srd import srd_loss as srd_loss
from mdistiller.methods.srrl import srrl_loss as srrl_loss
from mdistiller.methods.tokens import tokens_loss as tokens_loss
from mdistiller.methods.ttm import ttm_loss as ttm_loss, wttm_loss as wttm_loss
from mdistiller.methods.vid import vid_loss as vid_loss
from mdistiller.methods.vkd import vkd_loss as vkd_loss
from mdistiller.methods.wkd import wkd_f_loss as wkd_f_loss, wkd_l_loss as wkd_l_loss

__all__ = sorted(name for name in globals() if not name.startswith("_"))
