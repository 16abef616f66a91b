"""Parts of a student that stand still: frozen ones for the whole run, all but the classifier in a probe."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mdistiller.errors import ConfigError
from mdistiller.models.layers import parts


class Phases:
    """Gradients and modes of a student's parts in the two phases of a run, probe and tuning.

    A part that stands still gets no gradient and is in evaluation mode, so that its running statistics stay.

    Args:
        student: the student, or its copy in a model that a method made of it.
        freeze: names of the parts that stand still in both phases, see `models.layers.parts`.
        head: module paths of the classifier, which trains in the probe; not needed without one.
        norm_eval: keep all batch norms in evaluation mode.
    """

    def __init__(
        self,
        student: nn.Module,
        freeze: Sequence[str] = (),
        head: Sequence[str] = (),
        *,
        norm_eval: bool = False,
    ) -> None:
        self.modules, frozen = parts(student, freeze)
        if norm_eval:
            self.modules += [m for m in student.modules() if isinstance(m, _BatchNorm)]
        for p in frozen:
            p.requires_grad_(False)
        if freeze and not any(p.requires_grad for p in student.parameters()):
            raise ConfigError(f"freeze: {', '.join(freeze)} leave nothing of the student to train")
        self.heads = [student.get_submodule(path) for path in head]
        classifier = {id(p) for module in self.heads for p in module.parameters()}
        self.body = [p for p in student.parameters() if p.requires_grad and id(p) not in classifier]
        self.student = student
        self.probing = False

    def start(self, *, probing: bool) -> bool:
        """Sets the modes of an epoch, after `train()` of the whole; returns whether gradients changed."""
        if probing:
            self.student.eval()
            for module in self.heads:
                module.train()
        for module in self.modules:
            module.training = False
        changed, self.probing = probing != self.probing, probing
        if changed:
            for p in self.body:
                p.requires_grad_(not probing)
        return changed
