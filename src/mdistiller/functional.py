"""Every pure distillation loss: tensors in, a scalar out, no state."""

from mdistiller.methods.dkd import dkd_loss, nckd_loss, tckd_loss
from mdistiller.methods.kd import kd_loss

__all__ = ["dkd_loss", "kd_loss", "nckd_loss", "tckd_loss"]
