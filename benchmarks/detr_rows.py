"""Small RT-DETR or D-FINE students of one teacher: average precision, and differences for each seed.

    python benchmarks/blood_cells.py CELLS
    nice -n 19 python benchmarks/detr_rows.py cells --root CELLS --work WORK
    nice -n 19 python benchmarks/detr_rows.py cells --root CELLS --work WORK --model d_fine --methods ld
    nice -n 19 python benchmarks/detr_rows.py voc --root VOC --work WORK

Everything starts from random weights. VOC's twenty classes are merged into the four groups of
`detection_rows.py`. The students of a seed start from the same weights and see the same batches. A call that
was stopped goes on where it was; `--collect` trains nothing, and copies metrics and table to
results/detection.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from detection_rows import RESULTS, data_of, write_groups
from flags import read
from resumable import is_done, keep, last_evaluation, run, spread

from mdistiller import RunConfig, get_recipe
from mdistiller.cli.flags import Positional
from mdistiller.runs.environment import environment
from mdistiller.settings import Settings

SIDE = 160


class Command(Settings):
    """Train the teacher and the students that are missing, and print the table."""

    set: Positional[Literal["cells", "voc"]]
    """Data set."""
    root: Path
    """Folder of the set."""
    work: Path
    """Folder of the runs, outside the repository."""
    model: Literal["rt_detr", "d_fine"] = "rt_detr"
    """Kind of teacher and student."""
    methods: tuple[str, ...] = ("detrdistill", "fitnet", "cwd", "fgd", "mgd")
    """Methods beside the student alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the students."""
    steps: int = 200
    """Steps of a student."""
    teacher_steps: int = 600
    """Steps of the teacher."""
    batch_size: int = 4
    """Images of a step."""
    collect: bool = False
    """Train nothing."""


def options(width: int, layers: int) -> dict[str, Any]:
    """Returns the options of a detector with `width` channels and a decoder of some layers."""
    names = ("encoder_ffn_dim", "decoder_ffn_dim")
    heads = ("encoder_attention_heads", "decoder_attention_heads")
    return {
        "size": SIDE,
        **dict.fromkeys(("d_model", "encoder_hidden_dim"), width),
        **dict.fromkeys(names, 2 * width),
        **dict.fromkeys(heads, 4),
        "decoder_in_channels": [width] * 3,
        "decoder_layers": layers,
        "num_queries": 60,
        "num_denoising": 30,
        "hidden_expansion": 0.5,
        "backbone_config": {
            "embedding_size": width // 4,
            "hidden_sizes": [width // 4, width // 2, width, 2 * width],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "model_type": "rt_detr_resnet",
        },
    }


def folder_of(c: Command, name: str, seed: int | None = None) -> Path:
    """Returns the run folder of the teacher or of a method's student."""
    return c.work / f"{c.set}-{c.model}-{name}{'' if seed is None else f'-s{seed}'}"


def configure(c: Command, name: str, seed: int | None = None) -> RunConfig:
    """Returns the config of the teacher, or of a student of a method and a seed."""
    model, recipe = f"transformers/{c.model}", "student" if name == "alone" else name
    pair = f"small.{recipe}.{model if name in ('teacher', 'alone') else f'{model}_{model}'}"
    changes: dict[str, Any] = {"seed": seed or 0, "max_steps": c.teacher_steps if seed is None else c.steps}
    if name not in ("teacher", "alone"):
        changes["teacher"] = {"checkpoint": folder_of(c, "teacher")}
    return get_recipe(pair).replace(
        data=data_of(c.set, c.root, c.work),
        augment={"short_sides": (SIDE,), "long_side": SIDE},
        student={"options": options(96, 3) if seed is None else options(48, 2)},
        optim={"lr": 1e-3, "lr_warmup_steps": 50},
        epochs=100,
        eval_every=100,
        eval_batch_size=8,
        batch_size=c.batch_size,
        out=folder_of(c, name, seed),
        **changes,
    )


def main(c: Command) -> None:
    """Trains what is missing, seed after seed."""
    torch.set_num_threads(1)
    if c.set == "voc" and not (c.work / "voc" / "instances_val.json").is_file():
        write_groups(c.root, c.work / "voc")
    if not c.collect:
        run(configure(c, "teacher"))
        for seed in c.seeds:
            for method in ("alone", *c.methods):
                run(configure(c, method, seed))
                report(c)
    report(c)


def report(c: Command) -> None:
    """Prints the table of the finished runs; `collect` copies it with their metrics to the results."""
    found: dict[str, dict[int, float]] = {}
    folders = [folder_of(c, "teacher")]
    for method in ("alone", *c.methods):
        done = {s: folder_of(c, method, s) for s in c.seeds if is_done(folder_of(c, method, s))}
        folders += done.values()
        found[method] = {seed: last_evaluation(folder)["AP"] for seed, folder in done.items()}
    print(f"teacher {last_evaluation(folders[0])['AP']:.2f}")
    for method, values in found.items():
        gains = [value - found["alone"][seed] for seed, value in values.items() if seed in found["alone"]]
        each = ", ".join(f"{gain:+.2f}" for gain in gains)
        print(f"{method:13} {spread([*values.values()])}  {spread(gains, '+')}  {each}", flush=True)
    if c.collect:
        env = environment(0)
        del env["command"]
        settings = c.model_dump(include={"steps", "teacher_steps", "batch_size"})
        table = {
            "environment": env,
            "settings": settings,
            "teacher": last_evaluation(folders[0]),
            "AP": found,
        }
        keep(folders, table, RESULTS / f"{c.set}-{c.model}")


if __name__ == "__main__":
    main(read(Command))
