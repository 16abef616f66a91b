"""Imports go downwards only, and the public names stay."""

import ast
import inspect
from pathlib import Path

import pytest

import mdistiller
from mdistiller import functional
from mdistiller.methods import get_method, list_methods

SOURCE = Path(mdistiller.__file__).parent

# Of the package's parts, lowest first. A part imports from its own layer or from lower ones.
LAYERS = [
    {"errors", "types"},
    {"models", "data", "taps"},
    {"methods", "functional"},
    {"engine", "detection"},
    {"recipes", "analysis"},
    {"cli"},
]
# The package's own face and the entry point see everything.
ABOVE = {"__init__", "__main__"}


def layer(part):
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mdistiller"):
            names = (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module == "mdistiller"
                else [node.module]
            )
            yield from names
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("mdistiller"))


def part(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if part(path) not in ABOVE]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_downwards(path):
    own = layer(part(path))
    for name in imports(path):
        parts = name.split(".")
        if parts[1] == "__version__":
            continue
        assert layer(parts[1]) <= own, f"{path} imports {name}"


def test_files_are_short_enough_to_read():
    assert not [str(p) for p in SOURCE.rglob("*.py") if len(p.read_text().splitlines()) > 450]


SIGNATURES = {
    "at_loss": "(student_features, teacher_features, *, p=2)",
    "kdsvd_loss": "(student_features, teacher_features, *, k=1)",
    "nst_loss": "(student_features, teacher_features)",
    "sp_loss": "(student_feature, teacher_feature)",
    "itrd_correlation_loss": "(student_embedding, teacher_embedding, *, alpha=1.01)",
    "itrd_mutual_information_loss": "(student_embedding, teacher_embedding)",
    "semckd_loss": "(distances, attention)",
    "simkd_loss": "(student_feature, teacher_feature)",
    "srrl_loss": "(student_embedding, teacher_embedding, classifier_weight, *, feature_weight=1.0, "
    "regression_weight=1.0)",
    "crd_loss": "(positive, negatives, *, num_data)",
    "pkt_loss": "(student_embedding, teacher_embedding)",
    "rkd_loss": "(student_embedding, teacher_embedding, *, distance_weight=25.0, angle_weight=50.0)",
    "vid_loss": "(predicted_mean, predicted_variance, teacher_feature)",
    "kd_loss": "(student_logits, teacher_logits, *, temperature=4.0)",
    "dkd_loss": "(student_logits, teacher_logits, target, *, alpha=1.0, beta=8.0, temperature=4.0)",
    "tckd_loss": "(student_logits, teacher_logits, target, *, temperature=4.0)",
    "nckd_loss": "(student_logits, teacher_logits, target, *, temperature=4.0)",
    "dist_loss": "(student_logits, teacher_logits, *, beta=2.0, gamma=2.0, temperature=4.0)",
    "gdkd_loss": "(student_logits, teacher_logits, *, w0=1.0, w1=1.0, w2=8.0, k=5, temperature=4.0)",
    "nkd_loss": "(student_logits, teacher_logits, target, *, gamma=3.5, temperature=3.0)",
    "normkd_loss": "(student_logits, teacher_logits, *, temperature=2.0)",
    "rld_loss": "(student_logits, teacher_logits, target, *, alpha=1.0, beta=8.0, temperature=4.0, "
    "confidence_temperature=4.0)",
    "ttm_loss": "(student_logits, teacher_logits, *, gamma=0.1)",
    "wttm_loss": "(student_logits, teacher_logits, *, gamma=0.2)",
    "mlkd_loss": "(student_logits, teacher_logits, *, temperatures=(2.0, 3.0, 4.0, 5.0, 6.0))",
    "crld_loss": "(student_logits, teacher_logits, *, within_weight=2.0, cross_weight=0.5, temperature=4.0, "
    "weak_threshold=0.9, strong_threshold=0.2)",
    "catkd_loss": "(student_cams, teacher_cams, *, resolution=2, normalize=True)",
    "ofa_loss": "(student_logits, teacher_logits, target, *, gamma=1.0, temperature=1.0)",
    "ofd_loss": "(student_feature, teacher_feature, margin)",
    "ofd_margin": "(batch_norm)",
    "hcl_loss": "(student_features, teacher_features)",
}


def bare(function):
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_loss_signatures_stay(name):
    assert bare(getattr(functional, name)) == SIGNATURES[name]
    assert name in functional.__all__


def test_public_names_stay():
    assert set(mdistiller.__all__) >= {
        "Distiller",
        "Method",
        "MethodConfig",
        "create_model",
        "register_method",
        "tap",
    }
    assert all(hasattr(mdistiller, name) for name in mdistiller.__all__)
    assert mdistiller.__all__ == sorted(mdistiller.__all__)
    assert functional.__all__ == sorted(functional.__all__)
    assert bare(mdistiller.tap) == "(model, names)"
    assert list(inspect.signature(mdistiller.Distiller).parameters)[:3] == ["student", "teacher", "method"]
    assert list(inspect.signature(mdistiller.create_model).parameters)[:2] == ["name", "num_classes"]


BUILT_IN = [n for n in list_methods() if get_method(n).__module__.startswith("mdistiller.")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_says_what_it_is_and_documents_its_fields(name):
    method = get_method(name)
    assert method.__doc__
    assert method.paper
    card = Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md"
    assert card.is_file()
    for field in method.Config.model_fields:
        assert f"`{field}`" in card.read_text(), f"{card} does not explain {field}"
