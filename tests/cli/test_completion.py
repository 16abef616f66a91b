"""`mdistiller --print-completion bash|zsh`, run by the shell itself."""

import subprocess

import pytest

from mdistiller.cli.main import COMMANDS
from mdistiller.recipes import list_recipes


@pytest.fixture(scope="module")
def script(cli):
    done = cli("--print-completion", "bash")
    assert (done.code, done.err) == (0, "")
    return done.out


@pytest.fixture
def complete(script, tmp_path):
    """Returns the completions of the last of some words."""

    def run(*words):
        (tmp_path / "my.yaml").touch()
        given = " ".join(f"'{word}'" for word in words)
        shell = f"{script}\nCOMP_WORDS=({given})\nCOMP_CWORD={len(words) - 1}\n_mdistiller\n"
        shell += 'printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(
            ["bash", "-u", "-c", shell], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert done.stderr == ""
        return done.stdout.split()

    return run


def test_commands(complete):
    assert complete("mdistiller", "") == [*COMMANDS, "--help", "--version"]
    assert complete("mdistiller", "re") == ["report", "reproduce"]


def test_flags(complete):
    assert complete("mdistiller", "train", "x", "--optim.l") == [
        *("--optim.lr", "--optim.lr-warmup", "--optim.lr-warmup-steps", "--optim.layer-decay"),
    ]
    assert "--help-all" in complete("mdistiller", "config", "x", "--help")
    assert complete("mdistiller", "bench", "--warm") == ["--warmup"]
    assert complete("mdistiller", "doctor", "-") == ["--plugin", "--json", "--help"]


def test_values_of_flags(complete):
    found = complete("mdistiller", "train", "x", "--precision", "")
    assert sorted(found) == ["auto", "bfloat16", "float16", "float32"]
    assert complete("mdistiller", "train", "x", "--method.beta", "auto-") == ["auto-sample"]
    assert complete("mdistiller", "export", "x", "--format", "o") == ["onnx"]
    assert complete("mdistiller", "train", "x", "--out", "m") == ["my.yaml"]


def test_recipes(complete):
    for command, word in (("train", "cif"), ("show", "coco.dkd."), ("config", "cifar100.dkd.resnet")):
        expected = [name for name in list_recipes() if name.startswith(word)]
        assert complete("mdistiller", command, word) == expected
    assert complete("mdistiller", "list", "m") == ["methods", "models"]


def test_files(complete):
    assert complete("mdistiller", "train", "my") == ["my.yaml"]
    assert complete("mdistiller", "report", "") == ["my.yaml"]


def test_zsh_and_other_shells(cli, script):
    done = cli("--print-completion", "zsh")
    assert done.out.splitlines()[0] == "autoload -U +X bashcompinit && bashcompinit"
    assert done.out.split("\n", 1)[1] == script
    for argv in (("--print-completion", "fish"), ("--print-completion",)):
        done = cli(*argv)
        assert (done.code, "bash" in done.message) == (2, True)
