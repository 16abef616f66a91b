"""Properties of models, and of methods: what each one reads, taps and trains besides the student."""

import torch

from mdistiller.methods import LogitMethod, Method, get_method
from mdistiller.methods.base import Example, declares_taps, own_example
from mdistiller.models import create_model, list_models
from mdistiller.types import Line

NOTES = {
    "methods": """\
A+B adds methods, A-B wraps A around B (a single wrapper wraps kd):
dkd+reviewkd, lskd-dkd. --json has the paper, and for resnet32x4 → resnet8x4 on
CIFAR-100 the taps and the parameters that train besides the student's.""",
    "models": """\
Also timm/NAME and torchvision/NAME for each model of those libraries, such as
timm/resnet18, and in Python any module, those of transformers included.
Detectors, those of transformers included: --task detection""",
}


def describe_models() -> list[Line]:
    """Lists the models with their numbers of parameters, for 100 classes."""
    with torch.device("meta"):  # no memory, and no random draws
        return [
            {"name": name, "parameters": sum(p.numel() for p in create_model(name, 100).parameters())}
            for name in list_models()
        ]


def describe_method(name: str) -> Line:
    """Returns a method's properties by name, with its defaults for resnet32x4 → resnet8x4 on CIFAR-100.

    They are those that its class declares. None: a class with taps or layers that has no `example`.
    """
    method = get_method(name)
    example = own_example(method)
    is_known = example is not None or _has_losses_alone(method)
    example = example or Example()
    reads = "features" if example.student_taps or example.teacher_taps or declares_taps(method) else "logits"
    if example.reads_logits:
        reads = "both"
    return {
        "name": name,
        "reads": reads if method.needs.teacher and (is_known or reads == "features") else None,
        "year": method.card.year,
        "student_taps": list(example.student_taps),
        "teacher_taps": list(example.teacher_taps),
        "extra_parameters": example.extra_parameters if is_known else None,
        "paper": method.card.paper,
        "when": method.card.use,
    }


def _has_losses_alone(method: type[Method]) -> bool:
    """Whether a class adds nothing to `Method` that could tap a feature or train a parameter."""
    inits = Method.__init__, LogitMethod.__init__
    own = method.__init__ not in inits or method.extend_student is not Method.extend_student
    return not own and not declares_taps(method)
