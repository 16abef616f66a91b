"""Recipes of classification, with their published settings."""

from mdistiller.recipes.family import Family, register_family
from mdistiller.tasks.classification.recipes import basic, cifar100, imagenet, tiny_imagenet

register_family(
    "cifar10",
    Family(cifar100.cifar10, cifar100.PAIRS, cifar100.tune_pair, published=cifar100.DATA, own_data=False),
)
register_family(
    "cifar100", Family(cifar100.baseline, cifar100.PAIRS, cifar100.tune_pair, published=cifar100.DATA)
)
register_family("digits", Family(basic.digits, ("resnet20_resnet8",)))
register_family(
    "folder",
    Family(
        basic.folder,
        ("torchvision/resnet50_torchvision/resnet18",),
        basic.tune,
        photographs=True,
        settings="ImageNet's; auto weights are measured before the first step",
        finetune=basic.finetune,
    ),
)
register_family(
    "imagenet",
    Family(
        imagenet.baseline,
        imagenet.PAIRS,
        imagenet.tune_pair,
        imagenet.MODELS,
        imagenet.teacher,
        photographs=True,
        published=imagenet.DATA,
    ),
)
register_family(
    "tiny-imagenet",
    Family(
        tiny_imagenet.baseline, tiny_imagenet.PAIRS, tiny_imagenet.tune_pair, published=tiny_imagenet.DATA
    ),
)
