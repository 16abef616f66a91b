"""Canonical names of taps, and the table from them to module paths."""

import re
from collections.abc import Sequence

from torch import nn

_CONVOLUTIONAL = ("resnet", "regnet", "convnext", "convnextv2")
_HEADS = ("classifier", "cls_classifier", "score")


def tap_table(
    stages: Sequence[str],
    *,
    stem: str | None = None,
    preacts: Sequence[str] = (),
    last_map: str | None = None,
    classifier: str | None = None,
) -> dict[str, str]:
    """Maps `stem`, `stage1.preact`, `stage1` …, `last_map`, `pooled` to module paths, in this order.

    `PATH` names the module's output and `PATH:input` its first positional input. If a module runs several
    times in one forward pass, its last run counts. Names without a path are left out. `pooled` is the input
    of the classifier.
    """
    table = {"stem": stem}
    for i, stage in enumerate(stages, 1):
        if preacts:
            table[f"stage{i}.preact"] = preacts[i - 1]
        table[f"stage{i}"] = stage
    table |= {"last_map": last_map, "pooled": None if classifier is None else f"{classifier}:input"}
    return {name: path for name, path in table.items() if path is not None}


def last_linear(model: nn.Module) -> str | None:
    """Returns the path of a model's last linear layer, adapters included; None if there is none."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return re.split(r"(?:^|\.)(?:base_layer|lora_\w+|modules_to_save)\b", paths[-1])[0] if paths else None


def without_adapters(model: nn.Module) -> nn.Module:
    """Returns the model to which PEFT's module adds adapters; any other model as it is."""
    find = getattr(model, "get_base_model", None)
    return find() if callable(find) else model


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
