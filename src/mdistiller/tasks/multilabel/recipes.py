"""Recipes for one's own images with several classes each."""

from mdistiller.recipes.family import Family, register_family
from mdistiller.tasks.classification import recipes
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.multilabel.config import MultiLabelConfig


def _several(run: ClassificationConfig) -> MultiLabelConfig:
    values = run.model_dump() | {"task": "multilabel", "diagnostics": False}
    return MultiLabelConfig.model_validate(values)


class MultiLabelFamily(Family):
    """Recipes for images with several classes each."""

    Config = MultiLabelConfig


register_family(
    "multilabel",
    MultiLabelFamily(
        lambda model: _several(recipes.folder(model)),
        ("torchvision/resnet50_torchvision/resnet18",),
        method="binary_kd",
        photographs=True,
        finetune=lambda model: _several(recipes.finetune(model)),
    ),
)
