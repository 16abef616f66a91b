"""The built-in tasks, a package each. They are imported when they are asked for."""

FAMILIES = {
    **dict.fromkeys(("cifar10", "cifar100", "digits", "folder", "imagenet"), "classification"),
    "embed": "embed",
    "multilabel": "multilabel",
    "tiny-imagenet": "classification",
    **dict.fromkeys(("coco", "small"), "detection"),
    **dict.fromkeys(("cityscapes-seg", "coco-seg", "voc-seg"), "segmentation"),
}
"""Task of each family of recipes, which the task's module `recipes` registers."""

EXPERIMENTS = ("classification",)
"""Tasks whose module `experiments` registers experiments."""
