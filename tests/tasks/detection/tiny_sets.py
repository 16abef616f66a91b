"""Tiny detectors of transformers, of each kind."""

import torch
from torch import nn

from mdistiller.tasks.detection import models

SIDE = 64
_RT = {
    "size": SIDE,
    **dict.fromkeys(("encoder_hidden_dim", "d_model"), 16),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    "decoder_in_channels": [16] * 3,
    "decoder_layers": 2,
    "num_queries": 20,
    "num_denoising": 8,
}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "layer_type": "basic"}
_HGNET = {
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [8] * 4,
    "stage_out_channels": [8, 16, 16, 16],
    "hidden_sizes": [8, 16, 16, 16],
    "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [1] * 4,
}
TINY = {
    "d_fine": _RT | {"backbone_config": _HGNET},
    "rt_detr": _RT | {"backbone_config": _RESNET},
    "rt_detr_v2": _RT | {"backbone_config": _RESNET},
    "detr": {
        "size": SIDE,
        "d_model": 16,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        "num_queries": 20,
        "auxiliary_loss": True,
        "backbone_config": _RESNET,
    },
    "yolos": {
        "size": SIDE,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [SIDE, SIDE],
        "num_detection_tokens": 20,
    },
}
SQUARE = ("d_fine", "rt_detr", "rt_detr_v2")
LEVELS = {kind: {"stride8": 8, "stride16": 16, "stride32": 32} for kind in SQUARE}
LEVELS |= {"detr": {"stride32": 32}, "yolos": {"stride16": 16}}


def tiny_set(kind, seed=0, classes=4, **options):
    torch.manual_seed(seed)
    return models.create_detector(f"transformers/{kind}", classes, **TINY[kind] | options)


def spread(model):
    """Gives layers that start at zero some weights: else many queries have one box and one score."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model
