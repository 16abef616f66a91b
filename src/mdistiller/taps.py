"""Read named intermediate features of any `nn.Module`.

A tap name is either canonical (`stem`, `stage1` … `stageN`, `stageN.preact`, `pooled`; looked up in the
model's own table, timm's `feature_info` or the torchvision tables) or a place: a dotted module path,
whose output is read, or `PATH:input` for what goes into it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError, MDistillerError, TapError, UnknownNameError
from mdistiller.models.external import tap_points
from mdistiller.types import Outputs


class _Recorder:
    """Features of the pass under way; idle between passes, so that it keeps no tensor alive."""

    def __init__(self) -> None:
        self.active = False
        self.features: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}

    def begin(self) -> None:
        self.features = {}
        self.versions = {}
        self.active = True

    def end(self) -> None:
        self.active = False
        self.features = {}
        self.versions = {}

    def record(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TapError(
                f"tap {name!r} reads a {type(value).__name__}, not a tensor; tap a module inside of it"
            )
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
                    f"tap {name!r} was changed in place after it was read (often by nn.ReLU(inplace=True) "
                    "behind it); set inplace=False there, or tap another place"
                )
        return {n: self.features[n] for n in names}


class _Hook:
    """A forward (pre-)hook as an object: closures would break `deepcopy` and `pickle` of the model."""

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self.recorder = recorder
        self.name = name


class _OutputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recorder.active:
            self.recorder.record(self.name, output)


class _InputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.recorder.active:
            self.recorder.record(self.name, args[0] if args else None)


def tap_names(names: Iterable[str]) -> tuple[str, ...]:
    """Tap names as a tuple.

    Raises:
        ConfigError: a single name, whose letters would be taken for names.
    """
    if isinstance(names, str):
        raise ConfigError(f"taps are a list of names, such as [{names!r}]; got the text {names!r}")
    return tuple(names)


def resolve(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The place in `model` that each tap name stands for.

    Raises:
        UnknownNameError: a name is neither canonical for this model nor a module of it.
        ConfigError: a text instead of a list of names.
    """
    table = tap_points(model)
    modules = dict(model.named_modules())
    places = {}
    for name in tap_names(names):
        place = table.get(name, name)
        path, _, side = place.partition(":")
        if not path or path not in modules or side not in ("", "input"):
            raise UnknownNameError("tap", name, [*table, *(m for m in modules if m)])
        places[name] = place
    return places


def logits_of(result: Any) -> Tensor:
    """The logits in what a model returned: the tensor itself, or its attribute `logits`.

    Raises:
        TapError: it is neither.
    """
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor):
        raise TapError(f"the model returns {type(result).__name__}; expected logits [B, classes]")
    return logits


class TappedModel(nn.Module):
    """A model whose call gives `Outputs(logits, features)`; its state dict is the model's own.

    Args:
        model: any module whose output is logits [B, classes] (or has them as `.logits`).
        names: tap names; `features` has them in this order.

    Raises:
        UnknownNameError: a name that the model does not have.
        ConfigError: a text instead of a list of names.
        TapError: on a forward pass, when a place was not reached, gives no tensor, or its tensor was
            changed in place afterwards.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] = ()) -> None:
        super().__init__()
        if isinstance(model, TappedModel):
            raise ConfigError("this model is tapped already; tap the model itself (`tapped.model`)")
        self.names = tuple(dict.fromkeys(tap_names(names)))
        places = resolve(model, self.names)
        self.model = model
        self._recorder = _Recorder()
        self._handles = []
        modules = dict(model.named_modules())
        for name, place in places.items():
            path, _, side = place.partition(":")
            if side:
                handle = modules[path].register_forward_pre_hook(_InputHook(self._recorder, name))
            else:
                handle = modules[path].register_forward_hook(_OutputHook(self._recorder, name))
            self._handles.append(handle)
        self.register_state_dict_post_hook(strip_prefix)
        self.register_load_state_dict_pre_hook(add_prefix)

    def forward(self, image: Tensor) -> Outputs:
        """Logits and tapped features of a batch of images [B, C, H, W]."""
        self._recorder.begin()
        try:
            result = self.model(image)
            features = self._recorder.take(self.names)
        finally:
            self._recorder.end()
        return Outputs(logits_of(result), features)

    def untap(self) -> nn.Module:
        """Remove the hooks and give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        return self.model


def strip_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook of a module that wraps another, `model`: keys as if it were that one."""
    inner = f"{prefix}model."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """The way back of `strip_prefix`, before loading."""
    for key in [k for k in state if k.startswith(prefix)]:
        state[f"{prefix}model.{key[len(prefix) :]}"] = state.pop(key)


def tap(model: nn.Module, names: Iterable[str]) -> TappedModel:
    """Wrap `model` so that a call gives `Outputs(logits, features: dict[str, Tensor])`.

    The hooks are set once, here: wrap before the first compiled call. Example::

        tapped = mdistiller.tap(mdistiller.create_model("resnet8x4"), ["stage1", "pooled"])
        logits, features = tapped(torch.randn(2, 3, 32, 32))
        features["pooled"].shape  # [2, 256]

    Raises:
        UnknownNameError: a name that is neither canonical for the model nor a module path in it.
        ConfigError: a text instead of a list of names.
    """
    return TappedModel(model, names)


def probe(model: nn.Module, names: Iterable[str], input_shape: tuple[int, ...]) -> Outputs:
    """Shapes and dtypes of a model's outputs, as tensors on the `meta` device, for a batch of two.

    Neither the model nor any random state changes: a copy runs in eval mode, without storage where the
    model allows that, else on zeros.

    Args:
        model: the model to look at.
        names: tap names.
        input_shape: (C, H, W) of one image.

    Raises:
        UnknownNameError, TapError: as `TappedModel`.
        ConfigError: the model cannot run on images of this shape.
    """
    names = tap_names(names)
    try:
        return _run_copy(model, names, input_shape, torch.device("meta"))
    except MDistillerError:
        raise
    except Exception:  # it looks at values, or makes tensors on a device of its own
        device = next(model.parameters(), torch.empty(0)).device
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            logits, features = _run_copy(model, names, input_shape, device)
    except MDistillerError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} cannot run on images of shape {tuple(input_shape)} "
            f"(input_shape, or the data's image size): {type(error).__name__}: {error}"
        ) from error
    return Outputs(logits.to("meta"), {name: value.to("meta") for name, value in features.items()})


def _run_copy(
    model: nn.Module, names: tuple[str, ...], input_shape: tuple[int, ...], device: torch.device
) -> Outputs:
    # On meta, parameters and buffers enter the copy without storage: a large model costs no memory.
    memo: dict[int, Any] = {}
    if device.type == "meta":
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad)
        for b in model.buffers():
            memo[id(b)] = b.detach().to(device)
    tapped = TappedModel(copy.deepcopy(model, memo).to(device).eval(), names)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        return tapped(torch.zeros(2, *input_shape, device=device, dtype=dtype))
