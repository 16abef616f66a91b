"""Exported backbones: graphs from images to embeddings."""

from pathlib import Path

from torch import Tensor, nn

from mdistiller.config import RunConfig
from mdistiller.errors import ConfigError
from mdistiller.tasks.classification.deployment import ClassifierDeployment, Prediction
from mdistiller.tasks.embed.evaluate import embedding_of
from mdistiller.training.deployment import Deployment, Format, Model, ModelInput
from mdistiller.types import Line


class _Embedding(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return embedding_of(self.model(image))


class EmbedDeployment(ClassifierDeployment):
    """Graphs from normalised images, float32 [B, 3, S, S], to embeddings [B, D]."""

    outputs = ("embedding",)
    predictions = "embedding"
    load_test_set = Deployment.load_test_set

    def card_fields(self, metadata: Line, config: RunConfig | None) -> Line:
        return super().card_fields({**metadata, "classes": ()}, config)

    def as_model(self, student: nn.Module) -> Model:
        return lambda images: (embedding_of(student(images)),)

    def write_graph(self, path: Path, format: Format, student: nn.Module, metadata: Line) -> None:
        super().write_graph(path, format, _Embedding(student), metadata)

    def describe(self, fields: ModelInput) -> dict[str, str]:
        return super().describe(fields) | {"output": "embeddings [B, D]"}

    def predict(
        self, model: Model, fields: ModelInput, images: list[Tensor], top: int
    ) -> list[list[Prediction]]:
        raise ConfigError(
            "predict: this student has embeddings and no classes; give --out FILE.npy or FILE.parquet (in "
            "Python `Predictor.outputs`)"
        )
