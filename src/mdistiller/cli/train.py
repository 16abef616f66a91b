"""`mdistiller train RECIPE`."""

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from mdistiller.api import Run, stored_config, train
from mdistiller.cli.flags import Arg
from mdistiller.cli.help import HELP_WORDS, help_text
from mdistiller.cli.options import Command, parse_command
from mdistiller.cli.plan import PlannedDisplay, print_plan
from mdistiller.cli.seeds import train_seeds
from mdistiller.config import SELF, RunConfig
from mdistiller.deploy.student import GivenTeacher, find_teacher
from mdistiller.errors import ConfigError, UnknownNameError, nearest_names
from mdistiller.methods import load_plugins
from mdistiller.models import ModelConfig
from mdistiller.recipes import get_recipe, set_method, set_teacher, starts_pretrained
from mdistiller.recipes.family import all_families
from mdistiller.runs.folder import read_metrics
from mdistiller.stored import STORED
from mdistiller.types import Metric

USAGE = """
RECIPE is FAMILY.METHOD.TEACHER_STUDENT, FAMILY.teacher.MODEL,
FAMILY.student.MODEL or folder.finetune.MODEL, or the folder of an earlier run,
or its config.json, or a file from `mdistiller config`. In the family folder, a
student with pretrained weights (--student.pretrained, --student.checkpoint FILE)
gets the settings of folder.finetune. METHOD is a name from `mdistiller list
methods`, a sum A+B, or A-B for A around B; the teacher `self` is the student's
moving average.

Families, with a recipe of each:

%s

Examples:

  mdistiller train cifar100.dkd.resnet32x4_resnet8x4 --data.root DIR \\
      --teacher.checkpoint FILE
  mdistiller train folder.dkd.timm/resnet18 --data.root DIR \\
      --teacher runs/TEACHER
  mdistiller train folder.dkd.timm/resnet18 --data.root IMAGENET \\
      --teacher timm/resnet50 --teacher.pretrained
  mdistiller train runs/RUN --seed 1
  mdistiller train runs/RUN --resume

`mdistiller train RECIPE --help` shows the everyday flags with the recipe's
defaults, `--help-all` all of them, `mdistiller list recipes` the known recipes.
Several processes: torchrun --nproc-per-node N -m mdistiller train RECIPE [flags]"""


class TrainCommand(Command):
    """Train or distill a student, and write a run folder."""

    config: Annotated[RunConfig, Arg(name="")]
    method_name: Annotated[str | None, Arg(name="method")] = None
    """Another method than the recipe's, with its default hyperparameters."""
    from_scratch: bool = False
    """Keep the recipe's settings for random weights, though the student has pretrained ones, and start its
    backbone from random weights where the recipe names others."""
    teacher: Annotated[str | None, Arg(metavar="RUN|MODEL")] = None
    """A run folder, or a student's file in one, for the teacher: name and options of its model, and, unless
    flags give them, size, mean and standard deviation of its images. Or the name of a model.
    The recipe may then be FAMILY.METHOD.STUDENT."""
    teacher_pretrained: Annotated[bool, Arg(name="teacher.pretrained")] = False
    """Give a teacher of timm or torchvision its library's pretrained weights, which have the data's
    classes, unless the method reads features alone."""
    student_pretrained: Annotated[bool, Arg(name="student.pretrained")] = False
    """Start the student from the pretrained weights of timm or torchvision."""
    teacher_outputs: Path | None = None
    """Outputs of the teacher for the training images, computed elsewhere: .npz, .safetensors or .parquet, see
    `StoredTeacher`; or FOLDER:COLUMN of data of kind hf. The recipe may then be FAMILY.METHOD.STUDENT."""
    resume: bool = False
    """Resume from the last state in the run folder."""
    seeds: int | None = None
    """Train this many runs, whose seeds count up from --seed, into one folder with one report."""
    dry_run: bool = False
    """Stop after the plan. Models and data are built; no file is written."""

    @classmethod
    def usage(cls) -> str:
        """Returns the help of the command without a recipe: its own flags, and what a recipe is."""
        families = all_families()
        lines = []
        for name, family in families.items():
            method = max(family.methods(), key="dkd".__eq__)  # it, if the family has it
            lines.append(f"  {name}.{method}.{family.pairs[0]}")
        for about in dict.fromkeys(family.about for family in families.values() if family.about):
            names = ", ".join(name for name, family in families.items() if family.about == about)
            lines += ["", *textwrap.wrap(f"{names}: {about}", 80, break_on_hyphens=False)]
        own = help_text(cls, f"{cls.prog()} RECIPE", every=True, hidden=TrainCommand.model_fields)
        return "\n".join([own, USAGE % "\n".join(lines)])

    @classmethod
    def parse(cls, args: Sequence[str]) -> Self:
        """Parses recipe, plug-ins and method before the other flags, whose names depend on them."""
        prog = cls.prog()
        if args and args[0] in HELP_WORDS:
            print(cls.usage())
            raise SystemExit(0)
        if not args or args[0].startswith("-"):
            raise ConfigError(f"{prog.partition(' ')[2]} needs a recipe first; see {prog} --help")
        source, rest = args[0], list(args[1:])
        own, wanted = cls.with_own_flags(rest), next((word for word in rest if word in HELP_WORDS), None)
        load_plugins(own.plugin)
        default = cls(config=own.find_config(source, open_teacher=wanted is not None))
        prog = f"{prog} {source}"
        if wanted is not None:
            print(help_text(default, prog, every=wanted == "--help-all"))
            raise SystemExit(0)
        command = parse_command(cls, rest, prog, default)
        if not own.from_scratch and (own.student_pretrained or starts_pretrained(command.config.student)):
            tuned = own.find_config(source, pretrained=True)
            if tuned != default.config:
                print(
                    f"pretrained student: using the settings of {source.partition('.')[0]}.finetune."
                    f"{tuned.student.name}; for those of {source}, add --from-scratch",
                    file=sys.stderr,
                )
                command = parse_command(cls, rest, prog, cls(config=tuned))
        config, new = command.config, default.config.teacher
        if own.teacher is not None or own.teacher_outputs is not None:
            without = own.model_copy(update={"teacher": None, "teacher_outputs": None})
            old = without.find_config(source, open_teacher=True).teacher
            if old is not None and new is not None and old.name != new.name:
                print(f"teacher: {new.name} replaces the recipe's {old.name}", file=sys.stderr)
        if command.teacher_pretrained:
            config = _with_pretrained(config)
        if command.student_pretrained:
            config = config.replace(student={"options": {**config.student.options, "pretrained": True}})
        return command.model_copy(update={"config": config})

    def find_config(self, source: str, *, open_teacher: bool = False, pretrained: bool = False) -> RunConfig:
        """Returns the config of a recipe or run, with the plug-ins, the method and the teacher of flags."""
        teacher = None if self.teacher is None else find_teacher(self.teacher)
        if self.teacher_outputs is not None:
            if teacher is not None:
                raise ConfigError("--teacher-outputs stands in place of --teacher; allowed is one of them")
            teacher = GivenTeacher(ModelConfig(name=STORED, checkpoint=self.teacher_outputs))
        model = None if teacher is None else teacher.model
        method = self.method_name
        try:
            config = stored_config(source, resume=self.resume)
            if config is None:
                config = get_recipe(
                    source, method, teacher=model, pretrained=pretrained, open_teacher=open_teacher
                )
            else:
                config = config if method is None else set_method(config, method)
                config = config if model is None else set_teacher(config, model)
        except UnknownNameError as error:
            if error.what.startswith("pair") and teacher is None:
                error.command_hint = "With --teacher RUN or MODEL, the student's name is enough"
            if teacher is None or error.name != teacher.model:
                raise
            beside = [str(path) for path in Path(error.name).parent.glob("*")] if "/" in error.name else []
            near = nearest_names(error.name, beside) or error.nearest
            more = f"; nearest: {', '.join(near)}" if near else ""
            raise ConfigError(
                f"teacher: {error.name!r} is no run folder, student's file or model{more}"
            ) from error
        config = config if teacher is None else teacher.fit_data(config)
        if self.from_scratch and "backbone_weights" in config.student.options:
            options = {n: v for n, v in config.student.options.items() if n != "backbone_weights"}
            config = config.replace(student={"options": options})
        files = (*config.plugins, *(path.resolve() for path in self.plugin))
        return config.model_copy(update={"plugins": tuple(dict.fromkeys(files))})

    def execute(self) -> None:
        display = PlannedDisplay()
        if self.dry_run:
            print_plan(self.config, display)
        elif self.seeds is not None:
            train_seeds(self.config, self.seeds, display, resume=self.resume, as_json=self.as_json)
        else:
            result = train(self.config, resume=self.resume, reporter=display)
            if result.path is not None:  # the main process
                _show_result(result, self.config, as_json=self.as_json)


def _with_pretrained(config: RunConfig) -> RunConfig:
    """Returns a config whose teacher has the option for pretrained weights."""
    teacher = config.teacher
    if teacher is None or teacher.name == SELF or teacher.checkpoint is not None:
        have = (
            "no teacher of its own" if teacher is None or teacher.name == SELF else "a teacher's checkpoint"
        )
        raise ConfigError(f"teacher.pretrained: the run has {have}; allowed beside --teacher MODEL")
    return config.replace(teacher={"options": {**teacher.options, "pretrained": True}})


def remark_on_teacher(run: Path, metric: Metric) -> str | None:
    """Returns a line about a teacher that is worse than its student on the same images; None otherwise."""
    lines = [line for line in read_metrics(run) if line.get("kind") == "eval"]
    diagnostics = (lines[-1].get("diagnostics") or {}) if lines else {}
    teacher = diagnostics.get("test", {}).get(f"teacher_{metric.name}")
    if teacher is None or teacher >= lines[-1][metric.name]:
        return None
    return (
        f"note: the teacher scores {metric.text(teacher)} on these images, below the student's "
        f"{metric.text(lines[-1][metric.name])}; try a better teacher, or train without one"
    )


def _show_result(run: Run, config: RunConfig, *, as_json: bool) -> None:
    """Writes the report of a run that has ended, and prints its result."""
    from mdistiller.report import try_report  # loaded once the run is over

    report = try_report([run.folder], run.folder / "report.html")
    summary = run.summary
    if as_json:
        print(json.dumps({"out": str(run.path), **summary}))
        return
    last, best, metric = summary["last"], summary["best"], config.main_metric()
    name = metric.name
    lines = [
        f"{metric.result}: last epoch {metric.text(last[name])}, best {metric.text(best[name])} "
        f"(epoch {best['epoch']}); {summary['seconds']:.0f} s, {summary['ms_per_step']:.1f} ms/step"
    ]
    if (remark := remark_on_teacher(run.folder, metric)) is not None:
        lines.append(textwrap.fill(remark, 80))
    if "probe" in summary:
        probe = summary["probe"]
        lines.append(f"linear probe: {metric.text(probe[name])} (epoch {probe['epoch']})")
    if "stopped_early" in summary:
        lines.append(
            f"stopped early, after epoch {summary['epochs']} of {config.epochs}; the student of its best "
            f"epoch, {best['epoch']}, is in {run.folder / 'student-best.safetensors'}"
        )
    lines.append(f"student: {run.folder / 'student.safetensors'}")
    if report is not None:
        lines.append(f"report: {report}")
    print(*lines, sep="\n", file=sys.stderr)
