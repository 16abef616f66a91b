"""Distillation by transformers' Trainer: what trains, what is saved, what is evaluated."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mdistiller
from mdistiller.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers", minversion="4.50")
pytest.importorskip("accelerate")

from mdistiller.integrations.hf import DistillTrainer  # noqa: E402

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def images():
    return [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(IMAGES)]


def vit(width=16, layers=2):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=32, image_size=16, patch_size=4, num_labels=3, hidden_dropout_prob=0.0
    )
    return transformers.ViTForImageClassification(config)


def cnn():
    return mdistiller.create_model("resnet8", 3)


def trainer(folder, distiller, **options):
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True}
    arguments |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    arguments |= {"lr_scheduler_type": "constant", "dataloader_pin_memory": False, **options}
    return DistillTrainer(
        distiller,
        transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=images(),
        eval_dataset=images()[:6],
    )


def distiller(method="fitnet", student=cnn, teacher=vit, **settings):
    torch.manual_seed(0)
    taps = {"student_taps": ["stage1"], "teacher_taps": ["stage1"]} if method == "fitnet" else {}
    return mdistiller.Distiller(student(), teacher(), method, input_shape=(3, 16, 16), **taps, **settings)


def test_every_trainable_parameter_moves_and_the_teacher_stays(tmp_path):
    made = distiller()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    teacher = copy.deepcopy(made.teacher.state_dict())
    assert any(name.startswith("method.") for name in before)
    run = trainer(tmp_path, made)
    run.train()
    assert not [n for n, p in made.named_parameters() if torch.equal(p, before[n])]
    assert all(torch.equal(value, teacher[key]) for key, value in made.teacher.state_dict().items())
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert {"loss_task", "loss_fitnet"} <= set(logged[0])
    assert logged[0]["loss"] == pytest.approx(logged[0]["loss_task"] + logged[0]["loss_fitnet"], rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_are_those_of_the_distiller_in_a_plain_loop(tmp_path, accumulate):
    """Also DKD's warm-up, by the trainer's progress."""
    made = distiller("dkd", warmup=1.0)
    twin = copy.deepcopy(made)
    run = trainer(tmp_path, made, gradient_accumulation_steps=accumulate, max_grad_norm=0.0, optim="sgd")
    batches = []
    forward = run.model.forward
    run.model.forward = lambda **inputs: (batches.append(inputs), forward(**inputs))[1]
    run.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    twin.train()
    for step in range(4):
        loss = 0
        for inputs in batches[step * accumulate : (step + 1) * accumulate]:
            loss += twin(inputs["pixel_values"], inputs["labels"], progress=step / 4).loss / accumulate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert logged[step] == pytest.approx(loss.item(), abs=1e-3)
    for (name, own), other in zip(made.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, msg=name)


def test_evaluation_is_of_the_student_alone(tmp_path):
    made = distiller()
    run = trainer(tmp_path, made)
    calls = []
    handle = made.teacher.register_forward_hook(lambda *_: calls.append(1))
    metrics = run.evaluate()
    predicted = run.predict(images()[:6])
    handle.remove()
    assert not calls
    with torch.no_grad():
        logits = made.student.eval()(IMAGES[:6])
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2] * 2))
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(torch.tensor(predicted.predictions), logits)


def test_a_checkpoint_has_student_and_adapters_and_resumes(tmp_path):
    """A run that stops after two of four steps continues as one that did not."""
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "sgd"}
    whole = distiller(student=vit)
    trainer(tmp_path / "whole", whole, **options).train()
    folder = tmp_path / "whole" / "checkpoint-2"
    # The student's own files, as `from_pretrained` reads them.
    _, info = transformers.ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    adapters = load_file(folder / "distiller.safetensors")
    assert all(key.startswith("distiller.method.") for key in adapters)
    resumed = distiller(student=vit)
    trainer(tmp_path / "resumed", resumed, **options).train(resume_from_checkpoint=str(folder))
    for (name, own), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, msg=name)
    (folder / "distiller.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"distiller.safetensors: not of this method; missing"):
        trainer(tmp_path / "again", distiller(student=vit), **options).train(
            resume_from_checkpoint=str(folder)
        )


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    made = distiller()
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(tmp_path, made, load_best_model_at_end=True, learning_rate=0.5, optim="sgd", **options)
    run.train()
    best = load_file(run.state.best_model_checkpoint + "/distiller.safetensors")
    student = load_file(run.state.best_model_checkpoint + "/model.safetensors")
    state = run.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in best.items())
    assert all(torch.equal(value, made.student.state_dict()[key]) for key, value in student.items())


def test_words_of_a_pair_whose_models_take_other_columns(tmp_path):
    """BERT takes token types, DistilBERT does not."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "num_labels": 3}
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **sizes
        )
    )
    small = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=16, **sizes)
    )
    rows = [
        {
            "input_ids": [1 + i, 2, 3, 4],
            "attention_mask": [1] * 4,
            "token_type_ids": [0, 0, 1, 1],
            "labels": i % 3,
        }
        for i in range(12)
    ]
    made = mdistiller.Distiller(small, bert, "dkd")
    run = trainer(tmp_path, made)
    run.train_dataset = rows
    seen = []
    bert.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    run.train()
    assert seen[0] == {"input_ids", "attention_mask", "token_type_ids"}


def test_a_memory_of_all_images_reads_the_column_index(tmp_path):
    made = distiller(
        "crd", teacher=lambda: mdistiller.create_model("resnet14", 3), labels=torch.arange(24) % 3
    )
    run = trainer(tmp_path, made)
    with pytest.raises(ConfigError, match="positions in the training set"):
        run.train()
    run = trainer(tmp_path, made)
    run.train_dataset = [row | {"index": i} for i, row in enumerate(images())]
    run.train()
    assert run.model.losses["crd"] > 0


def test_a_second_loss_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the loss is the distiller's.*Distiller\(..., label_smoothing="):
        trainer(tmp_path, distiller(), label_smoothing_factor=0.1)
