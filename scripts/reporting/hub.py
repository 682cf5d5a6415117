"""Push a checkpoint to the Hub: whole, and with nothing else.

    python scripts/push_to_hub.py CHECKPOINT USER/NAME
    python scripts/push_to_hub.py CHECKPOINT USER/NAME --private --revision experiment
    python scripts/push_to_hub.py CHECKPOINT USER/NAME --space

`train.py --push_to_hub --hub_model_id USER/NAME` does the same at its end. Log in with `hf auth login` before, or set
HF_TOKEN. Models are public unless `--private` is given; data sets, which `prepare_mvsa.py` pushes, are private unless
told otherwise. A push is one commit, so one that breaks off leaves the earlier revision as it was. It holds

    README.md                   the model card, its code, title and index with the model's name on the Hub
    config.json                 with the `auto_map` of all Auto classes
    *_clipcacg.py               the code that `auto_map` and `custom_pipelines` name
    model.safetensors           or model-00001-of-0000N.safetensors to the last one, and model.safetensors.index.json
    processor_config.json       both image processors
    tokenizer_config.json       and tokenizer.json, or the vocabulary files of a tokenizer that writes others
    clip_tokenizer/             the same two of a model that reads CLIP inputs
    confusion_matrix.png        if it was drawn
    training_curves.png         if it was drawn

and no other file of the folder. A file that would tell a path of this machine, its user's name or a token is refused.

`--space` then makes a Space of the same name, with the page of `demo.py` for this model: README.md, requirements.txt,
app.py, demo.py, explain.py and sample_posts.py. That of a private model needs a token as its secret HF_TOKEN.
"""

import getpass
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from clipcacg.configuration_clipcacg import AUTO_MAP
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.loading import one_sentence
from clipcacg.scripts.reporting.plots import CONFUSION_MATRIX_FILE, CURVES_FILE
from clipcacg.scripts.reporting.tables import escape_markdown

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICTURES = (CONFUSION_MATRIX_FILE, CURVES_FILE)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
# What an earlier push may have left on the Hub and a later one does not replace, but that would still be read.
STALE = ("model*.safetensors", INDEX, "*_clipcacg.py", "*tokenizer*", "vocab.*", "merges.txt", *PICTURES)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
URL = re.compile(r"https?://[^\s\"')]*")
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|([\W_])|[nrt])")
ABSOLUTE_PATH = re.compile(r"(?<![\w.~<>/\\-])(?:/|[A-Za-z]:[\\/])[^\s\"'`<>()\[\],;|]+")
# A paragraph of the card's template that is true of a folder only, and the places where it names the model.
LOCAL_HINT = "Run the code beside the model's folder, or give the path of that folder.\n\n"
NAME_IN_CODE = re.compile(r'^name = (".*")$', re.MULTILINE)
NAME_IN_INDEX = re.compile(r"^(model-index:\n- name: ).*$", re.MULTILINE)

SPACE_CODE = ("demo.py", "explain.py", "sample_posts.py")
SPACE_REQUIREMENTS = "torch>=2.6 torchvision>=0.21 transformers>=5.20 pillow>=11 matplotlib>=3.9 captum>=0.9".split()
SPACE_APP = """from demo import build_demo

build_demo("{repo_id}").launch()
"""
SPACE_CARD = """---
title: {name}
emoji: 💬
sdk: gradio
sdk_version: 6.31.0
app_file: app.py
license: apache-2.0
models:
- {repo_id}
---

The sentiment of a picture with its text, by [{repo_id}](https://huggingface.co/{repo_id}). The page loads that model
with its own code (`trust_remote_code=True`), and keeps nothing that is uploaded.
"""


class PushError(ValueError):
    """A push that is refused or failed; the message is one sentence for the person who asked for it."""


@dataclass
class PushArguments:
    """Where and how to push."""

    private: bool = field(default=False, metadata={"help": "Make the repository private; default: public."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if needed; default: main."})
    space: bool = field(default=False, metadata={"help": "Also make a Space, a page to try the model."})

    def __post_init__(self) -> None:
        if self.space and self.revision:
            raise ValueError("--space shows the model's main branch: leave out --revision.")


def push_checkpoint(
    folder: str | Path, repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> str:
    """Push a checkpoint.

    Args:
        folder: What `train.py` left behind.
        repo_id: "user/name"; made if it does not exist.
        private: Make it private, and refuse to push to one that is public.
        revision: Branch, made if it does not exist; default: main.
        token: Access token; default: the one that `hf auth login` or HF_TOKEN left.

    Returns:
        The hash of the commit, to load with `revision=`.

    Raises:
        PushError: If the checkpoint lacks a part, a file tells something of this machine, or the Hub cannot be reached
            or refuses. The earlier revision is still there then.
    """
    check_repo_id(repo_id)
    with told_in_a_sentence(repo_id, token):
        token = (token or get_token() or "").strip() or None
        if re.search(r"[^!-~]", token or ""):  # the HTTP library would print it to say why it cannot send it
            raise ValueError("the token has characters that no token has")
    files = checkpoint_files(Path(folder), repo_id)
    check_secrets(files, token)
    return push_files(files, repo_id, private, revision, token)


def push_space(repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Push a Space that shows a model which is on the Hub; see `push_checkpoint`."""
    scripts, names = Path(__file__).parent, {"repo_id": repo_id, "name": repo_id.split("/")[1]}
    files = {
        "README.md": SPACE_CARD.format(**names).encode(),
        "requirements.txt": "".join(f"{line}\n" for line in SPACE_REQUIREMENTS).encode(),
        "app.py": SPACE_APP.format(**names).encode(),
        **{name: scripts / name for name in SPACE_CODE},
    }
    check_secrets(files, token)
    return push_files(files, repo_id, private, None, token, space=True)


def check_repo_id(repo_id: str | None, asked_as: str = "the name on the Hub") -> None:
    """Refuse what cannot be the full name of a repository.

    Raises:
        PushError: If it is none.
    """
    try:
        validate_repo_id(repo_id or "")
        valid = "/" in (repo_id or "")
    except HFValidationError:
        valid = False
    if not valid:
        raise PushError(
            f"To push, give {asked_as} as USER/NAME, of letters, digits, '-', '_' and '.', not {repo_id!r}."
        )


def checkpoint_files(folder: Path, repo_id: str) -> dict[str, bytes | Path]:
    """What to push of a checkpoint: path on the Hub to content.

    Raises:
        PushError: If a part is missing.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        processor = ClipCaCgProcessor.from_pretrained(folder)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise PushError(f"{folder} is no checkpoint of a model and its processor: {one_line(error)}") from error
    if not AUTO_MAP.items() <= config.get("auto_map", {}).items():
        raise PushError(f"{folder / 'config.json'} does not name the code of this project in its auto_map.")
    needed = {"README.md", "config.json", "processor_config.json", *code_files(config), *weight_files(folder)}
    optional = {*PICTURES, *tokenizer_files(processor)}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        raise PushError(f"{folder} is incomplete: there is no {' and no '.join(missing)}.")
    files = {name: folder / name for name in sorted(needed | optional) if (folder / name).is_file()}
    return files | {"README.md": card_on_hub(folder / "README.md", repo_id)}


def code_files(config: dict) -> set[str]:
    """The Python files that a `config.json` names."""
    pipelines = config.get("custom_pipelines", {}).values()
    names = [*config["auto_map"].values(), *(pipeline["impl"] for pipeline in pipelines)]
    return {f"{name.partition('.')[0]}.py" for name in names}


def weight_files(folder: Path) -> set[str]:
    """The weights that `from_pretrained` reads: one file, or else an index and what it names."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return {WEIGHTS}
    return {INDEX, *json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}


def tokenizer_files(processor: ClipCaCgProcessor) -> set[str]:
    """The files that its tokenizers may have written."""
    tokenizers = {"": processor.tokenizer, "clip_tokenizer/": processor.clip_tokenizer}
    return {
        folder + name
        for folder, tokenizer in tokenizers.items()
        if tokenizer is not None
        for name in {*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()}
    }


def card_on_hub(card: Path, repo_id: str) -> bytes:
    """The model card, which calls the model by its name on the Hub, whatever the folder is called here."""
    text, new = card.read_text(encoding="utf-8").replace(LOCAL_HINT, ""), repo_id.split("/")[1]
    if found := NAME_IN_CODE.search(text):  # a title that somebody wrote since then stays
        old = json.loads(found[1]).split("/")[-1]
        text = text.replace(f"\n# {escape_markdown(old)}\n", f"\n# {escape_markdown(new)}\n", 1)
    text = NAME_IN_INDEX.sub(rf"\g<1>{json.dumps(new)}", text)
    return NAME_IN_CODE.sub(f'name = "{repo_id}"', text).encode()


def check_secrets(files: Mapping[str, bytes | Path], token: str | None) -> None:
    """Refuse a file that tells something of this machine; weights, which hold numbers, are not read.

    Raises:
        PushError: If there is one.
    """
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            content = content.read_bytes() if isinstance(content, Path) else content
            text = content.decode("utf-8", errors="replace")
            if TOKEN.search(text) or (token and token in text):
                raise PushError(f"{name} holds an access token, so nothing is pushed.")
            if path := next(filter(is_of_this_machine, ABSOLUTE_PATH.findall(URL.sub("", unescape(text)))), None):
                raise PushError(f"{name} names {path}, a path of this machine, so nothing is pushed.")


def unescape(text: str) -> str:
    """Text with what the backslashes of JSON and Markdown stand for; a line break becomes a space."""
    return ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[2] or " ", text)


def is_of_this_machine(path: str) -> bool:
    """Whether an absolute path exists here, is in the user's home or has the user's name in it."""
    pure = PurePosixPath(path) if path.startswith("/") else PureWindowsPath(path)
    home = Path.home()
    in_home = home != Path(home.anchor) and home in (Path(path), *Path(path).parents)
    return in_home or machine_user() in pure.parts or (len(pure.parts) > 2 and os.path.exists(path))


def machine_user() -> str | None:
    """Name of the user who runs this, if there is one: a container's user may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def push_files(
    files: Mapping[str, bytes | Path],
    repo_id: str,
    private: bool,
    revision: str | None,
    token: str | None,
    space: bool = False,
) -> str:
    """Make the repository if needed and push all files in one commit; see `push_checkpoint`."""
    with told_in_a_sentence(repo_id, token):
        api, kind = HfApi(token=token), "space" if space else "model"
        sdk = "gradio" if space else None
        url = api.create_repo(repo_id, private=private, repo_type=kind, space_sdk=sdk, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise PushError(f"{repo_id} is public, so nothing is pushed: make it private first.")
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision, repo_type=kind)
        stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in STALE)]
        operations = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        message = f"Push a {kind} of CLIP-CA-CG"
        commit = api.create_commit(repo_id, operations, commit_message=message, repo_type=kind, revision=revision)
    logger.info("Pushed %d files to %s, revision %s", len(files), url, commit.oid)
    return commit.oid


@contextmanager
def told_in_a_sentence(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn whatever goes wrong between here and the Hub into one sentence.

    Raises:
        PushError: If something does.
    """
    try:
        yield
    except PushError:
        raise
    except Exception as error:  # of the Hub's client, the HTTP library or hf_xet, which have no common type
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401:
            reason = "the Hub does not accept the token" if token else "you are not logged in"
            reason += "; log in with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            reason = "the token does not allow it; it needs write access to that repository"
        else:
            reason = one_line(error)
        raise PushError(f"The push to {repo_id} failed: {reason.rstrip('.')}.") from error


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    parser = HfArgumentParser(PushArguments, description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Folder that train.py left behind.")
    parser.add_argument("repo_id", metavar="USER/NAME", help="Name of the model on the Hub.")
    with one_sentence():
        arguments, names = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
        push_checkpoint(names.checkpoint, names.repo_id, arguments.private, arguments.revision)
        if arguments.space:
            push_space(names.repo_id, arguments.private)


if __name__ == "__main__":
    main()
