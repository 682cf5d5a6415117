"""Outputs of frozen backbones, computed once per text and picture and kept on disk.

    accelerate launch scripts/train.py --freeze_text --freeze_vision --freeze_clip --cache_features

A frozen backbone says the same of the same post in every epoch, with every seed and in every ablation. Its outputs lie
in safetensors files, which are mapped into memory and not read into it, one folder a backbone. The folder's name is a
digest of all that the outputs depend on (weights, settings of the tokenizer or image processor, code, versions), and
each output is named by a digest of its text or of its picture's bytes. So whatever changes, nothing stale is found;
splits, folds and other data sets share what they have in common. Deleting the folder costs nothing but time.
"""

import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from clipcacg.modeling_clipcacg import ClipCaCgPreTrainedModel
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.loading import picture

logger = logging.getLogger(__name__)

CACHE_FOLDER = Path(HF_HOME) / "clipcacg" / "features"
PARTIAL = "partial-"
POSTS_A_FILE = 512  # what a run that is broken off may lose; some 150 MiB of the default backbones' outputs
# Libraries whose versions decide about an output.
DECIDING = ("torch", "torchvision", "transformers", "tokenizers", "timm", "pillow")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Feature(NamedTuple):
    """What one backbone's outputs are called in `forward`, and what they stand for there."""

    name: str
    input: str
    mask: str | None  # for texts
    column: str


FEATURES = {
    "text": Feature("text_features", "input_ids", "attention_mask", "text"),
    "vision": Feature("image_features", "pixel_values", None, "image"),
    "clip.text": Feature("clip_text_features", "clip_input_ids", "clip_attention_mask", "text"),
    "clip.vision": Feature("clip_image_features", "clip_pixel_values", None, "image"),
}


class FeatureStore:
    """Tensors by name in a folder of safetensors files, to which files are only ever added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, Path] = {}
        self.files: dict[Path, Any] = {}
        self.look()

    def look(self) -> None:
        """Find what has been added, by other processes too."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self.files:
                try:
                    self.files[path] = safe_open(path, framework="pt")
                except SafetensorError as error:
                    raise ValueError(f"{path} is broken: delete it, and run this again. {error}") from error
                self.where |= dict.fromkeys(self.files[path].keys(), path)

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __getitem__(self, name: str) -> Tensor:
        return self.files[self.where[name]].get_tensor(name)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write a file, which appears whole or not at all."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=PARTIAL) as folder:
            try:
                save_file(tensors, Path(folder) / "part")
            except SafetensorError as error:
                raise OSError(f"The features cannot be written to {self.folder}: {error}") from error
            os.replace(Path(folder) / "part", self.folder / f"{next(iter(tensors))}.safetensors")
        self.look()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # a worker process opens the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def cache_features(
    model: ClipCaCgPreTrainedModel,
    processor: ClipCaCgProcessor,
    posts: datasets.DatasetDict,
    dtype: str = "float32",
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> tuple[datasets.DatasetDict, dict[str, FeatureStore]]:
    """Compute what is missing of the frozen backbones' outputs.

    Processes that do so at a time wait for one another, and a run that was broken off goes on where it stopped.

    Args:
        model: Which of its backbones are frozen is what is cached. It is moved to `device`.
        processor: Makes their inputs.
        posts: Splits with the columns text and image, as `load_posts` gives them.
        dtype: "float32", or "float16" for half the space.
        folder: Where to, beside outputs of other models and posts; None: where the Hub's libraries keep what they can
            make again (`HF_HOME`).
        device: Where to compute.
        num_workers: Processes that read pictures.

    Returns:
        The posts with columns that name their outputs, and a store of outputs for each frozen backbone.

    Raises:
        ValueError: If no backbone is frozen, a picture is broken, or the dtype is unknown or too narrow.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--cache_dtype must be float32 or float16, not {dtype!r}.")
    frozen = frozen_backbones(model)
    if not frozen:
        raise ValueError("--cache_features is for frozen backbones: add --freeze_text, --freeze_vision, ...")
    for column in sorted({FEATURES[name].column for name in frozen}):
        posts = datasets.DatasetDict({split: add_digests(dataset, column) for split, dataset in posts.items()})
    stores, training = {}, model.training
    model = model.to(device).eval()
    for name in frozen:
        store_folder = (folder or CACHE_FOLDER) / key(model, processor, name, dtype)
        store_folder.mkdir(parents=True, exist_ok=True)
        with FileLock(store_folder / "lock"):
            for leftover in store_folder.glob(f"{PARTIAL}*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            stores[name] = FeatureStore(store_folder)
            fill(stores[name], model, processor, name, posts, DTYPES[dtype], num_workers)
    model.train(training)
    return posts, stores


def frozen_backbones(model: ClipCaCgPreTrainedModel) -> list[str]:
    """Names of the backbones of which nothing is trained."""
    backbones = model.backbones().items()
    return [name for name, encoder in backbones if not any(weight.requires_grad for weight in encoder.parameters())]


def add_digests(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """Name each text, or each picture, by what is in it, unless an earlier call has."""
    if f"{column}_digest" in dataset.column_names:
        return dataset
    digests = [hashlib.sha256(content(value)).hexdigest() for value in dataset[column]]
    return dataset.add_column(f"{column}_digest", digests)


def content(value: Any) -> bytes:
    """A text or the bytes of a picture.

    Raises:
        ValueError: For the URL of a picture, which may show another one tomorrow.
    """
    if not isinstance(value, dict):
        return (value or "").encode("utf-8", errors="surrogatepass")
    if value["bytes"] is not None:
        return value["bytes"]
    if "://" in value["path"]:
        raise ValueError(f"--cache_features needs pictures on this machine, and {value['path']} is not.")
    return Path(value["path"]).read_bytes()


def key(model: ClipCaCgPreTrainedModel, processor: ClipCaCgProcessor, backbone: str, dtype: str) -> str:
    """A digest of all that the outputs of a backbone depend on, except for the posts."""
    encoder, settings = model.backbones()[backbone], input_settings(processor, backbone)
    config = encoder.config.to_dict() | {"_name_or_path": ""}
    versions = {name: installed_version(name) for name in DECIDING}
    sources = (type(encoder), ClipCaCgPreTrainedModel, ClipCaCgProcessor, picture, key)
    files = [inspect.getfile(source) for source in sources]
    code = [Path(file).read_text(encoding="utf-8") for file in files]
    digest = hashlib.sha256(
        json.dumps([backbone, dtype, config, settings, versions, code], default=str, sort_keys=True).encode()
    )
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{backbone}-{dtype}-{digest.hexdigest()[:32]}"


def installed_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def input_settings(processor: ClipCaCgProcessor, backbone: str) -> Any:
    """All that the processor's part for a backbone does to a text or a picture."""
    prefix = "clip_" if backbone.startswith("clip.") else ""
    if FEATURES[backbone].column == "image":
        settings = getattr(processor, f"{prefix}image_processor").to_dict()
        # Saving adds the first two. A large JPEG is decoded at a scale that depends on both views.
        return settings | {"auto_map": None, "processor_class": None, "needed": processor._needed_edge({})}
    tokenizer = getattr(processor, f"{prefix}tokenizer")
    if not tokenizer.is_fast:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(file).read_text(encoding="utf-8") for file in tokenizer.save_vocabulary(folder)]
        return [files, tokenizer.init_kwargs, tokenizer.model_max_length, tokenizer.truncation_side]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are left over from its last use; every use sets them.
    rules |= {"padding": None, "truncation": None}
    return [rules, tokenizer.model_max_length, tokenizer.truncation_side]


def fill(
    store: FeatureStore,
    model: ClipCaCgPreTrainedModel,
    processor: ClipCaCgProcessor,
    backbone: str,
    posts: datasets.DatasetDict,
    dtype: torch.dtype,
    num_workers: int,
) -> None:
    """Compute and store what the store lacks of these posts."""
    column = FEATURES[backbone].column
    rows = datasets.concatenate_datasets(
        [split.select_columns([column, f"{column}_digest"]) for split in posts.values()]
    )
    first = {digest: row for row, digest in enumerate(rows[f"{column}_digest"]) if digest not in store}
    if not first:
        return
    order = list(first.values())
    if column == "text":
        texts = rows["text"]
        order.sort(key=lambda row: len(texts[row] or ""))  # texts of a length need little padding
    loader = DataLoader(
        rows.select(order),
        batch_size=32,
        num_workers=num_workers,
        collate_fn=partial(encoder_inputs, processor=processor, backbone=backbone),
    )
    pending: dict[str, Tensor] = {}
    with tqdm(total=len(order), desc=f"features of {backbone}", unit=" posts") as bar:
        for digests, inputs, mask in loader:
            for digest, output in zip(digests, outputs(model, backbone, inputs, mask), strict=True):
                pending[digest] = output.to(dtype).contiguous()
                if not pending[digest].isfinite().all():
                    hint = ": try --cache_dtype float32" if dtype == torch.float16 else ""
                    raise ValueError(f"An output of the {backbone} backbone is no finite number in {dtype}{hint}.")
            if len(pending) >= POSTS_A_FILE:
                store.add(pending)
                pending = {}
            bar.update(len(digests))
    if pending:
        store.add(pending)
    logger.info("Features of %d %ss of %s are in %s", len(order), column, backbone, store.folder)


def encoder_inputs(
    rows: list[dict[str, Any]], processor: ClipCaCgProcessor, backbone: str
) -> tuple[list[str], Tensor, Tensor | None]:
    """Rows to their digests and the input of one backbone, with its mask if it is a text."""
    feature = FEATURES[backbone]
    if feature.column == "text":
        batch = processor(text=[row["text"] or "" for row in rows], return_tensors="pt")
    else:
        batch = processor(images=[picture(row["image"]) for row in rows], return_tensors="pt")
    return [row[f"{feature.column}_digest"] for row in rows], batch[feature.input], batch.get(feature.mask)


@torch.inference_mode()
def outputs(model: ClipCaCgPreTrainedModel, backbone: str, inputs: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The output for each post, without the padding of its text."""
    on_device = None if mask is None else mask.to(model.device)
    states = model.encode(backbone, inputs.to(model.device), on_device).float().cpu()
    if mask is None:
        yield from states
        return
    first = torch.ones(len(mask), states.shape[1] - mask.shape[1], dtype=torch.bool)  # t of CLIP, before its words
    for output, real in zip(states, torch.cat([first, mask.bool()], dim=1), strict=True):
        yield output[real]


def cached_inputs(rows: list[dict[str, Any]], stores: dict[str, FeatureStore]) -> dict[str, Tensor]:
    """The arguments of `forward` that come from stores, for a batch of posts; texts are padded."""
    batch = {}
    for backbone, store in stores.items():
        feature = FEATURES[backbone]
        found = [store[row[f"{feature.column}_digest"]] for row in rows]
        if feature.mask is None:
            batch[feature.name] = torch.stack(found)
            continue
        batch[feature.name] = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        words = [len(output) - (backbone == "clip.text") for output in found]
        batch[feature.mask] = (torch.arange(max(words)) < torch.tensor(words)[:, None]).long()
    return batch
