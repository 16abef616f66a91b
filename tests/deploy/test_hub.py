"""Students on the Hugging Face Hub, against a local server that speaks its protocol."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mdistiller
from mdistiller.deploy.hub import local_path
from mdistiller.errors import ConfigError
from mdistiller.models import create_model
from mdistiller.models.weights import read_metadata

pytest.importorskip("huggingface_hub")

DATA = {"kind": "digits", "train_limit": 60, "test_limit": 30}
SMALL = {"epochs": 1, "batch_size": 30, "device": "cpu", "layout": "contiguous"}

USER = r"""
import contextlib, json, os, sys
import mdistiller
from mdistiller.cli.main import run as command

folder, first = sys.argv[1:]
connections, found = [], {"texts": {}}
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        connections.append(args[1][:2])
sys.addaudithook(watch)

def load(source):
    return mdistiller.load_student(source)

def text(source):
    try:
        found["texts"][source] = str(load(source)) and "loaded"
    except mdistiller.errors.MDistillerError as error:
        found["texts"][source] = f"{type(error).__name__}: {error}"

own, student = load(folder + "/resnet8"), load(f"hf://me/student@{first}")
found["same"] = all(a.equal(b) for a, b in zip(own.state_dict().values(), student.state_dict().values()))
found["newest"] = sum(p.numel() for p in load("hf://me/student").parameters())
text("hf://me/secret")
os.environ["HF_TOKEN"] = "hf_test"
found["secret"] = sum(p.numel() for p in load("hf://me/secret").parameters())
for source in ("nothing", "student@nowhere", "foreign", "empty", "student/deeper"):
    text("hf://me/" + source)
for source in ("pickle", "student"):
    text("hf://evil/" + source)

words = ["--data.kind", "digits", "--data.train-limit", "60", "--data.test-limit", "30", "--device", "cpu"]
words += ["--epochs", "1", "--batch-size", "30", "--layout", "contiguous"]
codes = found["codes"] = {}
address, image = f"hf://me/student@{first}", folder + "/image.png"
with contextlib.redirect_stdout(sys.stderr):
    run = ["train", "digits.kd.resnet8", *words]
    codes["teacher"] = command([*run, "--teacher", address, "--out", folder + "/a"])
    codes["student"] = command([*run, "--teacher=" + address, "--student.checkpoint=" + address, "--dry-run"])
    codes["predict"] = command(["predict", address, image])
    codes["form"] = command(["predict", "hf://me", image])
    before = len(connections)
    codes["repeat"] = command(["train", folder + "/a", "--out", folder + "/c"])
    found["connections of a repeated run"] = len(connections) - before
data = {"kind": "digits", "train_limit": 60, "test_limit": 30}
small = {"epochs": 1, "batch_size": 30, "device": "cpu", "layout": "contiguous", "out": folder + "/d"}
found["teacher"] = str(mdistiller.distill("resnet8", address, data, "kd", **small).config.teacher.checkpoint)
run = mdistiller.Run(folder + "/a")
found["pushed"] = run.push_to_hub("me/new", license="mit", private=True, device="cpu")
ours, theirs = load(folder + "/a").state_dict(), load("hf://me/new").state_dict()
found["pushed is loaded"] = all(a.equal(b) for a, b in zip(ours.values(), theirs.values(), strict=True))
found["again"] = mdistiller.Run(folder + "/resnet14").push_to_hub("me/new", evaluate=False)
for repo in ("others/student", "me/student"):
    try:
        run.push_to_hub(repo, private=True, evaluate=False)
    except mdistiller.errors.CheckpointError as error:
        found["texts"][repo] = str(error)
found["connections"] = sorted(set(connections))
print(json.dumps(found))
"""


class Hub:
    """Repositories, each a list of commits: mappings from a file's path to its content."""

    def __init__(self):
        self.repos, self.private, self.requests, self.large = {}, set(), [], {}

    def names(self, repo):
        return [hashlib.sha1(f"{repo}{i}".encode()).hexdigest() for i in range(len(self.repos[repo]))]

    def find(self, repo, revision):
        """Returns a commit's name and files; None if there is no such revision."""
        names = self.names(repo)
        name = names[-1] if revision == "main" else revision
        return (name, self.repos[repo][names.index(name)]) if name in names else None


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, content=b"", status=200, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, code, status=404):
            self.reply({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

        def do_GET(self):
            hub.requests.append(f"{self.command} {self.path}")
            parts = self.path.strip("/").split("/")
            asked_info = parts[:2] == ["api", "models"]
            repo = "/".join(parts[2:4] if asked_info else parts[:2])
            signed_in = self.headers.get("Authorization") == "Bearer hf_test"
            if repo not in hub.repos or (repo in hub.private and not signed_in):
                return self.missing("RepoNotFound", 404 if signed_in else 401)
            if asked_info:
                about = {"id": repo, "sha": hub.names(repo)[-1], "siblings": []}
                return self.reply(about | {"private": repo in hub.private})
            found = hub.find(repo, parts[3])
            if found is None:
                return self.missing("RevisionNotFound")
            if "/".join(parts[4:]) not in found[1]:
                return self.missing("EntryNotFound")
            content = found[1]["/".join(parts[4:])]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.reply(content, ETag=etag, X_Repo_Commit=found[0], X_Linked_Size=str(len(content)))

        def body(self):
            return self.rfile.read(int(self.headers["Content-Length"]))

        def do_PUT(self):
            content = self.body()
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self.reply()

        def do_POST(self):
            here, body = f"http://{self.headers['Host']}", self.body()
            parts = self.path.strip("/").split("/")
            if self.path == "/api/validate-yaml":
                return self.reply({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != "Bearer hf_test":
                return self.missing("RepoNotFound", 401)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                if not repo.startswith("me/"):
                    return self.reply({"error": f"You have no right to create {repo}"}, 403)
                asked_private = asked.get("private") or asked.get("visibility") == "private"
                if asked_private and repo not in hub.repos:
                    hub.private.add(repo)
                status = 409 if repo in hub.repos else 200
                hub.repos.setdefault(repo, [{}])
                return self.reply({"url": f"{here}/{repo}", "name": repo}, status)
            if parts[-2].startswith("preupload"):
                large = {
                    file["path"]: file["path"].endswith(".safetensors") for file in json.loads(body)["files"]
                }
                modes = [
                    {"path": path, "uploadMode": "lfs" if large[path] else "regular", "shouldIgnore": False}
                    for path in large
                ]
                return self.reply({"files": modes})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{here}/large/{each['oid']}", "header": {}}}}
                    for each in json.loads(body)["objects"]
                ]
                return self.reply({"transfer": "basic", "objects": objects})
            assert parts[-2] == "commit"
            repo = "/".join(parts[2:4])
            files = dict(hub.repos[repo][-1])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            hub.repos[repo].append(files)
            oid = hub.names(repo)[-1]
            return self.reply({"success": True, "commitOid": oid, "commitUrl": f"{here}/{repo}/commit/{oid}"})

        def do_HEAD(self):
            self.do_GET()

    return Handler


class Evil:
    """An object whose pickle leaves a folder behind."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


def poisoned_files(folder, metadata):
    """A stranger's repository: options that load a pickle and fetch an address, and a plug-in."""
    torch.save(Evil(folder / "was_run"), folder / "evil.pth")
    options = {"checkpoint_path": str(folder / "evil.pth"), "pretrained": True}
    options["pretrained_cfg_overlay"] = {"url": "http://127.0.0.1:9/evil.pth", "hf_hub_id": ""}
    about = json.dumps(metadata | {"model": "timm/test_resnet", "options": options})
    weights = create_model("timm/test_resnet", len(metadata["classes"])).state_dict()
    save_file(weights, folder / "evil.safetensors", {"mdistiller": about})
    plugin = f"open({str(folder / 'was_run')!r}, 'w').close()"
    config = json.dumps({"plugins": ["evil.py"], "student": {"name": "timm/test_resnet", "options": options}})
    return {
        "model.safetensors": (folder / "evil.safetensors").read_bytes(),
        "config.json": config.encode(),
        "evil.py": plugin.encode(),
    }


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """The server after a user's session with it, the findings of the session, its stderr, and its folder."""
    folder, hub = tmp_path_factory.mktemp("hub"), Hub()
    for name in ("resnet8", "resnet14"):
        mdistiller.distill(name, None, DATA, "none", out=folder / name, **SMALL)
    small, large = ((folder / name / "student.safetensors").read_bytes() for name in ("resnet8", "resnet14"))
    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors")
    hub.repos = {
        "me/student": [{"model.safetensors": small}, {"model.safetensors": large}],
        "me/secret": [{"model.safetensors": small}],
        "me/foreign": [{"model.safetensors": (folder / "foreign.safetensors").read_bytes()}],
        "me/empty": [{"README.md": b"# A repository without weights"}],
        "evil/pickle": [{"model.safetensors": pickle.dumps(Evil(folder / "was_run"))}],
        "evil/student": [poisoned_files(folder, read_metadata(folder / "resnet8" / "student.safetensors"))],
    }
    hub.private.add("me/secret")
    Image.new("RGB", (20, 20)).save(folder / "image.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = server.server_address
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "home")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    words = [sys.executable, "-c", USER, str(folder), hub.names("me/student")[0]]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    return hub, json.loads(done.stdout), done.stderr, folder


def test_a_revision_pins_the_file(used):
    _, found, _, _ = used
    assert found["same"]
    assert found["newest"] == sum(p.numel() for p in create_model("resnet14", 10).parameters())


def test_only_the_weights_are_downloaded_and_only_from_the_hub(used):
    hub, found, _, _ = used
    files = {line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line}
    assert files == {"model.safetensors"}
    assert found["connections"] == [list(hub.address)]


def test_commands_accept_addresses(used):
    _, found, err, folder = used
    assert found["codes"] == {"teacher": 0, "student": 0, "predict": 0, "form": 2, "repeat": 0}
    assert "got 'hf://me'; allowed: hf://USER/REPO, hf://USER/REPO@REVISION" in err
    assert Path(found["teacher"]).name == "model.safetensors"
    assert Path(found["teacher"]).read_bytes() == (folder / "resnet8" / "student.safetensors").read_bytes()


def test_a_run_with_a_downloaded_teacher_is_repeated_without_a_connection(used):
    assert used[1]["connections of a repeated run"] == 0


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("hf://me/nothing", "CheckpointError: hf://me/nothing cannot be read: RepositoryNotFoundError"),
        (
            "hf://me/student@nowhere",
            "CheckpointError: hf://me/student@nowhere cannot be read: RevisionNotFound",
        ),
        (
            "hf://me/secret",
            "If you are trying to access a private or gated repo, make sure you are authenticated",
        ),
        ("hf://me/empty", "CheckpointError: hf://me/empty cannot be read"),
        ("hf://me/foreign", "is no student of a run"),
        ("hf://me/student/deeper", "ConfigError: got 'hf://me/student/deeper'; allowed: hf://USER/REPO"),
    ],
)
def test_an_absent_student_is_one_error(used, source, text):
    assert text in used[1]["texts"][source]


def test_a_private_repository_opens_with_a_token(used):
    assert used[1]["secret"] == sum(p.numel() for p in create_model("resnet8", 10).parameters())


def test_a_repository_of_a_stranger_runs_nothing(used):
    _, found, _, folder = used
    assert found["texts"]["hf://evil/pickle"].startswith("CheckpointError")
    assert found["texts"]["hf://evil/student"] == "loaded"
    assert not (folder / "was_run").exists()
    torch.load(folder / "evil.pth", weights_only=False)
    assert (folder / "was_run").exists()


def test_a_pushed_student_is_loaded_with_the_same_weights(used):
    hub, found, _, folder = used
    _, first, second = hub.repos["me/new"]
    names = hub.names("me/new")
    assert (found["pushed"], found["again"]) == tuple(f"hf://me/new@{name}" for name in names[1:])
    assert found["pushed is loaded"]
    assert first.keys() == second.keys() == {"README.md", "card.json", "model.safetensors"}
    assert second["model.safetensors"] == (folder / "resnet14" / "student.safetensors").read_bytes()
    assert "me/new" in hub.private


def test_the_model_card_has_the_hubs_metadata(used):
    from huggingface_hub import ModelCard

    hub, _, _, folder = used
    run = mdistiller.Run(folder / "a")
    card, other = (ModelCard(files["README.md"].decode()) for files in hub.repos["me/new"][1:])
    found = card.data.to_dict()
    (result,) = found.pop("model-index")[0]["results"]
    assert found == {
        "license": "mit",
        "library_name": "mdistiller",
        "tags": ["knowledge-distillation", "kd"],
        "pipeline_tag": "image-classification",
    }
    assert result["dataset"] == {"type": "digits", "name": "digits"}
    metric = {"type": "top1", "name": run.config.main_metric().title, "value": run.summary["last"]["top1"]}
    assert result["metrics"] == [metric]
    assert 'mdistiller.load_student("hf://me/new")' in card.text
    assert (other.data.license, other.data.tags) == (None, None)


def test_a_refused_upload_is_one_error(used):
    hub, found, _, _ = used
    refused = found["texts"]["others/student"]
    assert refused.startswith("others/student cannot be written: HfHubHTTPError: 403")
    assert "You have no right to create others/student" in refused
    public = "me/student cannot be written: PermissionError: the repository is public"
    assert found["texts"]["me/student"] == public
    assert len(hub.repos["me/student"]) == 2


@pytest.mark.parametrize("repo", ["student", "me/student@main", "hf://me/student"])
def test_a_wrong_name_is_refused_before_the_export(used, repo):
    with pytest.raises(ConfigError, match="allowed: USER/REPO"):
        mdistiller.Run(used[3] / "a").push_to_hub(repo)


def test_a_module_is_refused_because_nobody_else_can_build_it(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10))
    run = mdistiller.distill(model, None, DATA, "none", out=tmp_path / "run", **SMALL)
    with pytest.raises(ConfigError, match="nobody else can build 'given/Sequential'"):
        run.push_to_hub("me/module")


def test_other_words_are_left_as_they_are():
    assert local_path("runs/one") == "runs/one"
