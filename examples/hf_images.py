"""A vision transformer distilled into a convolutional network by the Trainer of transformers.

    python examples/hf_images.py

The teacher is trained here for a few epochs on scikit-learn's digits; a real one comes by `from_pretrained`.
"""

import tempfile

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import mdistiller
from mdistiller.integrations.hf import DistillTrainer


def digits():
    """Returns training and test rows of images [3, 16, 16] and labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
    rows = [
        {"pixel_values": image, "labels": int(label)}
        for image, label in zip(F.interpolate(images, 16), data.target, strict=True)
    ]
    return rows[:1297], rows[1297:]


def accuracy(prediction):
    """Computes the fraction of images whose likeliest class is the label."""
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean().item()}


def main(epochs=4, method="dkd+fitnet", limit=None):
    """Trains teacher and student; returns the student's trainer and its metrics."""
    torch.manual_seed(0)
    train, test = digits()
    teacher = ViTForImageClassification(
        ViTConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=16,
            patch_size=4,
            num_labels=10,
        )
    )
    student = mdistiller.create_model("resnet8", num_classes=10)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            save_strategy="no",
            report_to="none",
        )
        data = {"train_dataset": train[:limit], "eval_dataset": test[:limit], "compute_metrics": accuracy}
        Trainer(teacher, args, **data).train()
        distiller = mdistiller.Distiller(student, teacher, method, input_shape=(3, 16, 16))
        trainer = DistillTrainer(distiller, args, **data)
        trainer.train()
        metrics = trainer.evaluate()
    print(f"student: loss {metrics['eval_loss']:.3f}, accuracy {metrics['eval_accuracy']:.3f}")
    return trainer, metrics


if __name__ == "__main__":
    main()
