"""Distillation methods: one file a paper, with its pure losses and its `Method`."""

from mdistiller.methods.at import AT, ATConfig, at_loss
from mdistiller.methods.base import LogitMethod, Method, MethodConfig
from mdistiller.methods.catkd import CATKD, CATKDConfig, catkd_loss
from mdistiller.methods.compose import Average, Wrapper, WrapperConfig
from mdistiller.methods.crd import CRD, CRDConfig, crd_loss
from mdistiller.methods.crld import CRLD, CRLDConfig, crld_loss
from mdistiller.methods.ctkd import CTKD, CTKDConfig
from mdistiller.methods.dist import DIST, DISTConfig, dist_loss
from mdistiller.methods.dkd import DKD, DKDConfig, dkd_loss, nckd_loss, tckd_loss
from mdistiller.methods.eskd import ESKD, ESKDConfig
from mdistiller.methods.features import FeatureConfig, FeatureMethod
from mdistiller.methods.fitnet import FitNet, FitNetConfig
from mdistiller.methods.gather import gather
from mdistiller.methods.gdkd import GDKD, GDKDConfig, gdkd_loss
from mdistiller.methods.itrd import (
    ITRD,
    ITRDConfig,
    itrd_correlation_loss,
    itrd_mutual_information_loss,
)
from mdistiller.methods.kd import KD, KDConfig, kd_loss
from mdistiller.methods.kdsvd import KDSVD, KDSVDConfig, kdsvd_loss
from mdistiller.methods.lskd import LSKD, LSKDConfig, standardise
from mdistiller.methods.mlkd import MLKD, MLKDConfig, mlkd_loss
from mdistiller.methods.nkd import NKD, NKDConfig, nkd_loss
from mdistiller.methods.none import NoDistillation, NoneConfig
from mdistiller.methods.normkd import NormKD, NormKDConfig, normkd_loss
from mdistiller.methods.nst import NST, NSTConfig, nst_loss
from mdistiller.methods.ofa import OFA, OFAConfig, ofa_loss
from mdistiller.methods.ofd import OFD, OFDConfig, ofd_loss, ofd_margin
from mdistiller.methods.pkt import PKT, PKTConfig, pkt_loss
from mdistiller.methods.registry import get_method, list_methods, load_plugin, register_method
from mdistiller.methods.reviewkd import ReviewKD, ReviewKDConfig, hcl_loss
from mdistiller.methods.rkd import RKD, RKDConfig, rkd_loss
from mdistiller.methods.rld import RLD, RLDConfig, rld_loss
from mdistiller.methods.sdd import SDD, SDDConfig
from mdistiller.methods.semckd import SemCKD, SemCKDConfig, semckd_loss
from mdistiller.methods.simkd import ReusedClassifier, SimKD, SimKDConfig, simkd_loss
from mdistiller.methods.sp import SP, SPConfig, sp_loss
from mdistiller.methods.srrl import SRRL, SRRLConfig, srrl_loss
from mdistiller.methods.ttm import TTM, WTTM, TTMConfig, WTTMConfig, ttm_loss, wttm_loss
from mdistiller.methods.vid import VID, VIDConfig, vid_loss

__all__ = [
    "AT",
    "CATKD",
    "CRD",
    "CRLD",
    "CTKD",
    "DIST",
    "DKD",
    "ESKD",
    "GDKD",
    "ITRD",
    "KD",
    "KDSVD",
    "LSKD",
    "MLKD",
    "NKD",
    "NST",
    "OFA",
    "OFD",
    "PKT",
    "RKD",
    "RLD",
    "SDD",
    "SP",
    "SRRL",
    "TTM",
    "VID",
    "WTTM",
    "ATConfig",
    "Average",
    "CATKDConfig",
    "CRDConfig",
    "CRLDConfig",
    "CTKDConfig",
    "DISTConfig",
    "DKDConfig",
    "ESKDConfig",
    "FeatureConfig",
    "FeatureMethod",
    "FitNet",
    "FitNetConfig",
    "GDKDConfig",
    "ITRDConfig",
    "KDConfig",
    "KDSVDConfig",
    "LSKDConfig",
    "LogitMethod",
    "MLKDConfig",
    "Method",
    "MethodConfig",
    "NKDConfig",
    "NSTConfig",
    "NoDistillation",
    "NoneConfig",
    "NormKD",
    "NormKDConfig",
    "OFAConfig",
    "OFDConfig",
    "PKTConfig",
    "RKDConfig",
    "RLDConfig",
    "ReusedClassifier",
    "ReviewKD",
    "ReviewKDConfig",
    "SDDConfig",
    "SPConfig",
    "SRRLConfig",
    "SemCKD",
    "SemCKDConfig",
    "SimKD",
    "SimKDConfig",
    "TTMConfig",
    "VIDConfig",
    "WTTMConfig",
    "Wrapper",
    "WrapperConfig",
    "at_loss",
    "catkd_loss",
    "crd_loss",
    "crld_loss",
    "dist_loss",
    "dkd_loss",
    "gather",
    "gdkd_loss",
    "get_method",
    "hcl_loss",
    "itrd_correlation_loss",
    "itrd_mutual_information_loss",
    "kd_loss",
    "kdsvd_loss",
    "list_methods",
    "load_plugin",
    "mlkd_loss",
    "nckd_loss",
    "nkd_loss",
    "normkd_loss",
    "nst_loss",
    "ofa_loss",
    "ofd_loss",
    "ofd_margin",
    "pkt_loss",
    "register_method",
    "rkd_loss",
    "rld_loss",
    "semckd_loss",
    "simkd_loss",
    "sp_loss",
    "srrl_loss",
    "standardise",
    "tckd_loss",
    "ttm_loss",
    "vid_loss",
    "wttm_loss",
]
