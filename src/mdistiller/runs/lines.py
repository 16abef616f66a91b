"""Contents of a run's files, as readers check them: environment, windows, evaluations, summary."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from mdistiller.runs.environment import Machine


class Read(BaseModel):
    """Values that are read from a file, which may be damaged or edited; `title` is its name for messages."""

    model_config = ConfigDict(strict=True)


class Environment(Machine, Read, title="env.json"):
    """Values of a run's `env.json`."""

    command: list[str] = []
    gpus: list[str]
    versions: dict[str, str]
    commit: str | None


class Window(Read, title="metrics.jsonl"):
    """Mean loss of a training window, which ends at a step."""

    step: int
    loss: float


class Evaluation(Read, title="metrics.jsonl"):
    """One evaluation of a run."""

    epoch: int
    value: float
    """The run's metric."""
    best: float
    """Best value so far."""
    seconds: float | None = None
    ms_per_step: float | None = None
    diagnostics: dict[str, dict[str, float | None] | None] | None = None

    def seen(self, images: str = "test") -> Mapping[str, float]:
        """Returns the known diagnostics on `test` or `train` images, by name."""
        values = (self.diagnostics or {}).get(images) or {}
        return {name: value for name, value in values.items() if value is not None}


class Summary(Read, title="metrics.jsonl", extra="allow"):
    """Summary at a run's end."""

    step: int | None = None
    ms_per_step: float | None = None
    student_parameters: int
    method_parameters: int | None = None
