"""Push a checkpoint to the Hub, and make a Space that shows it.

A push is one commit of `upload_folder`, so an interrupted push leaves the earlier revision as it was. (huggingface_hub
may split commits of more than 20 files that failed; only a checkpoint in many shards has so many.)

A Space has a copy of the package in a folder beside its app.py, because the project has no release on PyPI and a Space
installs requirements.txt before it has any other file.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from packaging.requirements import Requirement
from transformers.dynamic_module_utils import get_relative_imports

from clipcacg.configuration_clipcacg import AUTO_MAP, BACKBONES
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.reporting.model_card import CARD_FILE, rename_card
from clipcacg.scripts.reporting.plots import PLOTS
from clipcacg.scripts.reporting.predictions import check_folder

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
# Files of an earlier push that would still be read if a later push did not replace them.
STALE = ["model*.safetensors", INDEX, "*_clipcacg.py", "*tokenizer*", "vocab.*", "merges.txt", *PLOTS]
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
# What the Hub's client and its HTTP library raise for a bad answer or none, and RuntimeError, hf_xet's only class.
HUB_ERRORS = (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError, OSError, RuntimeError)

SPACE_APP = """from clipcacg.scripts.reporting.page import build_demo

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

Predicts the sentiment of an image with its text by [{repo_id}](https://huggingface.co/{repo_id}). Uploads are deleted
after ten minutes.

`clipcacg/` is a copy of the Python package CLIP-CA-CG, which loads the model; the model's own code is not run.
"""


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Push a checkpoint.

    The model card in the folder is written again with the model's name on the Hub. A card that was edited since
    training is pushed as it is.

    Args:
        folder: Folder that `train.py` wrote.
        repo_id: "user/name"; created if it does not exist.
        private: Create a private repository, and refuse to push to a public one.
        revision: Branch, created if it does not exist; default: main.
        token: Access token; default: that of `hf auth login` or HF_TOKEN.
        trust_remote_code: Run the code of a tokenizer that has its own, to learn which files it reads.

    Returns:
        The hash of the commit, to load with `revision=`.

    Raises:
        InputError: If a part of the checkpoint is missing, a file contains a token, or the
            Hub cannot be reached or refuses. The earlier revision is unchanged in that case.
    """
    check_repo_id(repo_id)
    folder, token = Path(folder), valid_token(repo_id, token)
    files = checkpoint_files(folder, trust_remote_code)
    if not rename_card(folder, repo_id):
        logger.info("%s is pushed as it is, because it is not the card that training wrote", folder / CARD_FILE)
    check_secrets(folder, files, token)
    patterns = {"allow_patterns": files, "delete_patterns": STALE}
    return upload(folder, repo_id, "model", private, token, revision=revision, **patterns)


def push_space(repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Push a Space that shows a model on the Hub, under the model's name; see `push_checkpoint`."""
    with TemporaryDirectory() as name:
        write_space(Path(name), repo_id)
        return upload(Path(name), repo_id, "space", private, token, delete_patterns="clipcacg/*", space_sdk="gradio")


def upload(
    folder: Path,
    repo_id: str,
    kind: str,
    private: bool,
    token: str | None,
    revision: str | None = None,
    space_sdk: str | None = None,
    **patterns: str | list[str],
) -> str:
    """Create the repository if needed and upload a folder in one commit; see `push_checkpoint`.

    Args:
        kind: "model" or "space".
        patterns: Of `upload_folder`.
    """
    with hub_errors(repo_id, token):
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, repo_type=kind, space_sdk=space_sdk, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise InputError(f"{repo_id} is public, so nothing is pushed: make it private first.")
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        where = {"repo_id": repo_id, "repo_type": kind, "revision": revision}
        message = f"Push a {kind} of CLIP-CA-CG"
        commit = api.upload_folder(folder_path=folder, commit_message=message, **where, **patterns)
    logger.info("Pushed to %s, revision %s", url, commit.oid)
    return commit.oid


def check_repo_id(repo_id: str | None, argument: str = "the name on the Hub") -> None:
    """Check that a name is the full name of a repository.

    Raises:
        InputError: If it is not.
    """
    try:
        validate_repo_id(repo_id or "")
        valid = "/" in (repo_id or "")
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(
            f"To push, give {argument} as USER/NAME, of letters, digits, '-', '_' and '.', not {repo_id!r}."
        )


def valid_token(repo_id: str, token: str | None) -> str | None:
    """The given or stored access token. Checked here, because the HTTP library's message would print it.

    Raises:
        InputError: If it has characters that no token has.
    """
    token = (token or get_token() or "").strip() or None
    if re.search(r"[^!-~]", token or ""):
        raise InputError(f"The push to {repo_id} failed: the token has characters that no token has.")
    return token


def checkpoint_files(folder: Path, trust_remote_code: bool = False) -> list[str]:
    """Paths in the folder of all files to push.

    Raises:
        InputError: If a part is missing.
    """
    check_folder(str(folder))
    with as_input_error(f"{folder} is not a checkpoint of a model and its processor", OSError, TypeError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        processor = ClipCaCgProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        weights = weight_files(folder)
    if not AUTO_MAP.items() <= config.get("auto_map", {}).items():
        raise InputError(f"{folder / 'config.json'} does not name the code of this project in its auto_map.")
    parts = [config.get(f"{part}_config") or {} for part in BACKBONES]
    needed = {CARD_FILE, "config.json", "processor_config.json", *weights}
    needed |= code_files(folder, config, *parts)
    for name, tokenizer in tokenizers(processor).items():
        needed |= {name + file for file in code_files(folder / name, tokenizer.init_kwargs)}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise InputError(f"{folder} is incomplete: there is no {' and no '.join(missing)}.")
    return sorted(name for name in {*needed, *PLOTS, *tokenizer_files(processor)} if (folder / name).is_file())


def code_files(folder: Path, *configs: dict) -> set[str]:
    """The Python files that configs name in `auto_map` and `custom_pipelines`, and those that these files import."""
    names: set[str] = set()
    for config in configs:
        classes = [*(config.get("auto_map") or {}).values()]
        classes += [pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()]
        # The Auto class of tokenizers names two, of which either may be None.
        names |= {name for named in classes for name in ([named] if isinstance(named, str) else named) if name}
    files: set[str] = set()
    found = {f"{name.rpartition('--')[2].partition('.')[0]}.py" for name in names}
    while new := found - files:
        files |= new
        found = {
            f"{module}.py"
            for name in new
            if (folder / name).is_file()
            for module in get_relative_imports(folder / name)
        }
    return files


def weight_files(folder: Path) -> set[str]:
    """The weights that `from_pretrained` reads: one file, or an index and the files that it names."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return {WEIGHTS}
    return {INDEX, *json.loads((folder / INDEX).read_text(encoding="utf-8")).get("weight_map", {}).values()}


def tokenizers(processor: ClipCaCgProcessor) -> dict[str, Any]:
    """The processor's tokenizers, by the folder in the checkpoint that holds their files."""
    found = {"": processor.tokenizer, "clip_tokenizer/": processor.clip_tokenizer}
    return {folder: tokenizer for folder, tokenizer in found.items() if tokenizer is not None}


def tokenizer_files(processor: ClipCaCgProcessor) -> set[str]:
    """The files that the processor's tokenizers may have written."""
    return {
        folder + name
        for folder, tokenizer in tokenizers(processor).items()
        for name in {*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()}
    }


def write_space(folder: Path, repo_id: str) -> None:
    """Write the files of a Space: three of its own and the package's Python files."""
    package = Path(__file__).parents[2]
    needed = [requirement for line in requires("clipcacg") or [] if is_for_page(requirement := Requirement(line))]
    names = {"repo_id": repo_id, "name": repo_id.split("/")[1]}
    (folder / "README.md").write_text(SPACE_CARD.format(**names), encoding="utf-8")
    (folder / "app.py").write_text(SPACE_APP.format(**names), encoding="utf-8")
    lines = sorted(f"{requirement.name}{requirement.specifier}\n" for requirement in needed)
    (folder / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    for path in [*package.glob("*.py"), *(package / "scripts").rglob("*.py")]:
        target = folder / "clipcacg" / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def is_for_page(requirement: Requirement) -> bool:
    """Whether the package itself or its extra `demo` needs a requirement."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": "demo"})


def check_secrets(folder: Path, files: Iterable[str], token: str | None) -> None:
    """Check that no file contains an access token. Weights, which are numbers, are not read.

    Raises:
        InputError: If one does.
    """
    for name in files:
        if name.endswith(".safetensors"):
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(text) or (token and token in text):
            raise InputError(f"{name} contains an access token, so nothing is pushed.")


@contextmanager
def hub_errors(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn an error of the Hub or its client into one sentence.

    Raises:
        InputError: In place of one of `HUB_ERRORS`.
    """
    try:
        yield
    except HUB_ERRORS as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401:
            reason = "the Hub does not accept the token" if token else "you are not logged in"
            reason += "; log in with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            reason = "the token does not allow it; it needs write access to that repository"
        else:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"The push to {repo_id} failed: {reason}.") from error
