"""Taps: named intermediate features of any `nn.Module`.

A tap name is canonical (`stem`, `stage1` … `stageN`, `stageN.preact`, `last_map`, `pooled`; see
`mdistiller.models.tap_points`) or a module path: `PATH` names the module's output, `PATH:input` its first
positional input.
"""

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError, MDistillerError, TapError, UnknownNameError
from mdistiller.models.external import tap_points
from mdistiller.models.own_input import OwnInput
from mdistiller.types import Outputs


class _Recorder:
    """Features of the forward pass in progress; empty between passes, so that no tensor is kept alive.

    Its hooks are partial calls of `record`; closures would break `deepcopy` and `pickle` of the model.
    """

    def __init__(self) -> None:
        self.reset(active=False)

    def reset(self, *, active: bool) -> None:
        self.active = active
        self.features: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}

    def record(self, name: str, module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        if not self.active:
            return
        value = (output or args or (None,))[0]
        if not isinstance(value, Tensor):
            raise TapError(f"tap {name!r} is a {type(value).__name__}, not a tensor; tap a module inside it")
        self.features[name] = value
        if not torch.compiler.is_compiling() and not value.is_inference():
            self.versions[name] = value._version

    def take(self, names: Iterable[str]) -> dict[str, Tensor]:
        missing = [n for n in names if n not in self.features]
        if missing:
            raise TapError(f"tap {missing[0]!r} was not reached in this forward pass")
        for name, version in self.versions.items():
            if self.features[name]._version != version:
                raise TapError(
                    f"tap {name!r} was changed in place after it was read (often by a following "
                    "nn.ReLU(inplace=True)); set inplace=False there, or tap another module"
                )
        return {n: self.features[n] for n in names}


def tap_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns tap names as a tuple; ConfigError for a text instead of a list of names."""
    if isinstance(names, str):
        raise ConfigError(f"taps are a list of names, such as [{names!r}]; got the text {names!r}")
    return tuple(names)


def resolve(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Maps names to module paths; UnknownNameError if one is neither canonical for the model nor a path."""
    if isinstance(model, OwnInput):
        return {name: f"model.{path}" for name, path in resolve(model.model, names).items()}
    table = tap_points(model)
    modules = dict(model.named_modules())
    paths = {}
    for name in tap_names(names):
        path = table.get(name, name)
        module, _, side = path.partition(":")
        if not module or module not in modules or side not in ("", "input"):
            raise UnknownNameError("tap", name, [*table, *(m for m in modules if m)])
        paths[name] = path
    return paths


def logits_of(result: Any) -> Tensor:
    """Returns the logits: the result itself, its attribute `logits` or its key "logits"; else TapError."""
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", result)
    if not isinstance(logits, Tensor):
        raise TapError(
            f"the model returns {type(result).__name__}; expected logits [B, classes]: a tensor, "
            "an attribute `logits` or a key 'logits'"
        )
    return logits


class TappedModel(nn.Module):
    """Model whose call returns `Outputs(logits, features)`, with the state-dict keys of the model itself.

    Args:
        model: Any module whose result holds logits [B, classes], see `logits_of`.
        names: Tap names, in the order of `Outputs.features`.

    Raises:
        UnknownNameError: The model lacks a name.
        ConfigError: A text instead of a list of names, or a model that is tapped already.
        TapError: In a forward pass, when a tapped module was not reached, its value is no tensor or was
            changed in place afterwards, or the result holds no logits.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] = ()) -> None:
        super().__init__()
        if isinstance(model, TappedModel):
            raise ConfigError("this model is tapped already; tap the model itself (`tapped.model`)")
        self.names = tuple(dict.fromkeys(tap_names(names)))
        paths = resolve(model, self.names)
        self.model = model
        self._recorder = _Recorder()
        self._handles = []
        for name, path in paths.items():
            module_path, _, side = path.partition(":")
            module = model.get_submodule(module_path)
            register = module.register_forward_pre_hook if side else module.register_forward_hook
            self._handles.append(register(partial(self._recorder.record, name)))
        self.register_state_dict_post_hook(strip_prefix)
        self.register_load_state_dict_pre_hook(add_prefix)

    def forward(self, inputs: Tensor | Mapping[str, Any]) -> Outputs:
        """Computes logits and features of a tensor ([B, C, H, W] for images) or of `model(**inputs)`."""
        if not self.names:
            result = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
            return Outputs(result if isinstance(result, Tensor) else logits_of(result), {})
        self._recorder.reset(active=True)
        try:
            result = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
            features = self._recorder.take(self.names)
        finally:
            self._recorder.reset(active=False)
        return Outputs(logits_of(result), features)

    def untap(self) -> nn.Module:
        """Removes the hooks and returns the model."""
        for handle in self._handles:
            handle.remove()
        return self.model


def strip_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Removes `model.` from state-dict keys; a post-hook for a module that wraps another as `model`."""
    inner = f"{prefix}model."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Adds `model.` to state-dict keys before loading; the inverse of `strip_prefix`."""
    for key in [k for k in state if k.startswith(prefix)]:
        state[f"{prefix}model.{key[len(prefix) :]}"] = state.pop(key)


def tap(model: nn.Module, names: Iterable[str]) -> TappedModel:
    """Wraps a model so that its call returns `Outputs(logits, features)`; errors as `TappedModel`.

    The model keeps its class, forward, modes, weights and state-dict keys. Hooks are registered here, once,
    so wrap before the first compiled call. Example::

        tapped = mdistiller.tap(mdistiller.create_model("resnet8x4"), ["stage1", "pooled"])
        logits, features = tapped(torch.randn(2, 3, 32, 32))
        features["pooled"].shape  # [2, 256]
    """
    return TappedModel(model, names)


def probe(model: nn.Module, names: Iterable[str], input_shape: tuple[int, ...]) -> Outputs:
    """Computes a model's outputs, as tensors on the `meta` device, for two images of a shape (C, H, W).

    The model and the random state do not change: a copy runs in eval mode on the `meta` device where
    possible, otherwise on zeros on the model's device.

    Raises:
        UnknownNameError, TapError: As `TappedModel`.
        ConfigError: The model cannot run on images of this shape.
    """
    names = tap_names(names)
    try:
        return _run_copy(model, names, input_shape, torch.device("meta"))
    except MDistillerError:
        raise
    except Exception:  # the model branches on values, or creates tensors on a fixed device
        device = next(model.parameters(), torch.empty(0)).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            logits, features = _run_copy(model, names, input_shape, device)
    except MDistillerError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} cannot run on images of shape {tuple(input_shape)} "
            f"(input_shape, or the data's image size): {type(error).__name__}: {error}"
        ) from error
    return Outputs(logits.to("meta"), {name: value.to("meta") for name, value in features.items()})


def without_storage(model: nn.Module) -> nn.Module:
    """Copies a model to the `meta` device, where a large one takes no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo).to("meta")


def _run_copy(
    model: nn.Module, names: tuple[str, ...], shape: tuple[int, ...], device: torch.device
) -> Outputs:
    copied = without_storage(model) if device.type == "meta" else copy.deepcopy(model).to(device)
    tapped = TappedModel(copied.eval(), names)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        return tapped(torch.zeros(2, *shape, device=device, dtype=dtype))
