"""Language models of transformers whose labels are those of the next position."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.models.tap_table import without_adapters

# Listed as causal, but their own losses compare logits and labels of one position.
_ALIGNED = {
    "BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM", "MBartForCausalLM", "MarianForCausalLM", "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM", "MvpForCausalLM", "PLBartForCausalLM", "PegasusForCausalLM",
    "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM", "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
}  # fmt: skip


def has_known_logits(model: nn.Module) -> bool:
    """Whether a model comes from a library whose dense logits are [B, T, C] or [B, C, H, W]."""
    return type(without_adapters(model)).__module__.partition(".")[0] in ("torchvision", "transformers")


def predicts_next(model: nn.Module | None) -> bool:
    """Whether transformers compares a model's logits with the labels of the next position.

    The class decides, by transformers' list of causal language models, also that of a model inside another.

    Raises:
        ConfigError: a generating model that transformers does not list.
    """
    # Not `hasattr(model, …)`: wrappers such as PEFT's pass on the attributes of their models.
    modules: Iterable[Any] = () if model is None else model.modules()
    inner = next((module for module in modules if hasattr(type(module), "can_generate")), None)
    if inner is None or not inner.can_generate() or inner.config.is_encoder_decoder:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    kind: Any = CAUSAL.get(type(inner.config), ())
    if not isinstance(inner, kind):
        raise ConfigError(
            f"{type(inner).__name__} generates, and transformers lists no such causal language model, so it "
            "is not known which labels belong to its logits: compare next tokens by Distiller(..., "
            "logits_of=lambda out: out.logits[:, :-1]) with the target labels[:, 1:]"
        )
    return _ALIGNED.isdisjoint(kind.__name__ for kind in type(inner).__mro__)
