"""Recipes for images without labels."""

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig
from mdistiller.models import ModelConfig
from mdistiller.recipes.family import Family, register_family
from mdistiller.tasks.embed.config import EmbedConfig, EmbedData


def embed(model: str) -> EmbedConfig:
    """Returns the run of a student on images without labels; the recipe adds its teacher."""
    return EmbedConfig(
        data=EmbedData(kind="folder"),
        augment=AugmentConfig(padding=None),
        student=ModelConfig(name=model),
        optim=OptimConfig(
            name="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", lr_warmup=0.05, norm_decay=False
        ),
        epochs=100,
        batch_size=128,
        precision="auto",
    )


class EmbedFamily(Family):
    """Recipes without labels."""

    Config = EmbedConfig
    labeled = False


register_family(
    "embed",
    EmbedFamily(embed, ("timm/vit_small_patch14_dinov2_timm/resnet18",), photographs=True, method="tokens"),
)
