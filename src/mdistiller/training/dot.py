r"""DOT, the distillation-oriented trainer (Zhao, Cui, Song, Liang: ICCV 2023, arXiv 2307.08436).

SGD with two momentum buffers. The gradient of the task's loss moves with momentum $\mu - \Delta$, that of
the distillation loss with $\mu + \Delta$, so that the two do not average out and distillation leads:

$$v_t \leftarrow g_t + (\mu - \Delta)\,v_t, \quad v_d \leftarrow g_d + (\mu + \Delta)\,v_d, \quad
\theta \leftarrow \theta - \gamma\,(v_t + v_d)$$

DeepKD (Huang, Song, Zhang, Ren: 2025, arXiv 2505.15133) has a third buffer, for the part of the target class
in the distillation loss, and a difference of momentum for each of the three.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mdistiller.errors import ConfigError


class DOT(torch.optim.Optimizer):
    """SGD with separate momenta for the gradients of task and distillation.

    `backward` replaces `loss.backward()` and may be called several times a step. Weight decay is added to the
    task's gradient. A parameter that only one of the losses reaches (a method's adapter, the classifier
    under a feature method) has the plain momentum.

    Args:
        parameters: parameters to train, or groups of them; each gets a gradient from at least one loss.
        lr: learning rate.
        momentum: μ.
        deltas: momentum less μ for the buffers `task`, `distillation` and, for DeepKD, `target`: the losses
            named `tckd`.
        weight_decay: added to the gradient, times the parameter.
        average: replaces a gradient by its mean over all processes, in place.
    """

    def __init__(
        self,
        parameters: ParamsT,
        *,
        lr: float,
        momentum: float,
        deltas: Mapping[str, float],
        weight_decay: float = 0.0,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.momentum, self.deltas, self.average = momentum, deltas, average
        self.parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self._gradients: dict[str, list[Tensor | None]] = {}

    def backward(
        self, task: Mapping[str, Tensor], distillation: Mapping[str, Tensor], weight: float = 1.0
    ) -> None:
        """Adds the gradients of the sum of the task losses and of the distillation losses, times `weight`.

        Raises:
            ConfigError: a buffer has no loss.
        """
        groups: dict[str, list[Tensor]] = {name: [] for name in self.deltas} | {"task": [*task.values()]}
        for name, value in distillation.items():
            is_target = "target" in groups and name.split(".")[-1] == "tckd"
            groups["target" if is_target else "distillation"].append(value)
        if not all(groups.values()):
            kind, parts = "DOT", "beside the task's"
            if "target" in groups:
                kind, parts = "DeepKD", "'tckd' and another one"
            raise ConfigError(
                f"optim.name: {kind} needs a distillation loss {parts}; got {list(distillation)}"
            )
        for name in reversed(groups):  # the task's is the last and frees the graph
            loss = torch.stack(groups[name]).sum() * weight
            new = torch.autograd.grad(loss, self.parameters, retain_graph=name != "task", allow_unused=True)
            pairs = zip(self._gradients.get(name) or [None] * len(new), new, strict=True)
            self._gradients[name] = [b if a is None else a if b is None else a + b for a, b in pairs]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter and clears the gradients."""
        assert closure is None
        if self.average is not None:
            for gradients in self._gradients.values():
                _average_all([g for g in gradients if g is not None], self.average)
        names = [name for name in self.deltas if name in self._gradients]
        gradients_of = zip(*(self._gradients[name] for name in names), strict=True)
        for group in self.param_groups:
            for p in group["params"]:
                found = {n: g for n, g in zip(names, next(gradients_of), strict=True) if g is not None}
                state, decay = self.state[p], group["weight_decay"]
                for name, gradient in found.items():
                    change = self.deltas[name] if len(found) > 1 else 0.0
                    if decay:
                        gradient, decay = gradient.add(p, alpha=decay), 0.0
                    if name not in state:
                        state[name] = torch.zeros_like(p)
                    state[name].mul_(self.momentum + change).add_(gradient)
                    p.add_(state[name], alpha=-group["lr"])
        self._gradients = {}


def _average_all(gradients: list[Tensor], average: Callable[[Tensor], Tensor]) -> None:
    """Averages all gradients in one message."""
    flat = average(torch.cat([g.flatten() for g in gradients]))
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
