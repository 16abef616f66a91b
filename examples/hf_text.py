"""Text classification: a BERT distilled into a DistilBERT by the Trainer of transformers.

    python examples/hf_text.py

Both models are small and start from random weights; pretrained ones come by `from_pretrained`. The texts are
parts of Python's own manual, and the label is the chapter.
"""

import re
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import mdistiller
from mdistiller.integrations.hf import DistillTrainer

CHAPTERS = ("debugger", "formatstrings", "typesseq", "specialnames")
LENGTH = 16


def texts():
    """Returns training and test rows of LENGTH words, and the number of words in the vocabulary."""
    words = [re.findall(r"[a-z]+", topics[chapter].lower()) for chapter in CHAPTERS]
    number = {word: i for i, word in enumerate(sorted({w for chapter in words for w in chapter}), start=1)}
    rows = []
    for label, chapter in enumerate(words):
        for start in range(0, min(len(chapter), 2000) - LENGTH, LENGTH):
            ids = [number[word] for word in chapter[start : start + LENGTH]]
            rows.append({"input_ids": ids, "token_type_ids": [0] * LENGTH, "labels": label})
    return [r for i, r in enumerate(rows) if i % 5], rows[::5], len(number) + 1


def accuracy(prediction):
    """Computes the fraction of texts whose likeliest chapter is the label."""
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean().item()}


def main(epochs=6, width=64):
    """Trains teacher and student; returns the student's trainer and its metrics."""
    torch.manual_seed(0)
    train, test, vocabulary = texts()
    sizes = {"vocab_size": vocabulary, "num_labels": len(CHAPTERS)}
    teacher = BertForSequenceClassification(
        BertConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            **sizes,
        )
    )
    student = DistilBertForSequenceClassification(
        DistilBertConfig(dim=width // 2, n_layers=1, n_heads=2, hidden_dim=width, **sizes)
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            save_strategy="no",
            report_to="none",
        )
        data = {"train_dataset": train, "eval_dataset": test, "compute_metrics": accuracy}
        Trainer(teacher, args, **data).train()
        distiller = mdistiller.Distiller(student, teacher, "dkd", beta=2.0, warmup=0.2)
        trainer = DistillTrainer(distiller, args, **data)
        trainer.train()
        metrics = trainer.evaluate()
    print(f"student: loss {metrics['eval_loss']:.3f}, accuracy {metrics['eval_accuracy']:.3f}")
    return trainer, metrics


if __name__ == "__main__":
    main()
