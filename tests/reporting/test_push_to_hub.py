"""Pushes over HTTP to a small local Hub, and loads from it where this project is not installed."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import RepoCard, constants
from huggingface_hub.utils import httpx
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from clipcacg.configuration_clipcacg import AUTO_MAP, ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor, label_scores
from clipcacg.scripts import push_to_hub, train
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.reporting import hub as hub_library
from clipcacg.scripts.reporting import model_card
from clipcacg.scripts.reporting.hub import check_secrets, push_checkpoint, upload

ROOT = Path(__file__).parents[2]
TOKEN, STRANGER = "hf_" + "owner" * 7, "hf_" + "other" * 7
MACHINE_USER = "machine-user"
CODE = {path.name for path in ROOT.glob("*_clipcacg.py")}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
PUSHED = {
    "README.md", "config.json", "model.safetensors", "processor_config.json", *CODE, *TOKENIZER,
    *(f"clip_tokenizer/{name}" for name in TOKENIZER), "confusion_matrix.png", "training_curves.png",
    "reliability.png", "coverage.png",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content")  # huggingface_hub's own
RUN = """
import json, sys
from clipcacg.scripts import train
for arguments in json.loads(sys.argv[1]):
    try:
        train.main(arguments)
        print("ended with: 0")
    except SystemExit as error:
        print("ended with:", error.code)
"""
# Every load runs in its own process, forked from one that has imported the libraries and no code of ours.
LOAD = """
import json, os, sys
sys.modules["clipcacg"] = None
import torch
import transformers as hf
hf.AutoProcessor, hf.AutoModel, hf.RobertaModel, hf.RobertaTokenizer, hf.ResNetModel, hf.CLIPModel, hf.CLIPTokenizer

def load(kind, name, revision):
    where = {"revision": revision, "trust_remote_code": True}
    if kind == "pipeline":
        pipeline = hf.pipeline("image-text-sentiment", model=name, **where)
        return pipeline([{"image": image, "text": text} for image, text in zip(posts["images"], posts["text"])])
    model = getattr(hf, kind).from_pretrained(name, **where)
    processor = hf.AutoProcessor.from_pretrained(name, **where)
    with torch.no_grad():
        outputs = model(**processor(**posts, return_tensors="pt"))
    return outputs["fused_embeds" if kind == "AutoModel" else "logits"].tolist()

posts, loads = json.loads(sys.argv[1])
for number, arguments in enumerate(loads):
    if os.fork() == 0:
        with open(f"../{number}.json", "w") as file:
            json.dump(load(*arguments), file)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{arguments} failed")
"""


# The package is installed here, but not in a Space.
SPACE = """
from importlib import metadata
installed = metadata.version

def version(name):
    if name == "clipcacg":
        raise metadata.PackageNotFoundError(name)
    return installed(name)

metadata.version = version
import clipcacg
assert clipcacg.__version__ == "unknown" and not any("site-packages" in path for path in clipcacg.__path__)
import app
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The server, which this process uses with the owner's token."""
    folder = tmp_path_factory.mktemp("hub") / "files"
    with HubServer(folder, {TOKEN: "user", STRANGER: "stranger"}) as hub, hub.used_here() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub


def environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """Environment variables of a process with an empty cache and, unless `more` has one, without a token."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return env | settings | more


def flags(posts: Path, output: Path, *more: str) -> list[str]:
    """Flags of a run of two steps with checkpoints."""
    return [
        str(ROOT / "scripts/configs/sample.yaml"), "--data_dir", str(posts), "--output_dir", str(output),
        "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no",
        "--logging_steps", "1", "--load_best_model_at_end", "False", "--disable_tqdm", "True", "--push_to_hub", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(
    hub: HubServer, posts_folder: Path, backbones: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Three runs in one process: one pushes, one starts from the pushed model, one has an invalid token."""
    home = tmp_path_factory.mktemp("home") / MACHINE_USER
    new = [f"--{part}_model={backbones / part}" for part in ("text", "vision", "clip")] + ["--hidden_size", "32"]
    arguments = [
        flags(posts_folder, home / "first", *new, "--hub_model_id", "user/first"),
        flags(posts_folder, home / "second", "--model_name_or_path=user/first", "--hub_model_id", "user/second"),
        flags(posts_folder, home / "third", *new, "--hub_model_id", "user/third", "--hub_token", "hf_bad"),
    ]
    command = [sys.executable, "-c", RUN, json.dumps(arguments)]
    env = environment(hub, home / "hf", HF_TOKEN=TOKEN, LOGNAME=MACHINE_USER)
    process = subprocess.run(command, env=env, cwd=home.parent, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    ends = re.findall("^ended with: (.*)$", process.stdout, re.MULTILINE)
    return {"folder": home, "ends": ends, "output": process.stdout + process.stderr}


@pytest.fixture(scope="module")
def revisions(hub: HubServer, runs: dict[str, Any]) -> dict[str, str]:
    """Revisions of the first run's model: as pushed, with other weights, and in shards on a branch."""
    first = runs["folder"] / "first"
    found = {"first": hub.repos["models", "user/first"].branches["main"]}
    other = shutil.copytree(first, runs["folder"] / "other")
    change_weights(other)
    found["other"] = push_checkpoint(other, "user/first")
    sharded = shutil.copytree(first, runs["folder"] / "sharded")
    model = ClipCaCgForSequenceClassification.from_pretrained(first)
    model.save_pretrained(sharded, max_shard_size="1MB")
    (sharded / "model.safetensors").unlink()
    found["sharded"] = push_checkpoint(sharded, "user/first", revision="shards")
    return found


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += torch.tensor([1.0, 2.0, 3.0])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def logits(folder: Path, posts: dict[str, list[str]]) -> torch.Tensor:
    """Logits of a folder's model with the installed code."""
    model = ClipCaCgForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**ClipCaCgProcessor.from_pretrained(folder)(**posts, return_tensors="pt")).logits


def test_a_push_holds_the_documented_files_and_no_others(hub: HubServer, runs: dict, revisions: dict) -> None:
    for name, revision in (("user/first", revisions["first"]), ("user/second", "main")):
        assert hub.files(name, revision=revision).keys() - {".gitattributes"} == PUSHED
        folder = runs["folder"] / name.split("/")[1]
        assert (folder / "predictions.jsonl").exists() and list(folder.glob("checkpoint-*/optimizer.pt"))
    for name in PUSHED - CODE:
        assert name.removeprefix("clip_tokenizer/") in push_to_hub.__doc__
    shards = hub.files("user/first", revision="shards").keys() - PUSHED - {".gitattributes"}
    assert shards == {"model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))}
    assert "model.safetensors" not in hub.files("user/first", revision="shards")  # it would be read first


def test_no_file_contains_a_path_of_this_machine_or_a_token(
    hub: HubServer, runs: dict, revisions: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    told = [MACHINE_USER, TOKEN, str(tmp_path_factory.getbasetemp()), str(ROOT), str(Path.home()) + os.sep, sys.prefix]
    contents = [content for file in hub.folder.iterdir() if (content := file.read_bytes())]
    assert len(contents) > len(PUSHED)
    for content in contents:
        assert not any(word.encode() in content for word in told)
        assert b"\0" in content or not re.search(rb"""["'` (]/(home|root|tmp|usr|var|mnt|opt|Users)/""", content)
    assert TOKEN not in runs["output"] and "hf_bad" not in runs["output"]


def test_code_and_config_name_no_repository(hub: HubServer, runs: dict) -> None:
    """A model trained from a pushed one is as complete, and does not depend on it."""
    files = hub.files("user/second")
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert all(files[name] == (ROOT / name).read_bytes() for name in CODE)
    assert not any(b"user/first" in content for name, content in files.items() if name != "README.md")
    assert b"base_model:\n- user/first" in files["README.md"]


def test_the_card_names_the_model_on_the_hub_and_an_edited_card_stays(
    hub: HubServer, runs: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(runs["folder"] / "first", tmp_path / "renamed")
    push_checkpoint(folder, "user/fifth")
    pushed = hub.files("user/fifth")["README.md"].decode()
    assert pushed.count('name = "user/fifth"') == 2 and "\n# fifth\n" in pushed and "user/first" not in pushed
    (folder / "README.md").write_text(pushed.replace("# fifth", "# Moods of 2014"))
    caplog.set_level("INFO", logger="clipcacg")
    push_checkpoint(folder, "user/sixth")
    assert hub.files("user/sixth")["README.md"] == (folder / "README.md").read_bytes()
    assert "Moods of 2014" in (folder / "README.md").read_text() and "is pushed as it is" in caplog.text
    (folder / "run_facts.json").write_text("{")
    with pytest.raises(InputError, match="^Delete .*run_facts.json to push README.md as it is"):
        push_checkpoint(folder, "user/sixth")


@pytest.mark.slow
def test_all_revisions_load_where_this_project_is_not_installed(
    hub: HubServer, runs: dict, revisions: dict, posts_folder: Path, tmp_path: Path
) -> None:
    posts = {"images": [str(posts_folder / f"data/{i}.jpg") for i in (1, 2)], "text": ["a lovely day", "how very sad"]}
    first, other, second = (logits(runs["folder"] / name, posts) for name in ("first", "other", "second"))
    classifier = "AutoModelForSequenceClassification"
    expected = {
        (classifier, "user/first", "main"): other,
        (classifier, "user/first", revisions["first"]): first,
        (classifier, "user/first", "shards"): first,
        (classifier, "user/second", "main"): second,
    }
    loads = [*expected, ("AutoModel", "user/second", "main"), ("pipeline", "user/first", revisions["first"])]
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-I", "-c", LOAD, json.dumps([posts, loads])]
    env = environment(hub, tmp_path / "hf")
    process = subprocess.run(command, env=env, cwd=tmp_path / "empty", capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    assert not any((tmp_path / "empty").iterdir())
    *found, fused, labelled = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(len(loads)))
    for got, wanted in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-6, rtol=0)
    assert not torch.allclose(first, other) and not torch.allclose(first, second)
    assert torch.tensor(fused).shape[0] == 2
    labels = ("negative", "neutral", "positive")
    scores = [{row["label"]: row["score"] for row in post} for post in labelled]
    scores = torch.tensor([[post[label] for label in labels] for post in scores])
    expected_scores = label_scores(first, ClipCaCgConfig.from_pretrained(runs["folder"] / "first"))
    torch.testing.assert_close(scores, expected_scores, atol=1e-6, rtol=0)


def test_an_interrupted_push_leaves_the_earlier_revision(
    hub: HubServer, runs: dict, revisions: dict, tmp_path: Path
) -> None:
    before = hub.files("user/first")
    folder = shutil.copytree(runs["folder"] / "other", tmp_path / "changed")
    change_weights(folder)
    hub.break_commit = True
    with pytest.raises(InputError, match="^The push to user/first failed: Server disconnected"):
        push_checkpoint(folder, "user/first")
    assert not hub.break_commit and hub.repos["models", "user/first"].branches["main"] == revisions["other"]
    assert hub.files("user/first") == before
    hub.requests.clear()
    push_checkpoint(folder, "user/fourth")
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_pushing_the_same_again_makes_no_new_revision(hub: HubServer, runs: dict, revisions: dict) -> None:
    assert push_checkpoint(runs["folder"] / "other", "user/first") == revisions["other"]


def test_a_run_with_an_invalid_token_ends_with_a_sentence_and_a_checkpoint(runs: dict, hub: HubServer) -> None:
    assert runs["ends"][:2] == ["0", "0"]
    reason = "the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN."
    assert runs["ends"][2] == f"-c: The push to user/third failed: {reason}"
    names = {str(path.relative_to(runs["folder"] / "third")) for path in (runs["folder"] / "third").rglob("*")}
    assert PUSHED <= names and ("models", "user/third") not in hub.repos
    assert "Traceback" not in runs["output"]


def test_a_run_without_a_name_ends_before_it_starts(tmp_path: Path) -> None:
    for name in ([], ["--hub_model_id", "nameless"], ["--hub_model_id", "a/b/c"]):
        with pytest.raises(SystemExit, match="To push, give --hub_model_id as USER/NAME"):
            train.main(flags(tmp_path, tmp_path / "out", *name))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_both_scripts_launched_for_real(hub: HubServer, posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    new = [f"--{part}_model={backbones / part}" for part in ("text", "vision", "clip")]
    arguments = flags(posts_folder, tmp_path / "out", *new, "--hub_model_id", "user/launched", "--hub_revision", "try")
    env = environment(hub, tmp_path / "hf", HF_TOKEN=TOKEN)
    subprocess.run([sys.executable, str(ROOT / "scripts/train.py"), *arguments], env=env, cwd=tmp_path, check=True)
    assert PUSHED <= hub.files("user/launched", revision="try").keys()
    assert hub.files("user/launched").keys() == {".gitattributes"}
    command = [sys.executable, str(ROOT / "scripts/push_to_hub.py"), "out", "user/launched"]
    done = subprocess.run([*command, "--private"], env=env, cwd=tmp_path, capture_output=True, text=True)
    sentence = "push_to_hub.py: user/launched is public, so nothing is pushed: make it private first.\n"
    assert done.returncode == 1 and done.stderr.endswith(sentence)
    subprocess.run(command, env=env, cwd=tmp_path, check=True)
    assert hub.files("user/launched") == hub.files("user/launched", revision="try")


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_what_the_hub_refuses_is_one_sentence(
    hub: HubServer, runs: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = str(runs["folder"] / "first")

    def message(repo_id: str, token: str = TOKEN) -> str:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(SystemExit) as error:
            push_to_hub.main([folder, repo_id])
        assert "\n" not in error.value.code and token[-5:] not in error.value.code
        return error.value.code.partition(": ")[2]

    assert message("user/new", "hf_bad").startswith("The push to user/new failed: the Hub does not accept the token;")
    assert message("user/first", STRANGER).startswith("The push to user/first failed: the token does not allow it;")
    assert message("nobody/new").startswith("The push to nobody/new failed: the token does not allow it;")
    assert message("us er/new").startswith("To push, give the name on the Hub as USER/NAME")
    with pytest.raises(InputError, match="failed: the token has characters that no token has[.]$"):
        push_checkpoint(folder, "user/new", token="hf_\nbad")
    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    assert message("user/new") == "The push to user/new failed: [Errno 111] Connection refused."
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in message("user/new")
    assert ("models", "user/new") not in hub.repos and TOKEN not in "".join(capsys.readouterr())


def test_an_error_of_the_program_keeps_its_traceback(
    hub: HubServer, runs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="repo type") as error:
        upload(tmp_path, "user/new", "modle", private=False, token=TOKEN)
    assert not isinstance(error.value, InputError)
    folder = shutil.copytree(runs["folder"] / "first", tmp_path / "first")
    (tmp_path / "template.md").write_text("{{ 1 + title }}")
    monkeypatch.setattr(model_card, "TEMPLATE", tmp_path / "template.md")
    with pytest.raises(TypeError, match="unsupported operand"):
        push_checkpoint(folder, "user/new")


def test_without_a_login_the_message_says_how_to_log_in(
    hub: HubServer, runs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_library, "get_token", lambda: None)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="you are not logged in; log in with `hf auth login`"):
        push_checkpoint(runs["folder"] / "first", "user/new")


def test_private_means_private(hub: HubServer, runs: dict) -> None:
    folder = str(runs["folder"] / "first")
    push_to_hub.main([folder, "user/secret", "--private"])
    assert hub.repos["models", "user/secret"].private and not hub.repos["models", "user/first"].private
    page = f"{hub.url}/api/models/user/secret"
    assert [httpx.get(page, headers=h).status_code for h in ({}, {"Authorization": f"Bearer {TOKEN}"})] == [404, 200]
    with pytest.raises(InputError, match="user/first is public, so nothing is pushed"):
        push_checkpoint(folder, "user/first", private=True)


@pytest.fixture(scope="module")
def space(hub: HubServer, runs: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a Space, downloaded from the Hub."""
    push_to_hub.main([str(runs["folder"] / "first"), "user/shown", "--space"])
    folder = tmp_path_factory.mktemp("space")
    for name, content in hub.files("user/shown", kind="spaces").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_space_is_complete(space: Path) -> None:
    assert {path.name for path in space.iterdir()} == {
        ".gitattributes", "README.md", "app.py", "clipcacg", "requirements.txt"
    }  # fmt: skip
    card = RepoCard.load(space / "README.md", repo_type="space").data.to_dict()
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["user/shown"])
    needed = {line.name: line for line in map(Requirement, (space / "requirements.txt").read_text().splitlines())}
    assert {"torch", "transformers", "captum", "gradio"} <= needed.keys() and "pytest" not in needed
    assert card["sdk_version"] in needed["gradio"].specifier
    copied = {path.relative_to(space / "clipcacg") for path in (space / "clipcacg").rglob("*.py")}
    assert copied == {path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")]}
    with pytest.raises(SystemExit, match="leave out --revision"):
        push_to_hub.main([str(space), "user/shown", "--space", "--revision", "x"])


@pytest.mark.slow
def test_a_space_shows_the_model_from_the_hub(hub: HubServer, space: Path, tmp_path: Path) -> None:
    port = closed_port().rpartition(":")[2]
    env = environment(hub, tmp_path / "hf", GRADIO_SERVER_PORT=port, PYTHONDONTWRITEBYTECODE="1")
    process = subprocess.Popen([sys.executable, "-c", SPACE], env=env, cwd=space, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(120):
            time.sleep(0.5)
            assert process.poll() is None, process.stderr.read()[-5000:]
            with contextlib.suppress(httpx.TransportError):
                assert "Sentiment of a post" in httpx.get(f"http://127.0.0.1:{port}").text
                break
        else:
            pytest.fail("no page after a minute")
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.parametrize(
    ("file", "text"), [("README.md", f"with {TOKEN}"), ("processor_config.json", '"hf_' + "x" * 34)]
)
def test_a_file_with_a_token_is_refused(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=f"^{file} contains an access token") as error:
        check_secrets(tmp_path, [file], TOKEN)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    "missing", ["README.md", "model.safetensors", "modeling_clipcacg.py", "processor_config.json"]
)
def test_an_incomplete_checkpoint_is_refused(hub: HubServer, runs: dict, tmp_path: Path, missing: str) -> None:
    folder = shutil.copytree(runs["folder"] / "first", tmp_path / "part")
    (folder / missing).unlink()
    hub.requests.clear()
    with pytest.raises(InputError, match="is incomplete: there is no |is not a checkpoint of a model"):
        push_checkpoint(folder, "user/part")
    assert not hub.requests


def test_the_server_answers_ranges(hub: HubServer, runs: dict) -> None:
    url = f"{hub.url}/user/first/resolve/main/model.safetensors"
    head, part = httpx.head(url), httpx.get(url, headers={"Range": "bytes=8-15"})
    content = hub.files("user/first")["model.safetensors"]
    assert part.status_code == 206 and part.content == content[8:16]
    assert head.headers["X-Linked-Size"] == str(len(content)) and len(head.headers["ETag"].strip('"')) == 64
    assert httpx.get(url.replace("main", "0" * 40)).headers["X-Error-Code"] == "RevisionNotFound"
