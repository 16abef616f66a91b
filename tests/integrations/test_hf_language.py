"""Language models in transformers' Trainer: labels are compared as each model's own loss compares them."""

import copy
import inspect

import pytest
import torch
from torch import nn

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import dkd_loss

transformers = pytest.importorskip("transformers", minversion="4.50")
pytest.importorskip("accelerate")

from mdistiller.integrations.hf import DistillTrainer  # noqa: E402
from mdistiller.models.language import predicts_next  # noqa: E402


def text(kind):
    """A student, a teacher and two texts, the second with two words of padding."""
    torch.manual_seed(0)
    models = [kind() if inspect.isfunction(kind) else bert(kind, num_labels=3) for _ in range(2)]
    words = torch.randint(1, WORDS, (2, 6))
    mask = torch.ones_like(words)
    mask[1, 4:] = 0
    return models, {"input_ids": words * mask, "attention_mask": mask}


TEXTS = ["BertForTokenClassification", "BertForMaskedLM", "llama", "gpt2"]


@pytest.mark.parametrize("name", TEXTS)
def test_texts_without_labels(name):
    """The loss is that with the words as labels, of which no method reads more than where there are some."""
    models, inputs = text(globals().get(name) or getattr(transformers, name))
    distiller = mdistiller.Distiller(*models, "kd", task_weight=0.0).eval()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.clamp(max=2) if "Token" in name else labels
    out, expected = distiller(inputs), distiller(inputs, labels)
    assert "task" not in out.losses
    torch.testing.assert_close(out.losses["kd"], expected.losses["kd"])
    whole = distiller({"input_ids": inputs["input_ids"]})
    assert (whole.loss - out.loss).abs() > 1e-6, "without a mask, every position counts"


def test_positions_that_nothing_tells():
    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(WORDS, 8), nn.Conv1d(8, 3, 1)

        def forward(self, input_ids):
            return self.conv(self.embed(input_ids).mT)

    inputs = {"input_ids": torch.ones(2, 6, dtype=torch.int64)}
    distiller = mdistiller.Distiller(Convolved(), Convolved(), "kd", task_weight=0.0)
    with pytest.raises(
        ConfigError, match=r"logits \[2, 3, 6\] without a target: .* logits_of=lambda out: out"
    ):
        distiller(inputs)
    known = mdistiller.Distiller(
        distiller.student, distiller.teacher, "kd", task_weight=0.0, logits_of=lambda out: out.mT
    )
    assert known(inputs).loss >= 0
    inputs["attention_mask"] = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"attention_mask \[2, 5\].* positions \[2, 6\]"):
        known({**inputs})
    labeled = mdistiller.Distiller(*text(llama)[0], "kd")
    for target in (None, torch.full((2,), -100)):
        with pytest.raises(ConfigError, match="target"):
            labeled(text(llama)[1], target)


def test_a_trainer_of_texts_without_labels(tmp_path):
    models, inputs = text(llama)
    rows = [{"input_ids": row[:4]} for row in inputs["input_ids"]]
    made = mdistiller.Distiller(*models, "kd", task_weight=0.0)
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, max_steps=2, save_strategy="no"
    )
    before = copy.deepcopy(made.student.state_dict())
    DistillTrainer(made, arguments, train_dataset=rows).train()
    assert any(not torch.equal(value, before[key]) for key, value in made.student.state_dict().items())
    with pytest.raises(ConfigError, match="target: got none"):
        DistillTrainer(mdistiller.Distiller(*models, "kd"), arguments, train_dataset=rows).train()


class Words:
    """The part of a tokenizer that a collator reads."""

    pad_token_id, pad_token, mask_token, padding_side = 0, "pad", "mask", "right"

    def pad(self, rows, **options):
        longest = max(len(row["input_ids"]) for row in rows)
        words = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {"input_ids": torch.tensor(words), "attention_mask": torch.tensor(mask)}


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = 20


def bert(kind, **options):
    config = transformers.BertConfig(vocab_size=WORDS, hidden_dropout_prob=0.0, **SIZES, **options)
    config.attention_probs_dropout_prob = 0.0
    return kind(config)


def llama(width=16):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=WORDS, **{**SIZES, "hidden_size": width})
    )


def gpt2():
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, **dropout)
    return transformers.GPT2LMHeadModel(config)


def bart_decoder():
    config = transformers.BartConfig(
        vocab_size=WORDS,
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        dropout=0.0,
    )
    return transformers.BartForCausalLM(config)


MODELS = {
    "token": lambda: bert(transformers.BertForTokenClassification, num_labels=WORDS),
    "masked": lambda: bert(transformers.BertForMaskedLM),
    "llama": llama,
    "gpt2": gpt2,
    "bert": lambda: bert(transformers.BertLMHeadModel, is_decoder=True),
    "bart": bart_decoder,  # its labels are shifted by whoever gives them
}


def rows(count=12, length=8):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, WORDS, (count, length), generator=generator)
    labels = words.clone()
    # The first token too: some releases divide by the number of labels before the shift, which drops it.
    labels[:, [0, -2, -1]] = -100
    keep = torch.ones(length, dtype=torch.int64)
    return [{"input_ids": x, "attention_mask": keep, "labels": y} for x, y in zip(words, labels, strict=True)]


def arguments(folder):
    return transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.5, optim="sgd", use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def batch(count=4):
    picked = rows(count)
    return {name: torch.stack([row[name] for row in picked]) for name in picked[0]}


@pytest.mark.parametrize("name", MODELS)
def test_without_a_teacher_the_training_is_the_trainers_own(tmp_path, name):
    torch.manual_seed(0)
    student = MODELS[name]()
    twin = copy.deepcopy(student)
    data = {"train_dataset": rows(), "eval_dataset": rows(4)}
    run = DistillTrainer(mdistiller.Distiller(student, None, "none"), arguments(tmp_path), **data)
    plain = transformers.Trainer(twin, arguments(tmp_path), **data)
    run.train()
    plain.train()
    for (key, own), other in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, msg=key)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential])
def test_a_distiller_of_ones_own_follows_the_same_rule(wrap):
    """Also of a model inside another module; the method's labels are those of the task loss."""
    torch.manual_seed(0)
    student, teacher, inputs = llama(), llama(32), batch()
    made = mdistiller.Distiller(wrap(student), teacher, "dkd", warmup=0)
    given = {"input_ids": inputs["input_ids"]}
    out = made(given, inputs["labels"])
    expected = student(**given, labels=inputs["labels"]).loss
    torch.testing.assert_close(out.losses["task"], expected)
    torch.testing.assert_close(made.evaluate(given, inputs["labels"])[0], expected)
    dkd = dkd_loss(
        student(**given).logits[:, :-1],
        teacher(**given).logits[:, :-1].detach(),
        inputs["labels"][:, 1:],
        beta=made.method.config.beta,
    )
    torch.testing.assert_close(out.losses["dkd"], dkd)


def test_a_students_own_module_has_the_labels_of_its_causal_teacher():
    torch.manual_seed(0)
    student, inputs = nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)), batch()
    made = mdistiller.Distiller(student, llama(), "kd", task_weight=1.0)
    out = made({"input_ids": inputs["input_ids"]}, inputs["labels"])
    logits = student(inputs["input_ids"])[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.losses["task"], expected)


def test_a_function_of_the_logits_compares_positions_as_they_are():
    torch.manual_seed(0)
    student, inputs = llama(), batch()
    made = mdistiller.Distiller(
        student, llama(32), "kd", task_weight=1.0, logits_of=lambda out: out.logits[:, :-1]
    )
    out = made({"input_ids": inputs["input_ids"]}, inputs["labels"][:, 1:])
    torch.testing.assert_close(out.losses["task"], student(**inputs).loss)


def test_padding_is_no_part_of_a_method(tmp_path):
    """KD over the tokens that have a label, in a loop by hand; sentences of other lengths beside them."""
    torch.manual_seed(0)
    student, teacher = gpt2(), gpt2()
    collate = transformers.DataCollatorForLanguageModeling(Words(), mlm=False)
    sentences = [{"input_ids": list(range(3, 3 + n))} for n in (9, 4, 2)]
    inputs = dict(collate(sentences))
    labels = inputs.pop("labels")
    assert (labels == -100).sum() == 12
    out = mdistiller.Distiller(student, teacher, "kd", temperature=2.0, weight=1.0)(inputs, labels)
    total, count = 0.0, 0
    logits, taught = (model(**inputs).logits.detach() for model in (student, teacher))
    for row, sentence in enumerate(sentences):
        for i in range(len(sentence["input_ids"]) - 1):  # the last token has no next one
            p, q = ((x[row, i] / 2.0).log_softmax(0) for x in (taught, logits))
            total, count = total + 4.0 * (p.exp() * (p - q)).sum().item(), count + 1
    assert out.losses["kd"].item() == pytest.approx(total / count, rel=1e-5)


def test_a_models_logits_of_as_many_positions_as_classes_are_read_as_they_are():
    torch.manual_seed(0)
    student = MODELS["token"]()
    tokens = torch.randint(WORDS, (2, WORDS))
    out = mdistiller.Distiller(student, None, "none")({"input_ids": tokens}, tokens)
    torch.testing.assert_close(out.loss, student(input_ids=tokens, labels=tokens).loss)


def test_soft_labels_are_refused():
    made = mdistiller.Distiller(llama(), None, "none")
    with pytest.raises(ConfigError, match=r"class ids int64 \[B, T\], .* got torch.float32 \[4, 8, 20\]"):
        made({"input_ids": batch()["input_ids"]}, torch.full((4, 8, WORDS), 1 / WORDS))


def test_a_generating_model_that_transformers_does_not_list_is_refused():
    class OwnForGeneration(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = transformers.ViTConfig

    with pytest.raises(ConfigError, match=r"OwnForGeneration .*logits_of=lambda out: out.logits\[:, :-1\]"):
        mdistiller.Distiller(OwnForGeneration(transformers.ViTConfig()), None, "none")


def test_the_rule_is_that_of_every_listed_class():
    """A class of this list shifts in its loss function; a cross-entropy of its own does not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    checked = []
    for config, kinds in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            source = inspect.getsource(kind.forward)
            if "labels" not in source or kind.__name__ in {c.__name__ for c in checked}:
                continue
            with torch.device("meta"):
                model = kind.__new__(kind)
                nn.Module.__init__(model)
            model.config = config()
            shifts = "loss_function(" in source or "shift_logits" in source
            assert predicts_next(model) == shifts, kind
            checked.append(kind)
    assert len(checked) > 50
