"""Exported backbones: graphs from images to embeddings."""

from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.tasks.classification.deployment import ClassifierDeployment, Prediction
from mdistiller.tasks.embed.evaluate import embedding_of
from mdistiller.training.deployment import Deployment, Model, ModelInput


class EmbedDeployment(ClassifierDeployment):
    """Graphs from normalized images, float32 [B, 3, S, S], to embeddings [B, D]."""

    outputs = ("embedding",)
    hub_task = "image-feature-extraction"
    read = staticmethod(embedding_of)
    show_code = "print(embedding[0])"
    load_test_set = Deployment.load_test_set

    def describe(self, fields: ModelInput) -> dict[str, str]:
        return super().describe(fields) | {"output": "embeddings [B, D]"}

    def predict(
        self, model: Model, fields: ModelInput, images: list[Tensor], top: int
    ) -> list[list[Prediction]]:
        raise ConfigError(
            "predict: this student has embeddings and no classes; give --out FILE.npy or FILE.parquet (in "
            "Python `Predictor.outputs`)"
        )
