"""Table of the page docs/choosing.md: `python docs/choosing_table.py` writes it between the page's marks.

Cases and needs come from the methods, costs from results/methods/bench.json, and accuracies from the
published runs that the recipes read. The order of the methods is that of docs/methods/README.md.
"""

import json
import re
from pathlib import Path

import mdistiller
import torch
from mdistiller.methods import Wrapper, get_method, method_config
from mdistiller.methods.compose import build_method
from mdistiller.recipes.describe import figure_text
from mdistiller.recipes.published import find_reproduced, find_runs

DOCS = Path(__file__).parent
BEGIN, END = (
    "<!-- written by docs/choosing_table.py -->\n",
    "<!-- end of the table -->\n",
)
# A pair of each data set that most papers report.
CIFAR100, IMAGENET = ("resnet32x4", "resnet8x4"), ("resnet34", "resnet18")
_STAGE = re.compile(r"stage\d+(\.preact)?$")


def table():
    """Returns the table as Markdown."""
    bench = json.loads(
        (DOCS.parent / "results/methods/bench.json").read_text(encoding="utf-8")
    )
    costs = {row["name"]: row for row in bench["rows"]}
    costs["none"] = costs["plain training"]
    lines = [
        "| method | when | needs | time of a step | extra parameters | CIFAR-100 | ImageNet |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in groups():
        if name not in mdistiller.list_methods():
            lines.append(f"| **{name}** | | | | | | |")
            continue
        cost = costs.get(name)
        time = "" if cost is None else f"{cost['of_plain']:.2f}"
        extra = "" if cost is None else f"{cost['extra_parameters']:,}"
        figures = (
            figure("cifar100", name, CIFAR100),
            figure("imagenet", name, IMAGENET),
        )
        cells = (
            f"[`{name}`](methods/{name}.md)",
            get_method(name).card.use,
            needs(name),
            time,
            extra,
            *figures,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def groups():
    """Lists the methods, with the headings of their groups, in the order of docs/methods/README.md."""
    text = (DOCS / "methods/README.md").read_text(encoding="utf-8")
    found = re.findall(r"\*\*(.+?)\*\*|\[`(\w+)`\]", text.partition("\n## ")[0])
    return [heading or name for heading, name in found]


def needs(name):
    """Returns what a method reads beside images: logits or features, labels, the images' index, two views."""
    student, teacher = (
        mdistiller.create_model(model, num_classes=10)
        for model in ("resnet8", "resnet14")
    )
    data = mdistiller.DataInfo((3, 16, 16), torch.arange(32) % 10, 8)
    method = build_method(method_config(name), student, teacher, data)
    if not method.needs.teacher:
        return "labels"
    sides = [_taps(method.student_taps), _taps(method.teacher_taps)]
    if sides[0] == sides[1]:
        parts = [sides[0]]
    else:
        parts = [
            f"{taps} of the {model}"
            for taps, model in zip(sides, ("student", "teacher"), strict=True)
        ]
    if isinstance(method, Wrapper) and method.student_taps:
        parts.append("logits")
    parts += ["labels"] if method.needs.labels else []
    parts += ["index"] if method.needs.index else []
    parts += ["two views"] if method.needs.views == 2 else []
    return ", ".join(parts)


def _taps(taps):
    if not taps:
        return "logits"
    stages = [tap for tap in taps if _STAGE.match(tap)]
    found = []
    if stages:
        kind = "pre-activations of stages" if stages[0].endswith("preact") else "stages"
        found.append(kind if len(stages) > 1 else "a stage")
    return ", ".join([*found, *(f"`{tap}`" for tap in taps if tap not in stages)])


def figure(data, name, pair):
    """Returns the first published top-1 of a method and pair, or a dash, and the span of those of others."""
    models = pair[1] if name == "none" else "_".join(pair)
    text = next(
        (figure_text(run) for run in find_runs(data, name, models) if run.top1), "–"
    )
    others = [
        x
        for run in find_reproduced(data, name, models)
        if run.optimizer == "sgd"
        for x in run.top1
    ]
    span = sorted({f"{x:.2f}" for x in others})
    return (
        f"{text}; elsewhere {' to '.join(dict.fromkeys((span[0], span[-1])))}"
        if span
        else text
    )


if __name__ == "__main__":
    page = DOCS / "choosing.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(
        before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2],
        encoding="utf-8",
    )
