"""The card of an exported student for people, with code that predicts an image."""

import json

from mdistiller.deploy.hub import hub_metadata
from mdistiller.deploy.predict import CARD, Card
from mdistiller.report.markup import markdown_text
from mdistiller.training.deployment import Deployment
from mdistiller.training.task import get_task

_PACKAGE_CODE = """\
from pathlib import Path
from mdistiller import load_export

student = load_export(".")
print(student.{call}([Path("image.jpg")]))"""
_GRAPH_CODE = """\
import json
import numpy as np
{imports}
from PIL import Image, ImageOps

with open("card.json", encoding="utf-8") as file:
    classes = json.load(file)["classes"]
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
{prepare}
{run}
{show}"""
_RUN_CODE = {
    "torch-export": """\
model = torch.export.load("model.pt2").module()  # unpickles parts of the file: trust its source
with torch.no_grad():
    {outputs} = model(torch.from_numpy(image)).numpy()""",
    "onnx": """\
session = onnxruntime.InferenceSession("model.onnx")
[{outputs}] = session.run({names}, {{"image": image}})""",
}


def _code(card: Card, deployment: Deployment) -> str:
    """Returns lines of Python that predict an image with the exported file."""
    code = deployment.graph_code(card)
    if code is None or card.format == "safetensors":
        return _PACKAGE_CODE.format(call="predict" if card.classes else "outputs")
    names = deployment.outputs
    return _GRAPH_CODE.format(
        imports="import torch" if card.format == "torch-export" else "import onnxruntime",
        prepare=code[0],
        run=_RUN_CODE[card.format].format(outputs=", ".join(names), names=json.dumps(names)),
        show=code[1],
    )


def measured_rows(card: Card) -> dict[str, str]:
    """Returns rows for people about the exported file: its metric, size and time."""
    rows, metric = {}, get_task(card.task).Config.main_metric()
    if (found := card.measured) is not None:
        same = "" if found.agreement is None else f"; the same class for {found.agreement:.2f} %"
        rows[f"{found.metric} of this file"] = (
            f"{metric.text(found.value)} on {found.images:,} test images "
            f"(the student {metric.text(found.student)}, "
            f"difference {found.value - found.student:+{metric.spec}}{same})"
        )
    rows["size of the file"] = f"{card.bytes / 1e6:,.2f} MB"
    if card.macs is not None:
        shape = "" if card.image_shape is None else f" of shape {list(card.image_shape)}"
        rows["multiply-accumulates"] = f"{card.macs / 1e6:,.1f} million for one image{shape}"
    if card.speed is not None:
        rows["milliseconds an image"] = f"{card.speed} ({card.speed.machine})"
    return rows


def readme(card: Card, deployment: Deployment) -> str:
    """Returns the card for people and for the Hugging Face Hub, in Markdown."""
    method = dict(card.method or {})
    name = method.pop("name", None)
    settings = ", ".join(f"{key} {value}" for key, value in method.items() if value is not None)
    shown = get_task(card.task).Config.main_metric()
    metric, measured = "result", "not known"
    if (accuracy := card.accuracy) is not None:
        metric, measured = accuracy.metric, f"{shown.text(accuracy.value)} (epoch {accuracy.epoch})"
    facts = card.data or {}
    data = [facts.get("name")]
    data += [f"{key} {facts[key]}" for key in ("train_limit", "test_limit", "label_noise") if facts.get(key)]
    rows = {
        "model": f"{card.model}, {card.parameters:,} parameters",
        "teacher": card.teacher,
        "method": name and name + (f" ({settings})" if settings else ""),
        "recipe": card.recipe,
        "data": ", ".join(filter(None, data)),
        f"{metric} on its test set": measured,
        **deployment.describe(card),
        "format": f"{card.format}{', int8' * card.int8} ({card.file})",
        **measured_rows(card),
        "largest difference to the student's outputs": f"{card.check.largest_difference:.1e} "
        f"(largest output {card.check.largest_output:.3g})",
        "versions": ", ".join(f"{key} {value}" for key, value in card.versions.items()),
    }
    table = "\n".join(f"| {key} | {markdown_text(value or '–')} |" for key, value in rows.items())
    name = markdown_text(card.model)
    title = f"{name}, {len(card.classes)} classes" if card.classes else name
    classes = f"\n## Classes\n\n{markdown_text(', '.join(card.classes))}\n" if card.classes else ""
    return f"""{hub_metadata(card)}
# {title}

| | |
| --- | --- |
{table}

The same, for programs: [`{CARD}`]({CARD}).

## Use

```
mdistiller predict FOLDER IMAGE…
```

```python
{_code(card, deployment)}
```
{classes}"""
