r"""Channel-wise distillation (Shu, Liu, Gao, Yan, Shen: ICCV 2021, arXiv 2011.13256).

Each channel's map is a distribution over positions, $\phi(y_c) = \sigma(y_c / T)$, and the student's follows
the teacher's: $L = \frac{T^2}{C} \sum_c \sum_i \phi(y^T_c)_i \log \frac{\phi(y^T_c)_i}{\phi(y^S_c)_i}$.
The methods with this loss belong to segmentation and detection.
"""

from jaxtyping import Float
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Scalar, promote
from mdistiller.methods.features import check_shapes
from mdistiller.methods.kd import divergence


def cwd_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], *, temperature: float = 4.0
) -> Scalar:
    r"""Computes the KL divergence of the channels' distributions over positions, times T².

    Args:
        student: map [B, C, H, W], features or logits.
        teacher: map of the same shape.
        temperature: T > 0.

    Returns:
        A scalar in nats, the mean over images and channels.

    Raises:
        ConfigError: maps of different shapes or not [B, C, H, W]; a temperature that is not positive.

    Source: Shu et al., ICCV 2021, equations 3 and 4.
    """
    check_shapes(student, teacher, "B, C, H, W")
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive; got {temperature}")
    s, t = ((promote(x).flatten(2) / temperature).log_softmax(2) for x in (student, teacher))
    return divergence(t, s).sum(2).mean() * temperature**2
