"""Taps: named intermediate features of any `nn.Module`.

A tap name is canonical (`stem`, `stage1` … `stageN`, `stageN.preact`, `last_map`, `pooled`; see
`mdistiller.models.tap_points`) or a module path: `PATH` names the module's output, `PATH:input` its first
positional input. Behind a name, `@LAYOUT` says what its axes are where the model does not tell (see
`mdistiller.models.layouts`), as in `blocks.3@tokens/16+1`.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError, MDistillerError, TapError, UnknownNameError
from mdistiller.models.external import tap_points
from mdistiller.models.layouts import MAP, VECTOR, Layout, layout_of, parse_layout
from mdistiller.models.own_input import CHANNELS, OwnInput
from mdistiller.models.tap_table import without_adapters
from mdistiller.types import DataInfo, LogitsOf, Outputs


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

    def record(self, name: str, module: nn.Module, args: tuple[object, ...], *output: object) -> None:
        if not self.active:
            return
        value = (output or args or (None,))[0]
        if isinstance(value, tuple) and len(value) == 1:  # layers of transformers before version 5
            value = value[0]
        if not isinstance(value, Tensor):
            raise TapError(f"tap {name!r} is a {type(value).__name__}, not a tensor; tap a module inside it")
        self.features[name] = value
        if not torch.compiler.is_compiling() and not value.is_inference():
            self.versions[name] = value._version

    def protect(self, module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        """Gives a module that works in place a copy of a feature, before it changes the feature itself."""
        value = args[0] if self.active and args and getattr(module, "inplace", False) else None
        if isinstance(value, Tensor) and any(value is feature for feature in self.features.values()):
            return (value.clone(), *args[1:])
        return None

    def take(self, names: Iterable[str]) -> dict[str, Tensor]:
        missing = [n for n in names if n not in self.features]
        if missing:
            raise TapError(f"tap {missing[0]!r} was not reached in this forward pass")
        for name, version in self.versions.items():
            if self.features[name]._version != version:
                raise TapError(
                    f"tap {name!r} was changed in place after it was read (by a function such as "
                    "F.relu(x, inplace=True)); set inplace=False there, or tap another module"
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
        base, _, given = name.partition("@")
        if given:
            parse_layout(given)
        path = table.get(base, base)
        module, _, side = path.partition(":")
        if not module or module not in modules or side not in ("", "input"):
            # The children of the model and theirs; a layer deep inside has its path from `named_modules`.
            shallow = ", ".join(m for m in modules if m and m.count(".") < 2)
            hint = f"Canonical names: {', '.join(table) or 'none'}. Module paths: {shallow}"
            raise UnknownNameError("tap", name, [*table, *(m for m in modules if m)], hint)
        paths[name] = path
    return paths


def tap_layouts(model: nn.Module, features: Mapping[str, Tensor], data: DataInfo) -> dict[str, Layout]:
    """Returns the layouts of a model's features by tap name; a feature [B, D] is a vector.

    Raises:
        ConfigError: a layout is unknown, or its axes are not the feature's.
    """
    layouts = {}
    for name, path in resolve(model, features).items():
        given = "".join(name.partition("@")[1:])
        if features[name].ndim == 2:
            layouts[name] = VECTOR
        else:
            layouts[name] = MAP if data.are_maps else layout_of(model, path + given)
        layouts[name].check(features[name])
    return layouts


def logits_of(result: object, where: LogitsOf = None) -> Tensor:
    """Returns the logits in a model's result.

    Args:
        result: a tensor, a mapping, a tuple, or an object with attributes.
        where: the entry that holds them: a key (or attribute) or an index, for a result that is no tensor, or
            a function of any result. None: the result itself, its entry `logits`, its entry `out`
            (torchvision's segmentation models), or its only tensor of two or more dimensions.

    Raises:
        TapError: the logits are not found.
    """
    logits: object
    if callable(where):
        logits = where(result)
    elif isinstance(result, Tensor):
        return result
    else:
        logits = _entry(result, where) if where is not None else _find_logits(result)
    if isinstance(logits, Tensor):
        return logits
    given = "" if where is None else f", without a tensor at logits_of={where!r}"
    raise TapError(
        f"the model returns {type(result).__name__}{_contents(result)}{given}; expected logits "
        "[B, classes]: a tensor, an attribute `logits` or a key 'logits'; or name them by "
        "Distiller(..., logits_of=…): a key, an index, or a function of what the model returns"
    )


def logits_if_any(result: object, where: LogitsOf = None) -> Tensor:
    """Returns `logits_of` where that is [B, classes], else an empty tensor: for those who may do without."""
    try:
        found = logits_of(result, where)
    except TapError:
        return torch.empty(0)
    return found if found.ndim == 2 else found.new_empty(0)


def _entry(result: Any, where: str | int) -> object:
    try:
        return result[where]
    except (LookupError, TypeError):
        return getattr(result, where, None) if isinstance(where, str) else None


def _find_logits(result: object) -> object:
    for name in ("logits", "out"):
        value = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    values = result.values() if isinstance(result, Mapping) else result
    tensors = [x for x in values if isinstance(x, Tensor)] if isinstance(values, Iterable) else []
    found = [x for x in tensors if x.ndim > 1]  # losses have none, or one
    return found[0] if len(found) == 1 else None


def _contents(result: object) -> str:
    items: Iterable[tuple[object, object]] = ()
    if isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, tuple | list):
        items = enumerate(result)
    parts = [f"{k!r}: {list(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in items]
    return f" ({', '.join(parts)})" if parts else ""


def argument_names(model: nn.Module) -> frozenset[str] | None:
    """Returns the names of a model's arguments; None if it takes any."""
    if isinstance(model, OwnInput):
        return argument_names(model.model)
    try:
        parameters = inspect.signature(without_adapters(model).forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))


class Taps:
    """Reads logits and named features in the forward passes of a model, which is called as `taps(inputs)`.

    It is no module: the model stays where it is, with its own parameters and state-dict keys.

    Args:
        model: Any module whose result holds logits [B, classes], see `logits_of`.
        names: Tap names, in the order of `Outputs.features`.
        where: The logits in the model's result, see `logits_of`.

    Raises:
        UnknownNameError: The model lacks a name.
        ConfigError: A text instead of a list of names, or a model that is tapped already.
        TapError: In a forward pass, when a tapped module was not reached, its value is no tensor or was
            changed in place afterwards, or the result holds no logits.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] = (), where: LogitsOf = None) -> None:
        if isinstance(model, TappedModel):
            raise ConfigError("this model is tapped already; tap the model itself (`tapped.model`)")
        self.names = tuple(dict.fromkeys(tap_names(names)))
        paths = resolve(model, self.names)
        self.model = model
        self.where = where
        self._arguments = argument_names(model)
        self._recorder = _Recorder()
        self._handles = []
        for name, path in paths.items():
            module_path, _, side = path.partition(":")
            module = model.get_submodule(module_path)
            register = module.register_forward_pre_hook if side else module.register_forward_hook
            self._handles.append(register(partial(self._recorder.record, name)))
        for module in model.modules() if paths else ():  # after those of the taps
            if getattr(module, "inplace", False) is True:
                self._handles.append(module.register_forward_pre_hook(self._recorder.protect))

    def __call__(self, inputs: object) -> Outputs:
        """Computes logits and features of a tensor ([B, C, H, W] for images) or of a mapping of arguments.

        Of a mapping, the model gets the entries that it takes; a single entry under another name is its first
        argument.
        """
        if not self.names:
            result, features = self._call(inputs), {}
        else:
            self._recorder.reset(active=True)
            try:
                result = self._call(inputs)
                features = self._recorder.take(self.names)
            finally:
                self._recorder.reset(active=False)
        if self.where is None and isinstance(result, Tensor):
            return Outputs(result, features)
        return Outputs(logits_of(result, self.where), features)

    def _call(self, inputs: object) -> object:
        if not isinstance(inputs, Mapping):
            return self.model(inputs)
        if self._arguments is None:
            return self.model(**inputs)
        taken = {name: inputs[name] for name in inputs if name in self._arguments}
        if not taken and len(inputs) == 1:
            return self.model(*inputs.values())
        if not taken:
            raise ConfigError(
                f"{type(self.model).__name__} takes {sorted(self._arguments)}, and the batch has "
                f"{list(inputs)}: rename its entries"
            )
        return self.model(**taken)

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()


class TappedModel(nn.Module):
    """Model whose call returns `Outputs(logits, features)`, with the state-dict keys of the model itself.

    Arguments and errors are those of `Taps`.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] = (), where: LogitsOf = None) -> None:
        super().__init__()
        self.taps = Taps(model, names, where)
        self.model = model
        self.register_state_dict_post_hook(strip_prefix)
        self.register_load_state_dict_pre_hook(add_prefix)

    @property
    def names(self) -> tuple[str, ...]:
        """Tap names, in the order of `Outputs.features`."""
        return self.taps.names

    def forward(self, inputs: object) -> Outputs:
        """Computes logits and features, as `Taps`."""
        return self.taps(inputs)

    def untap(self) -> nn.Module:
        """Removes the hooks and returns the model."""
        self.taps.remove()
        return self.model


def strip_prefix(module: nn.Module, state: dict[str, object], prefix: str, metadata: object) -> None:
    """Removes `model.` from state-dict keys; a post-hook for a module that wraps another as `model`."""
    inner = f"{prefix}model."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def add_prefix(module: nn.Module, state: dict[str, object], prefix: str, *args: object) -> None:
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


def probe(
    model: nn.Module, names: Iterable[str], data: DataInfo | tuple[int, ...] | Mapping[str, Tensor] | Tensor
) -> Outputs:
    """Computes a model's outputs, as tensors on the `meta` device, for the data's images.

    The model and the random state do not change: a copy runs in eval mode on the `meta` device where
    possible, otherwise on the model's device.

    Args:
        model: The model.
        names: Tap names.
        data: Facts about the data; or its `input_shape` alone. For a shape (C, H, W) the model runs on two
            images of zeros.

    Raises:
        UnknownNameError, TapError: As `TappedModel`.
        ConfigError: The model cannot run on these inputs.
    """
    names = tap_names(names)
    info = data if isinstance(data, DataInfo) else DataInfo(data)
    if any(hasattr(p, "full_tensor") for p in model.parameters()):  # DTensors, as FSDP2 makes them
        raise ConfigError(
            f"{type(model).__name__} is sharded, and its features' shapes cannot be found: build the "
            "Distiller before fully_shard"
        )
    try:
        return _run_copy(model, names, info, torch.device("meta"))
    except MDistillerError:
        raise
    except Exception:  # the model branches on values, or creates tensors on a fixed device
        device = next(model.parameters(), torch.empty(0)).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            logits, features = _run_copy(model, names, info, device)
    except MDistillerError:
        raise
    except Exception as error:
        shape = info.input_shape
        what = f"images of shape {tuple(shape)}" if isinstance(shape, tuple) else "the example in input_shape"
        channels = shape[0] if isinstance(shape, tuple) and len(shape) == 3 else 3
        advice = "" if channels == 3 else f"; allowed for these images: {CHANNELS} {channels}"
        raise ConfigError(
            f"{type(model).__name__} cannot run on {what} "
            f"(input_shape, or the data's image size): {type(error).__name__}: {error}{advice}"
        ) from error
    return Outputs(logits.to("meta"), {name: value.to("meta") for name, value in features.items()})


def without_storage(model: nn.Module) -> nn.Module:
    """Copies a model to the `meta` device, where a large one takes no memory."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo).to("meta")


def _run_copy(model: nn.Module, names: tuple[str, ...], data: DataInfo, device: torch.device) -> Outputs:
    copied = without_storage(model) if device.type == "meta" else copy.deepcopy(model).to(device)
    tapped = Taps(copied.eval(), names, data.logits_of)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    given = data.input_shape
    example: object
    if isinstance(given, Mapping):
        example = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    elif isinstance(given, Tensor):
        example = given.to(device)
    else:
        example = torch.zeros(2, *given, device=device, dtype=dtype)
    with torch.no_grad():
        return tapped(example)
