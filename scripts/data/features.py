"""Store the outputs of frozen encoders on disk, so that later runs train only the fusion.

    accelerate launch scripts/train.py --freeze_text --freeze_vision --freeze_clip --cache_features

A frozen encoder gives the same output for the same post in every epoch, with every seed and in every ablation. So do
frozen first layers (`--freeze_text_layers`, `--freeze_vision_blocks`): training then runs only the layers above. The
outputs are kept in safetensors files, which are memory-mapped, in one folder per encoder. The name of the folder is a
digest of everything the outputs depend on: weights, settings of the tokenizer or image processor, code and library
versions. The name of an output is a digest of its text or of the bytes of its image. So a changed input never gets an
old output, and splits, folds and data sets share what they have in common. Delete the folder only between runs.

With `--augment` each training post also has `--augment_views` augmented versions, whose outputs are stored in the same
way. An epoch draws one of them.
"""

import ast
import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
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
from transformers import PreTrainedModel

from clipcacg.modeling_clipcacg import (
    ClipCaCgPreTrainedModel,
    ClipTower,
    example_image,
    feature_map,
    frozen_layers,
    frozen_output,
    token_states,
)
from clipcacg.processing_clipcacg import ClipCaCgProcessor, is_blank
from clipcacg.scripts.data.augmentation import Augmentation, view_name
from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.data.images import image_bytes, image_source
from clipcacg.scripts.data.progress import Progress
from clipcacg.scripts.data.reading import read_posts

logger = logging.getLogger(__name__)

CACHE_FOLDER = Path(HF_HOME) / "clipcacg" / "features"
PARTIAL = "partial-"
POSTS_PER_FILE = 512  # what an interrupted run may lose; about 150 MiB with the default encoders
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "timm", "pillow")  # whose versions affect an output
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Feature(NamedTuple):
    """How the outputs of an encoder enter `forward`, and which input and mask they replace."""

    name: str
    input: str
    mask: str | None  # texts only
    column: str


FEATURES = {
    "text": Feature("text_features", "input_ids", "attention_mask", "text"),
    "vision": Feature("image_features", "pixel_values", None, "image"),
    "clip.text": Feature("clip_text_features", "clip_input_ids", "clip_attention_mask", "text"),
    "clip.vision": Feature("clip_image_features", "clip_pixel_values", None, "image"),
}


class FeatureStore:
    """Tensors by name in a folder of safetensors files, to which files are only added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self.files: dict[Path, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find the files that this or another process has added."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self.files:
                with as_input_error(f"{path} is broken. Delete it and run the command again", SafetensorError):
                    self.files[path] = safe_open(path, framework="pt")
                self.file_of |= dict.fromkeys(self.files[path].keys(), path)

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __getitem__(self, name: str) -> Tensor:
        return self.files[self.file_of[name]].get_tensor(name)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write the tensors to a new file, which appears whole or not at all."""
        with (
            as_input_error(f"The features cannot be written to {self.folder}", OSError, SafetensorError),
            tempfile.TemporaryDirectory(dir=self.folder, prefix=PARTIAL) as folder,
        ):
            save_file(tensors, Path(folder) / "part")
            os.replace(Path(folder) / "part", self.folder / f"{next(iter(tensors))}.safetensors")
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.folder,)  # a worker process opens the files itself


def cache_features(
    model: ClipCaCgPreTrainedModel,
    processor: ClipCaCgProcessor,
    posts: datasets.DatasetDict,
    dtype: str = "float32",
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    views: int = 0,
) -> tuple[datasets.DatasetDict, dict[str, FeatureStore]]:
    """Compute the outputs of the frozen encoders that are not stored yet.

    Processes that do so at the same time wait for each other. An interrupted run continues where it stopped.

    Args:
        model (`ClipCaCgPreTrainedModel`): its frozen encoders are used. It is moved to `device`.
        processor (`ClipCaCgProcessor`): makes the encoders' inputs.
        posts (`datasets.DatasetDict`): splits with the columns text and image, as `load_posts` returns them.
        dtype (`str`): "float32", or "float16" for half the space.
        folder (`Path`, *optional*): holds the outputs of any number of models and data sets. By default a folder in
            `HF_HOME`.
        device (`torch.device` or `str`): where the encoders run.
        num_workers (`int`): number of processes that read images.
        views (`int`): number of augmented versions of each training post that are stored too.

    Returns:
        The posts with one more column per modality, the digests that name their outputs; and one store per encoder.

    Raises:
        InputError: no encoder is frozen, an image is broken, or the dtype is unknown or too narrow.
    """
    if dtype not in DTYPES:
        raise InputError(f"--cache_dtype must be float32 or float16, got {dtype!r}.")
    frozen = frozen_backbones(model)
    if not frozen:
        raise InputError(
            "--cache_features needs frozen encoders or layers: add --freeze_text, --freeze_text_layers, "
            "--freeze_vision, --freeze_vision_blocks or --freeze_clip."
        )
    may_lack = model.config.modality_dropout > 0
    for column in sorted({FEATURES[name].column for name in frozen}):
        posts = datasets.DatasetDict(
            {split: add_digests(dataset, column, may_lack) for split, dataset in posts.items()}
        )
    stores, training = {}, model.training
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` hides that it is a method
    model.eval()
    for name in frozen:
        store_folder = (folder or CACHE_FOLDER) / key(model, processor, name, dtype)
        store_folder.mkdir(parents=True, exist_ok=True)
        with FileLock(store_folder / "lock"):
            for leftover in store_folder.glob(f"{PARTIAL}*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            stores[name] = FeatureStore(store_folder)
            _fill(stores[name], model, processor, name, posts, DTYPES[dtype], num_workers, views)
    model.train(training)
    return posts, stores


def frozen_backbones(model: ClipCaCgPreTrainedModel) -> list[str]:
    """Return the names of the encoders that are frozen, or whose first layers are and can be left out of training."""
    names = []
    for name, encoder in model.backbones().items():
        if not any(weight.requires_grad for weight in encoder.parameters()):
            names.append(name)
        elif name in ("text", "vision") and frozen_layers(encoder):
            if _continues_from_features(name, encoder):
                names.append(name)
            else:
                logger.warning(
                    "The frozen layers run in every step: the %s encoder %s cannot continue from their stored output.",
                    name,
                    encoder.config.model_type,
                )
    return names


def _continues_from_features(name: str, encoder: PreTrainedModel) -> bool:
    """Whether the upper layers compute the same from the frozen layers' output as from token ids or pixels.

    No attribute tells it for every family, so this function compares the two on a small input. The output must not
    depend on trainable parameters either, as MPNet's does: all its layers share the weights of its relative positions.
    """
    run: Any
    inputs: dict[str, Tensor]
    if name == "text":
        ids = torch.arange(8, device=encoder.device).view(2, 4)
        run, inputs = partial(token_states, encoder, ids, ids < 7), {"input_ids": ids, "attention_mask": ids < 7}
    else:
        image = example_image(encoder).to(encoder.device, encoder.dtype)
        image = torch.linspace(-1, 1, image.numel(), device=image.device, dtype=image.dtype).view_as(image)
        run, inputs = partial(feature_map, encoder, image), {"pixel_values": image}
    training = encoder.training
    encoder.eval()
    try:
        features = frozen_output(encoder, **inputs)
        return not features.requires_grad and torch.allclose(run(features), run(), rtol=0, atol=1e-4)
    except Exception:  # whatever such a family's own code raises when its layers are replaced
        logger.debug("no continuation from stored outputs", exc_info=True)
        return False
    finally:
        encoder.train(training)


def add_digests(dataset: datasets.Dataset, column: str, may_lack: bool = False) -> datasets.Dataset:
    """Add the column `<column>_digest`, which identifies each text or image by its content, unless it is there.

    With `may_lack` a blank text is a missing one, whose output differs from that of an empty text.
    """
    if f"{column}_digest" in dataset.column_names:
        return dataset
    values = [None if may_lack and is_blank(value) else value for value in dataset[column][:]]
    digests = [hashlib.sha256(_content(value)).hexdigest() for value in values]
    return dataset.add_column(f"{column}_digest", digests)


def _content(value: Any) -> bytes:
    if value is None:
        return b"\xffmissing"  # no text in UTF-8
    return image_bytes(value) if isinstance(value, dict) else value.encode("utf-8", errors="surrogatepass")


def key(model: ClipCaCgPreTrainedModel, processor: ClipCaCgProcessor, encoder_name: str, dtype: str) -> str:
    """Return a digest of everything the outputs of an encoder depend on, except for the posts."""
    encoder, settings = model.backbones()[encoder_name], _input_settings(processor, encoder_name)
    config = encoder.config.to_dict() | {"_name_or_path": ""}
    versions = {name: _installed_version(name) for name in LIBRARIES}
    coder = encoder.encoder if isinstance(encoder, ClipTower) else encoder
    sources = (type(coder), ClipCaCgPreTrainedModel, ClipCaCgProcessor, image_source, Augmentation, key)
    code = [_without_comments(Path(inspect.getfile(source)).read_text(encoding="utf-8")) for source in sources]
    is_shared = encoder_name.removeprefix("clip.") in model.config.shared  # then its output is not projected
    facts = [encoder_name, is_shared, dtype, frozen_layers(encoder), config, settings, versions, code]
    digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{encoder_name}-{dtype}-{digest.hexdigest()[:32]}"


@cache
def _without_comments(code: str) -> str:
    """Python code without comments, docstrings and layout."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _installed_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _input_settings(processor: ClipCaCgProcessor, encoder_name: str) -> Any:
    """Everything that decides how the processor turns a text or image into the input of an encoder."""
    prefix = "clip_" if encoder_name.startswith("clip.") else ""
    if FEATURES[encoder_name].column == "image":
        settings = getattr(processor, f"{prefix}image_processor").to_dict()
        # Saving adds the first two. A large JPEG is decoded at a scale that depends on the sizes of both inputs.
        return settings | {"auto_map": None, "processor_class": None, "needed": processor.needed_edge({})}
    tokenizer, padding = getattr(processor, f"{prefix}tokenizer"), prefix and processor.clip_padding
    if not tokenizer.is_fast:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(file).read_text(encoding="utf-8") for file in tokenizer.save_vocabulary(folder)]
        return [files, tokenizer.init_kwargs, tokenizer.model_max_length, tokenizer.truncation_side, padding]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two hold the settings of the last call; every call sets them anew.
    rules |= {"padding": None, "truncation": None}
    return [rules, tokenizer.model_max_length, tokenizer.truncation_side, padding]


def _fill(
    store: FeatureStore,
    model: ClipCaCgPreTrainedModel,
    processor: ClipCaCgProcessor,
    encoder_name: str,
    posts: datasets.DatasetDict,
    dtype: torch.dtype,
    num_workers: int,
    views: int,
) -> None:
    """Compute and store the outputs of these posts, and of views of the training posts, that the store lacks."""
    column = FEATURES[encoder_name].column
    needed = ("id", column, f"{column}_digest")  # the ID is for messages
    splits = {
        name: split.select_columns([name for name in needed if name in split.column_names])
        for name, split in posts.items()
    }
    rows = datasets.concatenate_datasets(list(splits.values()))
    digests, wanted = rows[f"{column}_digest"][:], dict[str, tuple[int, int | None]]()
    for row, digest in enumerate(digests):
        wanted.setdefault(digest, (row, None))
    augmented = set(splits["train"][f"{column}_digest"][:]) if views else set()
    for row, digest in enumerate(digests):
        if digest in augmented:
            wanted |= {view_name(digest, view): (row, view) for view in range(views)}
    order = [(name, *source) for name, source in wanted.items() if name not in store]
    if not order:
        return
    if column == "text":
        texts = rows["text"][:]
        order.sort(key=lambda item: len(texts[item[1]] or ""))  # texts of similar length need little padding
    loader: DataLoader[Any] = DataLoader(
        order,  # type: ignore[arg-type]  # a list serves as a data set
        batch_size=32,
        num_workers=num_workers,
        collate_fn=partial(
            _encoder_inputs,
            rows=rows,
            processor=processor,
            encoder_name=encoder_name,
            may_lack=model.config.modality_dropout > 0,
        ),
    )
    pending: dict[str, Tensor] = {}
    with Progress(len(order), f"features of {encoder_name}") as bar:
        for names, inputs, mask in loader:
            for name, output in zip(names, outputs(model, encoder_name, inputs, mask), strict=True):
                pending[name] = output.to(dtype).contiguous()
                if not pending[name].isfinite().all():
                    hint = ": try --cache_dtype float32" if dtype == torch.float16 else ""
                    raise InputError(f"An output of the {encoder_name} encoder is not finite in {dtype}{hint}.")
            if len(pending) >= POSTS_PER_FILE:
                store.add(pending)
                pending = {}
            bar.update(len(names))
    if pending:
        store.add(pending)
    logger.info("Features of %d %ss of %s are in %s", len(order), column, encoder_name, store.folder)


def _encoder_inputs(
    order: list[tuple[str, int, int | None]],
    rows: datasets.Dataset,
    processor: ClipCaCgProcessor,
    encoder_name: str,
    may_lack: bool,
) -> tuple[list[str], Tensor, Tensor | None]:
    """Make the names of outputs, the input of one encoder and, for a text, its mask.

    Args:
        order: Name of the output, number of the row, and of its view; None for the post as it is.
        rows: Posts.
        processor: Makes the inputs.
        encoder_name: Key of `FEATURES`.
        may_lack: See `read_posts`.
    """
    feature, augmentation = FEATURES[encoder_name], Augmentation(processor)
    posts = []
    for name, row, view in order:
        post = rows[row]
        if view is not None:
            with torch.random.fork_rng(devices=[]):  # a view depends on its name alone
                torch.manual_seed(int(name[:8], 16) + view)
                post |= augmentation({feature.column: [post[feature.column]]})
                post[feature.column] = post[feature.column][0]
        posts.append(post)
    batch = read_posts(processor, posts, [feature.column], may_lack)
    mask = None if feature.mask is None else batch[feature.mask]
    return [name for name, _, _ in order], batch[feature.input], mask


@torch.inference_mode()
def outputs(
    model: ClipCaCgPreTrainedModel, encoder_name: str, inputs: Tensor, mask: Tensor | None
) -> Iterator[Tensor]:
    """Yield the output for each post, without the padding of its text."""
    on_device = None if mask is None else mask.to(model.device)
    states = model.encode(encoder_name, inputs.to(model.device), on_device).float().cpu()
    if mask is None:
        yield from states
        return
    first = torch.ones(len(mask), states.shape[1] - mask.shape[1], dtype=torch.bool)  # CLIP's t, before its words
    for output, real in zip(states, torch.cat([first, mask.bool()], dim=1), strict=True):
        yield output[real]


def cached_inputs(rows: Sequence[dict[str, Any]], stores: dict[str, FeatureStore]) -> dict[str, Tensor]:
    """Return the arguments of `forward` that come from the stores, for a batch of posts; texts are padded."""
    batch = {}
    for name, store in stores.items():
        feature = FEATURES[name]
        found = [store[row[f"{feature.column}_digest"]] for row in rows]
        if feature.mask is None:
            batch[feature.name] = torch.stack(found)
            continue
        words = [len(output) - (name == "clip.text") for output in found]
        if not any(words):  # no post has a text; a batch has one token at least
            found = [torch.nn.functional.pad(output, (0, 0, 0, 1)) for output in found]
        batch[feature.name] = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        batch[feature.mask] = (torch.arange(max(1, *words)) < torch.tensor(words)[:, None]).long()
    return batch
