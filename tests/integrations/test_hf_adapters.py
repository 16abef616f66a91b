"""LoRA students and gradient checkpointing in transformers' Trainer."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.models import tap_points

transformers = pytest.importorskip("transformers", minversion="4.50")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from mdistiller.integrations.hf import DistillTrainer  # noqa: E402

# PEFT asks for an attribute that transformers 5 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in transformers.TrainingArguments.__dataclass_fields__
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def images():
    return [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(IMAGES)]


def vit(width=16, **options):
    sizes = {**SIZES, "hidden_size": width, "image_size": 16, "patch_size": 4, "num_labels": 3, **options}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def lora(model, modules):
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=modules, modules_to_save=["classifier"])
    )


def distiller(adapted=True):
    torch.manual_seed(0)
    student = vit(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    student = lora(student, r".*(query|q_proj)") if adapted else student
    taps = {"student_taps": ["stage1"], "teacher_taps": ["stage1"]}
    return mdistiller.Distiller(student, vit(32), "fitnet", input_shape=(3, 16, 16), **taps)


def trainer(folder, made, kind=DistillTrainer, **options):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.5, "use_cpu": True}
    settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "optim": "sgd"}
    settings |= {"lr_scheduler_type": "constant", "dataloader_pin_memory": False, **options}
    arguments = transformers.TrainingArguments(str(folder), **settings)
    return kind(made, arguments, train_dataset=images(), eval_dataset=images()[:6])


def same(made, other):
    for (name, own), value in zip(made.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(own, value, msg=name)


def test_adapters_train_are_saved_and_resume(tmp_path):
    """A run that stops after two of four steps continues as one that did not."""
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = distiller()
    before = copy.deepcopy(whole.state_dict())
    trainer(tmp_path / "whole", whole, **options).train()
    moved = {key for key, value in whole.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key in moved if "lora_" in key}
    assert all("lora_" in key or "modules_to_save" in key or key.startswith("method.") for key in moved)
    folder = tmp_path / "whole" / "checkpoint-2"
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in key or "classifier" in key for key in saved)
    resumed = distiller()
    trainer(tmp_path / "resumed", resumed, **options).train(resume_from_checkpoint=str(folder))
    same(whole, resumed)
    assert all(
        p.requires_grad == q.requires_grad
        for p, q in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


def test_the_best_adapters_are_loaded_at_the_end(tmp_path):
    made, seen, losses = distiller(), [], iter((1.0, 2.0, 3.0, 4.0))

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(copy.deepcopy(made.state_dict()))

    class Worse(DistillTrainer):
        def evaluation_loop(self, *args, **kwargs):
            found = super().evaluation_loop(*args, **kwargs)
            found.metrics["eval_loss"] = next(losses)
            return found

    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(tmp_path, made, kind=Worse, load_best_model_at_end=True, **options)
    run.add_callback(Keep())
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    state = made.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in seen[0].items())
    assert any(not torch.equal(value, state[key]) for key, value in seen[-1].items())
    assert all(p.requires_grad for name, p in made.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("name", ["vit", "timm/resnet10t", "torchvision/resnet18", "resnet8"])
def test_an_adapted_model_has_the_taps_of_its_own_model(name):
    torch.manual_seed(0)
    plain = vit() if name == "vit" else mdistiller.create_model(name, 3)
    head = "classifier" if name == "vit" else "fc"
    adapted = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=[head]))
    names = tuple(tap_points(plain))
    assert tuple(tap_points(adapted)) == names
    images = IMAGES[:2] if name in ("vit", "resnet8") else IMAGES[:2].repeat(1, 1, 4, 4)
    expected, found = (mdistiller.tap(model.eval(), names)(images) for model in (plain, adapted))
    for tap in names:
        torch.testing.assert_close(found.features[tap], expected.features[tap], msg=tap)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_without_peft_s_module_are_refused(tmp_path, monkeypatch, when):
    """Transformers saves them alone, and the trainer resumes from the whole model."""
    # Versions of transformers ask for versions of PEFT that are not released.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    config = peft.LoraConfig(r=2, target_modules=["query", "q_proj"])
    student = vit()
    if when == "before":
        student.add_adapter(config)
    made = mdistiller.Distiller(student, vit(32), "kd")
    run = trainer(tmp_path, made, save_strategy="steps", save_steps=2)
    if when == "after":
        made.student.add_adapter(config)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ConfigError, match=r"from add_adapter .*allowed: Distiller\(peft.get_peft_model"):
        run.train()
    same(made, type("Before", (), {"state_dict": lambda _: before})())
    out = made.train()(IMAGES[:2], torch.tensor([0, 1]))  # one's own loop
    out.loss.backward()
    assert all(("lora_" in name) == (p.grad is not None) for name, p in student.named_parameters())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 3)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).mean(1))


def test_each_model_gets_its_own_columns(tmp_path):
    """An adapted model takes any keyword and passes it on to its own model."""
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, vocab_size=30, num_labels=3)
    )
    student = peft.get_peft_model(Words(), peft.LoraConfig(r=2, target_modules=["head"]))
    made = mdistiller.Distiller(student, bert, "kd")
    tokens = torch.ones(4, 5, dtype=torch.int64)
    names = ("input_ids", "attention_mask", "token_type_ids")
    out = made({name: tokens * (name != names[2]) for name in names}, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(out.logits, student(tokens))
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    run = DistillTrainer(made, arguments)
    run._set_signature_columns_if_needed()
    assert set(names) <= set(run._signature_columns)
    alone = DistillTrainer(mdistiller.Distiller(student, None, "none"), arguments)
    alone._set_signature_columns_if_needed()
    assert "input_ids" in alone._signature_columns
    assert names[2] not in alone._signature_columns


def test_an_adapted_causal_model_predicts_the_next_token():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=20, **SIZES)
    student = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    tokens = torch.randint(20, (2, 6))
    out = mdistiller.Distiller(student, None, "none")({"input_ids": tokens}, tokens)
    torch.testing.assert_close(out.loss, student(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("adapted", [True, False])
def test_gradient_checkpointing_changes_no_weight(tmp_path, adapted):
    whole, made = distiller(adapted), distiller(adapted)
    trainer(tmp_path, whole).train()
    calls = []
    layer = next(
        m for n, m in made.student.named_modules() if n.endswith("layers.0") or n.endswith("layer.0")
    )
    next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer(tmp_path, made, **{CHECKPOINTING: True}).train()
    assert len(calls) == 8  # four steps, each with a second pass
    same(whole, made)


def test_checkpointing_that_cuts_the_features_off_is_refused(tmp_path):
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigError, match=r"use_reentrant: got True.*allowed: False"):
        trainer(tmp_path, distiller(adapted=False), **options).train()


def test_a_student_without_checkpointing_is_named(tmp_path):
    made = mdistiller.Distiller(mdistiller.create_model("resnet8", 3), vit(), "kd")
    with pytest.raises(ConfigError, match="gradient_checkpointing: the student ResNet has none"):
        trainer(tmp_path, made, **{CHECKPOINTING: True}).train()


def test_layers_of_a_plain_model_with_adapters(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["3"]))
    assert mdistiller.tap(adapted, ["pooled"])(torch.randn(2, 3, 2, 2)).features["pooled"].shape == (2, 8)
