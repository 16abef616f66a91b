"""Models for small images, with the names and state dicts of megvii-research/mdistiller.

Each works at any input size, because its pooling is global, and has a table `tap_points`.
"""

from mdistiller.models.cifar import mobilenetv2, resnet, resnetv2, shufflenetv1, shufflenetv2, vgg, wrn

__all__ = ["mobilenetv2", "resnet", "resnetv2", "shufflenetv1", "shufflenetv2", "vgg", "wrn"]
