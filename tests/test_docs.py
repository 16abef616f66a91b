"""The pages of docs/: their code and commands run, their numbers and messages are the package's."""

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import mdistiller
from mdistiller.cli.main import COMMANDS, find_command, run
from mdistiller.cli.sweep import SweepCommand, read_space
from mdistiller.integrations.ray import check_space
from mdistiller.methods import get_method, method_config
from mdistiller.recipes.describe import figure_text
from mdistiller.recipes.published import all_runs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(DOCS).as_posix(): path.read_text()
    for path in sorted(DOCS.rglob("*.md"))
    if "generated" not in path.parts
}


def script(name):
    """Imports a script of docs/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(DOCS))  # one imports the other
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


def blocks(language):
    """Returns the pages' code blocks of a language, as (page, text)."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [(page, text) for page, page_text in PAGES.items() for text in pattern.findall(page_text)]


# Code

NOT_RUN = {
    "deploy.md": "reads an export and a run of the page's commands; tests/deploy has both",
    "detection.md": "a full-size detector; tests/tasks/detection trains a small one in this way",
    "finetuning.md": "downloads weights",
    "methods/simkd.md": "reads a run",
    "python.md": "tests/test_api.py runs its blocks one after another",
}
PYTHON = [(page, text) for page, text in blocks("python") if page not in NOT_RUN]


def test_exceptions_have_blocks():
    assert set(NOT_RUN) == {page for page, _ in blocks("python")} - {page for page, _ in PYTHON}


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_of_the_pages(page, text, tmp_path, monkeypatch, registries):
    """Also what a block prints, where its line has the output as a comment."""
    monkeypatch.chdir(tmp_path)
    module = type(sys)(f"page_{len(text)}")  # a class of the block finds its module by name
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(text, module.__dict__)
    shown = re.findall(r"^print\(.*\)  # ([\d.]+)$", text, re.MULTILINE)
    if shown:
        assert printed.getvalue().split() == shown


def test_the_numbers_of_the_picture():
    """By the definition of the divergence, in numpy."""
    teacher, student = np.array([0.80, 0.12, 0.05, 0.02, 0.01]), np.array([0.50, 0.20, 0.10, 0.10, 0.10])

    def kl(p, q):
        return float((p * np.log(p / q)).sum())

    tckd = kl(np.array([0.8, 0.2]), np.array([0.5, 0.5]))
    nckd = kl(teacher[1:] / 0.2, student[1:] / 0.5)
    assert kl(teacher, student) == pytest.approx(tckd + 0.2 * nckd)
    numbers = [f"{value:.3f}" for value in (tckd, nckd, kl(teacher, student), tckd + 8 * nckd)]
    picture = (DOCS / "images/dkd.svg").read_text()
    assert all(number in picture and f"# {number}" in PAGES["how-dkd-works.md"] for number in numbers)
    assert all(f">{value:.2f}<" in picture for value in (*teacher, *(teacher[1:] / 0.2), 0.2))


# Commands

NOT_PARSED = {
    "$": "a loop of a shell",
    "my.yaml": "a file that the reader writes",
    " RUN --": "a run folder, which is not there",
    "train RECIPE": "a recipe of the reader's choice",
    " … ": "a part of a command",
    "[--scale": "the form of a command, with its choices",
    "COMMAND": "any command",
    "reviewkd.…": "a part of a command",
    "METHOD": "a recipe of the reader's choice",
    "PAIR": "a recipe of the reader's choice",
    "show RECIPE": "a recipe of the reader's choice",
    "train RUN": "a run folder, which is not there",
    "my_cosine": "tests/test_examples.py runs the plug-in",
}


def commands():
    """Returns the commands of blocks, each with its page."""
    plain = [*blocks(""), *blocks("bash")]
    plain += [
        (page, "\n".join(re.findall(r"^    (\S.*)$", text, re.MULTILINE))) for page, text in PAGES.items()
    ]
    for page, text in PAGES.items():  # commands within sentences
        sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        plain.append((page, "\n".join(re.findall(r"`(mdistiller \w+ [^`\n|]+)`", sentences))))
    found = []
    for page, text in plain:
        for line in text.replace("\\\n", " ").splitlines():
            line = line.partition("#")[0].strip()
            is_command = re.match(r"(mdistiller|torchrun .* -m mdistiller) \w", line)
            if is_command and not any(part in line for part in NOT_PARSED):
                found.append((page, line.replace("…", "").strip()))
    return list(dict.fromkeys(found))


def test_most_commands_are_checked():
    assert len(commands()) > 25
    everything = "\n".join(PAGES.values())
    assert all(part in everything for part in NOT_PARSED)


@pytest.mark.parametrize(("page", "line"), commands(), ids=[line for _, line in commands()])
def test_commands_of_the_pages(page, line, monkeypatch, capsys, tmp_path):
    """`show` and `list` run; the others are parsed, `train` with the recipe's settings."""
    monkeypatch.chdir(tmp_path)
    command, *args = shlex.split(line[line.index("mdistiller ") :])[1:]
    assert command in COMMANDS
    if {"--help", "--help-all"} & {*args}:
        with pytest.raises(SystemExit):
            run([command, *args])
        return
    if command in ("show", "list"):
        assert run([command, *args]) == 0
        return
    if command in ("train", "config"):
        folder = args[args.index("--teacher") + 1] if "--teacher" in args else "timm/"
        if not folder.startswith("timm/"):
            about = {"name": "resnet8", "classes": ("cat", "dog"), "image_size": 32}
            teacher = mdistiller.create_model("resnet8", 2)
            mdistiller.save_student(teacher, folder, **about, mean=(0.5,) * 3, std=(0.5,) * 3)
        find_command(command).parse(args)
        return
    if command == "sweep":
        given = SweepCommand.parse(args)
        check_space(given.config, read_space(given.space))
        return
    if command != "eval":
        find_command(command).parse(args)
        return
    with pytest.raises(SystemExit):  # flags of eval depend on the run
        run([command, "--help"])
    known = capsys.readouterr().out
    for flag in (word for word in args if word.startswith("--")):
        assert f" {flag} " in known or f"{flag}," in known


# Links, messages, names and tables

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


@pytest.mark.parametrize("page", PAGES)
def test_links_work_in_the_repository(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in LINK.findall(text):
        path = target.partition("#")[0]
        if path and ":" not in path and not path.startswith("generated/"):
            assert (DOCS / page).parent.joinpath(path).exists(), target


def literals():
    """Returns the texts of the source, with … for the values of f-strings."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.add("".join(parts))
    return "\n".join(found)


def test_messages_of_the_faq_are_the_packages():
    section = PAGES["faq.md"].partition("## Error messages")[2]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) > 25
    source = literals()
    assert not [m for m in messages if m not in source]


def test_flags_of_the_migration_page_exist():
    config = mdistiller.get_recipe("cifar100.kd.resnet56_resnet20")
    flags = {"--resume", "--plugin", "--teacher", "--checkpoint", "--method", "--student.pretrained"}

    def add(prefix, values):
        for name, value in values.items():
            flags.add(f"--{prefix}{name}".replace("_", "-"))
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)

    add("", config.model_dump())
    for name in mdistiller.list_methods():
        add("method.", dict.fromkeys(get_method(name).Config.model_fields))
    add("method.", dict.fromkeys(method_config("kd+at").field_infos()))
    rows = re.findall(r"^\|.*\|(.*)\|$", PAGES["migration.md"], re.MULTILINE)
    named = {flag for row in rows for flag in re.findall(r"--[\w.-]+", row) if re.match(r"--\w", flag)}
    assert len(named) > 40
    assert not named - flags


def test_every_published_run_is_on_its_methods_page():
    pages = script("published_page")
    sections = pages.published_sections()
    for data in ("cifar100", "imagenet", "tiny-imagenet", "coco"):
        for found in all_runs(data):
            page = pages.page_of(found.method)
            assert f"methods/{page}.md" in PAGES
            row = f"| {found.pair} | {figure_text(found)} |"
            assert row in sections[page], (page, row)


def test_the_table_of_methods_is_current():
    table = script("choosing_table")
    page = PAGES["choosing.md"]
    inside = page.partition(table.BEGIN)[2].partition(table.END)[0]
    assert inside.strip() == table.table().strip()
    # The figures, read from the page, against the papers' and the log's.
    rows = {row.split("|")[1].strip(): row for row in inside.strip().splitlines()}
    dkd = rows["[`dkd`](methods/dkd.md)"]
    assert "| logits, labels | 2.56 | 0 | 76.32 (best); elsewhere 75.80 to 76.19 |" in dkd
    assert dkd.endswith("| 71.70 (best); elsewhere 72.59 |")
    crd = rows["[`crd`](methods/crd.md)"]
    assert "labels, index" in crd
    assert "65,792 | 75.51 (last)" in crd
    assert "two views" in rows["[`mlkd`](methods/mlkd.md)"]
    own = {n for n in mdistiller.list_methods() if get_method(n).__module__.startswith("mdistiller.")}
    assert own == set(re.findall(r"^\| \[`(\w+)`\]", inside, re.MULTILINE))


def test_every_method_says_when_to_take_it():
    for name in mdistiller.list_methods():
        method = get_method(name)
        if method.__module__.startswith("mdistiller."):
            assert len(method.card.use) > 10
            assert not method.card.use.endswith(".")


# The site's own parts


def test_equations_of_docstrings():
    pages = script("site_pages")
    text = "Computes $a_b$ of it.\n\n    $$x = y +\n    z$$ with w\n\nCosts $5."
    assert [line.rstrip() for line in pages.rst_docstring(text).splitlines() if line.strip()] == [
        "Computes :math:`a_b` of it.",
        "    .. math::",
        "       x = y +",
        "       z",
        "     with w",
        "Costs $5.",
    ]


def test_links_of_the_site():
    pages = script("site_pages")
    text = "[a](../CHANGELOG.md) [b](../results/small) [c](methods/dkd.md#x) "
    text += "![d](images/dkd.svg) [e](decisions)"
    assert pages.site_links(text, "docs", DOCS, None) == (
        "[a](generated/changelog.md) b [c](methods/dkd.md#x) ![d](images/dkd.svg) [e](decisions/README.md)"
    )
    file = "[f](../examples/own_loop.py)"
    assert pages.site_links(file, "docs", DOCS, None) == file
    there = pages.site_links("[b](../../results/small)", "docs/results", DOCS, "https://example.org/r")
    assert there == "[b](https://example.org/r/blob/main/results/small)"
    # A page at the root stands in docs/generated/.
    assert pages.site_links("[a](docs/data.md#b)", "", DOCS, None) == "[a](../data.md#b)"
    assert pages.site_links("```\n[a](../b)\n```\n", "docs", DOCS, None) == "```\n[a](../b)\n```\n"


def test_reference_pages_have_every_public_name_and_command():
    pages = script("site_pages")
    for module in pages.API:
        text = pages.api_page(module)
        for name in importlib.import_module(module).__all__:
            assert re.search(rf"^\.\. auto(class|function):: {name}$", text, re.MULTILINE), name
    text = pages.commands_page()
    for name in COMMANDS:
        assert f"## `mdistiller {name}" in text
    assert "--teacher.checkpoint" in text
    assert "\x1b" not in text
