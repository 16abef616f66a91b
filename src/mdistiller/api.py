"""Runs from Python: `distill`, `train`, and `Run`, the result of both."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from mdistiller.arguments import Objects, config_for, find_data, find_model, name_of
from mdistiller.checks import one_each
from mdistiller.config import RunConfig
from mdistiller.deploy.student import find_student, load_student
from mdistiller.distiller import AnyMethod
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import load_plugins, recorded_plugins
from mdistiller.models import ModelConfig
from mdistiller.models.external import is_pretrained
from mdistiller.models.weights import read_metadata
from mdistiller.recipes import get_recipe, recipe_of
from mdistiller.recipes.family import find_family, list_families
from mdistiller.runs.config_file import YAML, read_values
from mdistiller.runs.folder import CONFIG, read_metrics
from mdistiller.runs.progress import ProgressDisplay, Reporter
from mdistiller.training import launch
from mdistiller.training.deployment import Format
from mdistiller.training.task import load_config
from mdistiller.types import Line, Summary

Model = nn.Module | ModelConfig | Mapping[str, object] | str | Path
"""A module, a model's name, a run folder or a student's file, or the fields of a `ModelConfig`."""
Shown = Reporter | Literal[False] | None
"""Progress display. None: a bar in a terminal, lines elsewhere, on stderr; False: nothing."""


class Metrics(list[Line]):
    """Lines of a run's metrics.jsonl: `kind` is train, eval or summary."""

    def __repr__(self) -> str:
        counts = Counter(line.get("kind", "other") for line in self)
        return f"Metrics({', '.join(f'{count} {kind}' for kind, count in counts.items())})"


class Run:
    """A run in its folder: student, metrics, report, export.

    Args:
        path: the run folder.
        student: the module that `distill` was given as student, where its config names it `given/…`; likewise
            `teacher` and `data`. They are needed for all that builds or evaluates a model, and to resume.
        teacher: see `student`; of several, a list in which None stands for those that are names.
        data: see `student`; in the form that `distill` takes.
        plugins: Python files to run first; the plug-ins that the run's config names are not run.

    Attributes:
        path: the run folder; None in all but the main process.
    """

    path: Path | None

    def __init__(
        self,
        path: str | Path,
        *,
        student: nn.Module | None = None,
        teacher: nn.Module | Sequence[nn.Module | None] | None = None,
        data: object = None,
        plugins: Sequence[str | Path] = (),
    ) -> None:
        load_plugins(plugins)
        self.path, self.objects = Path(path), Objects()
        self._summary: Summary | None = None
        config = self.config
        known = (config.teacher, *config.more_teachers)
        given = [*teacher] if isinstance(teacher, Sequence) else [teacher]
        if len(given) > len(known):
            raise ConfigError(f"teacher: got {len(given)}; {path} has {len(known)}")
        teachers = [("teacher", *pair) for pair in zip(given, known, strict=False)]
        for role, module, stored in [("student", student, config.student), *teachers]:
            if module is None:
                continue
            name = name_of(module, with_weights=role == "teacher")
            theirs = None if stored is None else stored.name
            if name != theirs:
                raise ConfigError(f"{role}: got {name!r}; the {role} of {path} is {theirs!r}")
            self.objects.models[name] = module
        if data is not None:
            _, fields, readers = find_data(data)
            kind = fields["kind"]
            theirs = getattr(config.data_settings, "kind", None)
            if kind != theirs:
                raise ConfigError(f"data: got {kind!r}; the data of {path} are {theirs!r}")
            self.objects.data.update(readers)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str | None:
        """Returns the report's answer and chart for a notebook, with a link once the report is written."""
        if not any(line.get("kind") == "eval" for line in read_metrics(self.folder)):
            return None
        from mdistiller.report.page import answer_frame

        return answer_frame(self.folder)

    @property
    def folder(self) -> Path:
        """The run folder; ConfigError in a process that has none."""
        if self.path is None:
            raise ConfigError("path: only the main process of a run has its folder")
        return self.path

    @property
    def config(self) -> RunConfig:
        """The run's config, with this folder as `out`, and of its plug-ins those that are loaded."""
        return load_config(self.folder / CONFIG).model_copy(update={"out": self.path})

    @property
    def metrics(self) -> Metrics:
        """Lines of metrics.jsonl, also of a run that is under way."""
        return Metrics(read_metrics(self.folder))

    @property
    def summary(self) -> Summary:
        """The last line of metrics.jsonl; ConfigError if the run has not ended."""
        if self._summary is not None:
            return self._summary
        lines = [line for line in self.metrics if line.get("kind") == "summary"]
        if not lines:
            raise ConfigError(f"summary: {self.path} has not ended; resume() continues it")
        return cast(Summary, lines[-1])

    @property
    def student(self) -> nn.Module:
        """The student, as `load_student` returns it: a module of its own for each access."""
        with self.objects.known():
            return load_student(self.folder)

    def report(self, path: str | Path | None = None, *, format: str = "html", images: int = 2000) -> Path:
        """Writes the report, by default report.html in the run folder, and returns its path.

        Args:
            path: the file.
            format: html, md, latex, csv or json, as in `mdistiller report`.
            images: largest number of test images on which the student runs; 0 leaves these sections out.
        """
        from mdistiller.report import file_name, write_report

        out = self.folder / file_name(format) if path is None else Path(path)
        with self.objects.known():
            return write_report([self.folder], out, images=images, format=format)

    def export(self, format: Format = "safetensors", **options: Any) -> Path:
        """Writes the student into a folder of its own, which is returned.

        `options` are those of `mdistiller export`: `out`, `ema`, `int8`, `evaluate`, `device`.
        """
        from mdistiller.deploy.export import export_student

        with self.objects.known():
            return export_student(self.folder, format, **options)[0]

    def push_to_hub(
        self, repo: str, *, private: bool | None = None, license: str | None = None, **options: Any
    ) -> str:
        """Exports the student to the Hugging Face Hub, and returns its address, hf://USER/REPO@COMMIT.

        Args:
            repo: USER/REPO, created if it does not exist. huggingface_hub needs a token that may write to it.
            private: whether a new repository is private; None is the account's default. True refuses a public
                repository.
            license: the Hub's identifier of the weights' license, such as mit.
            options: those of `export` beside `out`.

        Raises:
            ConfigError: another form of name, a student that was given as a module, or huggingface_hub is not
                installed.
            CheckpointError: the Hub refuses the upload.
        """
        from mdistiller.deploy.hub import push_student

        if self.config.student.name in self.objects.models:
            raise ConfigError(
                f"student: nobody else can build {self.config.student.name!r}, which was given as a module; "
                "allowed: models by name, also registered ones (mdistiller.register_model)"
            )
        with self.objects.known():
            return push_student(self.folder, repo, private=private, license=license, **options)

    def resume(self, *, reporter: Shown = None) -> "Run":
        """Continues the run from its last state to its end, and returns it."""
        with self.objects.known():
            config = load_config(self.folder / CONFIG, whole=True).model_copy(update={"out": self.path})
            shown, usual = _shown(reporter), _usual(config)
            return _run(launch.train(config, resume=True, reporter=shown, usual=usual), self.objects)


def train(
    config: RunConfig | str | Path,
    *,
    resume: bool = False,
    reporter: Shown = None,
    plugins: Sequence[str | Path] = (),
    **changes: object,
) -> Run:
    """Runs a config to its end and writes its run folder.

    Args:
        config: a config, the name of a recipe, a run folder or its config.json. A stored run is repeated in a
            new folder, or with `resume` continued in its own.
        resume: resume from the state in the run folder, left there by an earlier start of the same config.
        reporter: progress display. None: a bar in a terminal, lines elsewhere, on stderr. False: nothing.
        plugins: Python files to run first. A stored config runs none, so name its plug-ins here.
        changes: fields of the config to change, as in `config.replace`. `data` may also be what `distill`
            takes.

    Raises:
        MDistillerError: one of its children, for a config, data or checkpoint that cannot work.
    """
    load_plugins(plugins)
    if not isinstance(config, RunConfig):
        config = stored_config(config, resume=resume) or get_recipe(str(config))
    objects = Objects()
    data = changes.get("data")
    if data is not None and not (isinstance(data, Mapping) and "train" not in data):
        labeled = getattr(config.data_settings, "labeled", True)
        _, changes["data"], readers = find_data(data, labeled=labeled)
        objects.data.update(readers)
        if readers and config.recipe.startswith("folder."):
            augment = changes.get("augment", {})
            changes["augment"] = {"crop": "auto", **augment} if isinstance(augment, Mapping) else augment
    with objects.known():
        config = _with_plugins(config, plugins).replace(**changes)
        shown, usual = _shown(reporter), _usual(config)
        return _run(launch.train(config, resume=resume, reporter=shown, usual=usual), objects)


def stored_config(source: str | Path, *, resume: bool = False) -> RunConfig | None:
    """Reads the config of a run folder, a config.json or a YAML file; None for another word.

    A resumed run stays in its folder, wherever that was moved; a repeated run gets its own.

    Raises:
        ConfigError: a folder or file that is no run, or one with a plug-in that is not loaded.
    """
    path = Path(source)
    if os.path.isfile(path / CONFIG):
        path /= CONFIG
    if path.suffix == ".json":
        config = load_config(path, whole=True)
        return config.model_copy(update={"out": path.parent if resume else None})
    if path.suffix in YAML:
        return _read_yaml(path)
    if os.path.isdir(path):
        raise ConfigError(f"{path} is no run folder: it has no {CONFIG}")
    if os.path.isfile(path):
        raise ConfigError(f"{path} is a file; allowed: a recipe, a run folder, its {CONFIG} or a .yaml file")
    return None


def _read_yaml(path: Path) -> RunConfig:
    """Reads a YAML file; fields that it leaves out come from its recipe."""
    values = read_values(path)
    recipe, start = values.get("recipe"), values.get("student")
    if not isinstance(recipe, str) or not recipe or RunConfig.model_fields.keys() <= values.keys():
        return load_config(path, whole=True)
    loaded, absent = recorded_plugins(values.get("plugins"))
    if absent:
        raise ConfigError(f"{path}: plugins: {absent}")
    start = start if isinstance(start, Mapping) else {}
    pretrained = start.get("checkpoint") is not None or is_pretrained(start.get("options") or {})
    try:
        return get_recipe(recipe, pretrained=pretrained).replace(**values | {"plugins": tuple(loaded)})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def distill(
    student: Model | Run,
    teacher: Model | Run | Sequence[Model | Run] | None,
    data: object,
    method: AnyMethod | Sequence[AnyMethod] | None = None,
    *,
    teacher_weights: Sequence[float] | None = None,
    task: str | None = None,
    resume: bool = False,
    reporter: Shown = None,
    pretrained: bool | None = None,
    teacher_input: object = None,
    plugins: Sequence[str | Path] = (),
    **settings: object,
) -> Run:
    """Trains a student with a teacher, and writes a run folder.

    Settings are those of the recipe `DATA.METHOD.TEACHER_STUDENT`. Your own data use the family `folder`,
    with padded crops for arrays. Modules are not changed: the run works on copies. A student starts from the
    weights that it has, and is `run.student` at the end.

    Args:
        student: a module that returns logits [B, classes], a model's name, a run folder, hf://USER/REPO
            (@REVISION), or the fields of a `ModelConfig`, such as
            `{"name": "timm/resnet18", "options": {"pretrained": True}}`.
        teacher: likewise, with weights; `self` is the student's moving average. None, with method `none`:
            the student alone. A list: several teachers, whose losses are added.
        data: a folder of images; a registered name; a pair (train, test), each a `Dataset` of (image, label)
            without random transforms or a pair of tensors (images uint8 [N, H, W, 3] or [N, 3, H, W], labels
            [N]); or fields of a `DataConfig`, with `train`, `test` and `classes` for objects.
        method: a method's name, or its fields with the `name` among them. None: dkd, or what the task has in
            its place. Of several teachers, one for all, or a list.
        teacher_weights: factors of the losses of several teachers. None: 1 each.
        task: the recipe family for your own data, such as `embed`, which learns embeddings from images
            without labels. None: `folder`.
        resume: resume from the state in `out`, left there by an earlier start with the same arguments.
        reporter: progress display. None: a bar in a terminal, lines elsewhere, on stderr. False: nothing.
        pretrained: whether the student is to be fine-tuned, with the settings for that. None: if it is from a
            run, has a checkpoint or an option for pretrained weights; a module is not.
        teacher_input: mean, standard deviation and size of a teacher's images where they are not the data's,
            as `Distiller` takes them. A teacher from a run or with pretrained weights by name brings its own.
            Of several teachers, a list.
        plugins: Python files to run first, which register models, methods or data sets.
        settings: fields of the config, such as `epochs=30`, `optim={"lr": 0.01}`, `out="runs/mine"`.

    Raises:
        MDistillerError: one of its children, for arguments, data or checkpoints that cannot work.
    """
    several = [*teacher] if isinstance(teacher, list | tuple) else [teacher]
    if isinstance(student, nn.Module) and any(student is one for one in several):
        raise ConfigError(
            "teacher: got the student's own module; allowed: another model, or 'self' for its moving average"
        )
    load_plugins(plugins)
    if isinstance(student, Run) and pretrained is None:
        pretrained = True
    objects = Objects()
    learner = find_model(_unwrap(student)[0], "student", objects)
    inputs = one_each("teacher_input", teacher_input, len(several))
    methods = one_each("method", method, len(several))
    weights = one_each("teacher_weights", teacher_weights or 1.0, len(several))
    found = []
    for given, own in zip(several, inputs, strict=True) if teacher is not None else ():
        source, images = _unwrap(given)
        found.append(find_model(source, "teacher", objects, images if own is None else own))
    first = found[0] if found else None
    recipes = find_family(task or "folder")
    if recipes is None:
        raise UnknownNameError("task", str(task), list_families())
    family, data_fields, readers = find_data(data, labeled=recipes.labeled)
    family = task or family
    methods = [recipes.method if one is None else one for one in methods]
    objects.data.update(readers)
    if teacher_weights or len(found) > 1:
        settings["teacher_weight"] = weights[0]
        settings["more_teachers"] = [
            {**dict(ModelConfig.model_validate(one.model)), "method": own, "weight": weight}
            for one, own, weight in zip(found[1:], methods[1:], weights[1:], strict=True)
        ]
    with objects.known():
        config = config_for(family, learner, first, methods[0], pretrained)
        if family == "folder" and data_fields["kind"] != "folder":
            config = config.replace(augment={"crop": "auto"})
        if first is not None:
            config = first.fit_data(config)
        config = _with_plugins(config, plugins).replace(data=data_fields, **settings)
        shown, usual = _shown(reporter), _usual(config)
        return _run(launch.train(config, resume=resume, reporter=shown, usual=usual), objects)


def _with_plugins(config: RunConfig, files: Sequence[str | Path]) -> RunConfig:
    found = (*config.plugins, *(Path(file).resolve() for file in files))
    return config.model_copy(update={"plugins": tuple(dict.fromkeys(found))})


def _shown(reporter: Shown) -> Reporter | None:
    return ProgressDisplay() if reporter is None else reporter or None


def _usual(config: RunConfig) -> RunConfig | None:
    """Returns the config from which loggers show the differences."""
    return recipe_of(config) if config.log else None


def _run(result: launch.RunResult, objects: Objects) -> Run:
    run = Run.__new__(Run)
    run.path, run.objects, run._summary = result.path, objects, result.summary
    return run


def _unwrap(model: object) -> tuple[object, Line | None]:
    """Returns the folder of a run; of a run with a module, its student, and the images that it saw."""
    if not isinstance(model, Run):
        return model, None
    if not model.config.student.is_given:
        return model.folder, None
    metadata = read_metadata(find_student(model.folder))  # another module may have the same name
    return model.student, {name: metadata[name] for name in ("image_size", "mean", "std")}
