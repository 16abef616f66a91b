"""Distillation of a causal language model in Hugging Face's Trainer.

    python examples/causal_lm.py

Tokens are the bytes of Python's own help texts. The teacher is trained here for a few steps; a real one comes
with its weights. The loss of the logits is computed from the last hidden states, in chunks of rows, so that a
large vocabulary needs little memory (`large_vocabulary.py`).
"""

import tempfile
from pydoc_data.topics import topics

import torch
from large_vocabulary import linear_dkd_loss
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

LENGTH = 64
PADDING = 256  # after all bytes


class DistillationTrainer(Trainer):
    """Trainer whose loss is the model's own, for the next token, and DKD from a teacher."""

    def __init__(self, *args, teacher, temperature=2.0, beta=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.settings = {"temperature": temperature, "beta": beta}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs, output_hidden_states=True)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            teacher = self.teacher.model(**tokens).last_hidden_state
        # A position predicts the next token; labels of padding are -100, which the loss ignores.
        distillation = linear_dkd_loss(
            out.hidden_states[-1][:, :-1],
            self.accelerator.unwrap_model(model).lm_head.weight,
            teacher[:, :-1],
            self.teacher.lm_head.weight,
            inputs["labels"][:, 1:],
            **self.settings,
        )
        loss = out.loss + distillation
        return (loss, out) if return_outputs else loss


def samples():
    """Cuts the texts into sequences of one length; the last of a text is padded."""
    rows = []
    for text in topics.values():
        data = list(text.encode())
        for start in range(0, len(data), LENGTH):
            part = data[start : start + LENGTH]
            padding = [0] * (LENGTH - len(part))
            row = {
                "input_ids": part + [PADDING for _ in padding],
                "attention_mask": [1] * len(part) + padding,
                "labels": part + [-100 for _ in padding],
            }
            rows.append({name: torch.tensor(value) for name, value in row.items()})
    return rows


def language_model(width, layers):
    """Builds a small model with random weights."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=PADDING + 1, pad_token_id=PADDING, num_attention_heads=4, **sizes)
    return LlamaForCausalLM(config)


def main(steps=200):
    """Trains teacher and student; returns the training losses of the student by step."""
    torch.manual_seed(0)
    data, teacher, student = samples(), language_model(64, 2), language_model(32, 1)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        Trainer(teacher, settings, train_dataset=data).train()
        trainer = DistillationTrainer(student, settings, train_dataset=data, teacher=teacher)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
