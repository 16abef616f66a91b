"""Canonical taps of the models of transformers, whose layers change their names from release to release."""

from torch import nn

from mdistiller.models.tap_table import last_linear, tap_table

_CONVOLUTIONAL = ("resnet", "regnet", "convnext", "convnextv2")
_HEADS = ("classifier", "cls_classifier", "score")


def transformers_points(model: nn.Module) -> dict[str, str]:
    """Maps canonical tap names to module paths (see `mdistiller.models.tap_points`).

    The stages are the entries of the outermost list of layers: the stages of ResNet, ConvNeXt and SegFormer,
    the blocks of ViT and BERT. Those of Swin return several tensors, and are no taps.
    """
    modules = dict(model.named_modules())
    kind = getattr(getattr(model, "config", None), "model_type", "")
    prefix = getattr(model, "base_model_prefix", "")
    base = f"{prefix}." if prefix in modules and prefix else ""
    lists = {
        path: len(module)
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and path.startswith(base)
    }
    outermost = min(lists, key=lambda path: path.count("."), default="")
    if outermost.endswith(".patch_embeddings"):  # SegFormer before version 5 ends its stages with norms
        outermost = outermost.replace("patch_embeddings", "layer_norm")
    stages = [f"{outermost}.{i}" for i in range(lists.get(outermost, 0))] if "swin" not in kind else []
    stem = last_map = None
    preacts: list[str] = []
    if kind in _CONVOLUTIONAL:  # the embeddings of others are tokens
        stem = next((base + name for name in ("embedder", "embeddings") if base + name in modules), None)
    if kind in ("resnet", "regnet"):
        last_map = f"{base}pooler:input"
        for stage in stages:
            layers = f"{stage}.layers"
            preacts.append(f"{layers}.{len(list(modules[layers].children())) - 1}.activation:input")
    classifier = last_linear(model)
    if classifier is not None and classifier.split(".")[0] not in _HEADS:
        classifier = None
    return tap_table(stages, stem=stem, preacts=preacts, last_map=last_map, classifier=classifier)
