"""Recipes for one's own images with several classes each."""

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.methods import MethodConfig, get_method, method_config
from mdistiller.models import ModelConfig
from mdistiller.recipes.family import Family, register_family
from mdistiller.tasks.classification.recipes.basic import finetune
from mdistiller.tasks.multilabel.config import MultiLabelConfig


def multilabel(model: str) -> MultiLabelConfig:
    """Returns the run of one model on lists of images with several classes each."""
    return MultiLabelConfig(
        data=DataConfig(kind="folder", multi_label=True),
        augment=AugmentConfig(crop="resized", padding=None),
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.05, weight_decay=1e-4, schedule="cosine", lr_warmup=0.05),
        epochs=100,
        precision="auto",
    )


def finetune_multilabel(model: str) -> MultiLabelConfig:
    """Returns the run of `finetune` on lists of images with several classes each."""
    values = finetune(model).model_dump() | {"task": "multilabel", "diagnostics": False}
    return MultiLabelConfig.model_validate(values)


class MultiLabelFamily(Family):
    """Recipes for images with several classes each, with the methods that suit those."""

    def methods(self) -> list[str]:
        return [name for name in super().methods() if not get_method(name).needs.one_class]

    def method_config(self, name: str) -> MethodConfig:
        return method_config(name, MultiLabelConfig.method_class)


register_family(
    "multilabel",
    MultiLabelFamily(
        multilabel,
        ("torchvision/resnet50_torchvision/resnet18",),
        photographs=True,
        finetune=finetune_multilabel,
    ),
)
