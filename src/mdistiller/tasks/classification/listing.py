"""Properties of models, and of methods: what each one reads, taps and trains besides the student."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mdistiller.methods import Method, get_method, method_config
from mdistiller.methods.base import Example, declares_taps, own_example
from mdistiller.methods.compose import build_method
from mdistiller.models import create_model, list_models
from mdistiller.taps import tap
from mdistiller.types import Batch, DataInfo, Line, Outputs

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


class _WithoutDraws(TorchFunctionMode):
    """Leaves out the random draws of weights, which take most of a model's construction."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def describe_models() -> list[Line]:
    """Lists the models with their numbers of parameters, for 100 classes."""
    with _WithoutDraws():
        return [
            {"name": name, "parameters": sum(p.numel() for p in create_model(name, 100).parameters())}
            for name in list_models()
        ]


def describe_method(name: str) -> Line:
    """Returns a method's properties by name, with its defaults for resnet32x4 → resnet8x4 on CIFAR-100.

    They are those that its class declares. A method without an `example`, such as one of a plug-in, is built.
    """
    method = get_method(name)
    example = own_example(method)
    if example is None:
        example = Example() if _has_losses_alone(method) else measure_example(method)
    reads = "features" if example.student_taps or example.teacher_taps else "logits"
    if example.reads_logits:
        reads = "both"
    return {
        "name": name,
        "reads": reads if method.needs.teacher else None,
        "year": method.card.year,
        "student_taps": list(example.student_taps),
        "teacher_taps": list(example.teacher_taps),
        "extra_parameters": example.extra_parameters,
        "paper": method.card.paper,
        "when": method.card.use,
    }


def _has_losses_alone(method: type[Method]) -> bool:
    """Whether a class adds nothing to `Method` that could tap a feature or train a parameter."""
    own = method.__init__ is not Method.__init__ or method.extend_student is not Method.extend_student
    return not own and not declares_taps(method)


@cache
def _pair() -> tuple[nn.Module, nn.Module]:
    return create_model("resnet8x4"), create_model("resnet32x4")


def measure_example(method_class: type[Method]) -> Example:
    """Finds the facts of a method by building it, and with taps by one pass of both models and the losses."""
    student, teacher = _pair()
    data = DataInfo((3, 32, 32), torch.arange(50_000) % 100, 64)
    method = build_method(method_config(method_class.Config.own_name), student, teacher, data)
    extended = method.extend_student(student)
    trained = sum(p.numel() for p in nn.ModuleList([extended, method]).parameters() if p.requires_grad)
    return Example(
        tuple(method.student_taps),
        tuple(method.teacher_taps),
        trained - sum(p.numel() for p in student.parameters()),
        _reads_logits(method, extended, teacher),
    )


def _reads_logits(method: Method, student: nn.Module, teacher: nn.Module) -> bool:
    """Whether the losses of a method with taps have a gradient for the logits."""
    if not method.student_taps and not method.teacher_taps:
        return False
    image, outputs = torch.randn(4 * method.needs.views, 3, 32, 32), []
    for model, taps in ((student, method.student_taps), (teacher, method.teacher_taps)):
        tapped = tap(model, taps)
        logits, features = tapped(image)
        tapped.untap()
        outputs.append(Outputs(logits.detach().requires_grad_(), features))
    position = torch.arange(len(image))
    losses = method(*outputs, Batch(image, position % 4, position % 4), torch.ones(()))
    total = torch.stack(list(losses.values())).sum()
    read = torch.autograd.grad(total, [logits for logits, _ in outputs], allow_unused=True)
    return any(gradient is not None for gradient in read)
