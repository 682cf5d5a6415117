"""Predict posts: one at a time, or a file or folder of them, line by line into a file of predictions."""

import csv
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.data.images import locate_image
from clipcacg.scripts.data.mvsa import read_text

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Inputs = dict[str, torch.Tensor]


def checkpoint_config(checkpoint: str) -> ClipCaCgConfig:
    """Load the config of a CLIP-CA-CG checkpoint.

    Raises:
        InputError: If it cannot be loaded, or belongs to another kind of model.
    """
    with as_input_error(f"The checkpoint {checkpoint} cannot be loaded", OSError, ValueError):
        check_model_type(PreTrainedConfig.get_config_dict(checkpoint)[0])
        return ClipCaCgConfig.from_pretrained(checkpoint)


def check_model_type(config: dict[str, Any]) -> None:
    """Raise a ValueError if `config`, the content of a config.json, is of another kind of model."""
    if config.get("model_type") != ClipCaCgConfig.model_type:
        raise ValueError(f"its model type is {config.get('model_type')!r}, not {ClipCaCgConfig.model_type!r}")


def load_checkpoint(
    checkpoint: str, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[ClipCaCgForSequenceClassification, ClipCaCgProcessor]:
    """Load a model in evaluation mode, and its processor.

    Args:
        checkpoint: Folder or Hub name.
        trust_remote_code: Run the code that the checkpoint holds in place of this package's. The Auto classes would
            not do that: they prefer the classes that this package registers.
        **kwargs: As in the model's `from_pretrained`.

    Raises:
        InputError: If the checkpoint does not exist, is broken or of another model.
    """
    model_class, processor_class = ClipCaCgForSequenceClassification, ClipCaCgProcessor
    with as_input_error(f"The checkpoint {checkpoint} cannot be loaded", OSError, ValueError, SafetensorError):
        config = PreTrainedConfig.get_config_dict(checkpoint)[0]
        check_model_type(config)
        if trust_remote_code:
            auto_map = config.get("auto_map", {})
            names = ("AutoModelForSequenceClassification", "AutoProcessor")
            if not auto_map.keys() >= set(names):
                raise InputError(f"The checkpoint {checkpoint} holds no code: leave out --trust_remote_code.")
            model_class, processor_class = (
                get_class_from_dynamic_module(auto_map[name], checkpoint) for name in names
            )
            kwargs["trust_remote_code"] = True
        processor = processor_class.from_pretrained(checkpoint)
        model = model_class.from_pretrained(checkpoint, **kwargs).eval()
    return model, processor


def read_rows(source: Path) -> Iterator[Row]:
    """Read the posts of a file or folder lazily.

    Args:
        source: A .csv or .jsonl file with the columns id, text and image, or a folder in the layout of MVSA.

    Yields:
        {id, text, image}, or {id, error} for a row that cannot be read.

    Raises:
        InputError: If the source cannot be read, or is neither a folder of posts nor a .csv or .jsonl file.
    """
    readers = {".csv": read_csv, ".jsonl": read_jsonl}
    reader = read_folder if source.is_dir() else readers.get(source.suffix)
    if reader is None:
        raise InputError(f"{source} is neither a folder nor a .csv or .jsonl file.")
    with as_input_error(f"{source} cannot be read", OSError):
        yield from reader(source)


def read_jsonl(source: Path) -> Iterator[Row]:
    """Read the posts of a file of JSON lines."""
    with source.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield as_post(json.loads(line), number, source.parent)
            except (AttributeError, RecursionError, ValueError) as error:
                yield {"id": str(number), "error": f"line {number} is not a JSON object: {error}"}


def read_csv(source: Path) -> Iterator[Row]:
    """Read the posts of a table. Strictly: an unclosed quote would otherwise swallow the rows below it silently."""
    csv.field_size_limit(sys.maxsize)
    with source.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        for number in count(1):
            try:
                yield as_post(next(rows), number, source.parent)
            except StopIteration:
                return
            except csv.Error as error:
                yield {"id": str(number), "error": f"the row that ends on line {rows.line_num}: {error}"}


def read_folder(source: Path) -> Iterator[Row]:
    """Read the posts <ID>.jpg and <ID>.txt of a folder, or of its subfolder `data`, in the order of their IDs.

    Raises:
        InputError: If there are none.
    """
    folder = source / "data" if (source / "data").is_dir() else source
    ids = {path.stem for path in folder.iterdir() if path.suffix in (".jpg", ".txt")}
    if not ids:
        raise InputError(f"{folder} holds neither <ID>.jpg nor <ID>.txt.")
    for post_id in sorted(ids, key=lambda post_id: (len(post_id), post_id)):
        try:
            text = read_text(folder / f"{post_id}.txt")
            yield {"id": post_id, "text": text, "image": str(folder / f"{post_id}.jpg")}
        except InputError as error:
            yield {"id": post_id, "error": str(error)}


def as_post(row: Row, number: int, folder: Path) -> Row:
    """Keep id, text and image of a row; its number replaces a missing ID."""
    post_id = row.get("id")
    image = locate_image(row.get("image") or None, folder)
    return {"id": str(number if post_id is None else post_id), "text": row.get("text"), "image": image}


def prediction_line(post_id: str, logits: torch.Tensor, config: ClipCaCgConfig) -> dict[str, Any]:
    """The line that is written for one post.

    Args:
        post_id: The post's ID.
        logits: (labels,), the model's output for the post.
        config: Config of the model.

    Returns:
        {id, label, probabilities}; {id, labels, probabilities} for several labels; {id, value} for a regression.
    """
    answer = ClipCaCgProcessor.post_process(logits[None], config)[0]
    if "value" in answer:
        return {"id": post_id, "value": round(answer["value"], 6)}
    scores = {label: round(score, 6) for label, score in answer.pop("scores").items()}
    return {"id": post_id, **answer, "probabilities": scores}


def write_line(file: TextIO, line: dict[str, Any]) -> None:
    """Write one JSON line."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


@dataclass
class PreparedBatches(IterableDataset):
    """Batches of rows with the model inputs of the readable ones, made by any number of worker processes.

    Worker k of n makes every n-th batch, and the loader takes from the workers in turn, which keeps the order.
    """

    source: Path
    start: int
    stop: int | None
    batch_size: int
    collator: PostCollator

    def __iter__(self) -> Iterator[tuple[list[Row], Inputs | None]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = islice(read_rows(self.source), self.start, self.stop)
        for turn in count():
            batch = list(islice(rows, self.batch_size))
            if not batch:
                return
            if turn % workers == number:
                yield prepare(batch, self.collator)


def prepare(rows: list[Row], collator: PostCollator) -> tuple[list[Row], Inputs | None]:
    """Make the model inputs of the readable rows, and give every other row an error.

    Rows are tried one by one only after the batch failed, which keeps the usual case fast.

    Returns:
        The rows, and the inputs of those without an error, in their order; None if there is no such row.
    """
    for row in rows:
        missing = [name for name in collator.config.modalities if not isinstance(row.get(name), str)]
        if missing and "error" not in row:
            row["error"] = f"the model needs {' and '.join(missing)}, which this post does not have"
    good = [row for row in rows if "error" not in row]
    try:
        return rows, collator(good) if good else None
    except InputError:
        for row in good:
            try:
                collator([row])
            except InputError as error:
                row["error"] = str(error)
        good = [row for row in good if "error" not in row]
        return rows, collator(good) if good else None


@torch.inference_mode()
def predict_rows(
    model: ClipCaCgForSequenceClassification, rows: list[Row], inputs: Inputs | None, bf16: bool = False
) -> list[Row]:
    """Predict what `prepare` returned: one line per row, with its prediction or its error."""
    logits: Iterator[torch.Tensor] = iter(())
    if inputs is not None:
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = iter(model(**inputs).logits.float().cpu())
    return [
        {"id": str(row["id"]), "error": row["error"]}
        if "error" in row
        else prediction_line(str(row["id"]), next(logits), model.config)
        for row in rows
    ]


def lines_done(output: Path, origin: dict[str, Any]) -> int:
    """Count the posts that an earlier run finished, and cut off an incomplete last line.

    A hidden file beside the output records its origin.

    Raises:
        InputError: If the file is no output of this model for this input: appending would mix two sets of predictions.
    """
    note = output.with_name(f".{output.name}.origin")
    if not output.is_file() or not output.stat().st_size:
        note.write_text(json.dumps(origin), encoding="utf-8")
        return 0
    if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != origin:
        raise InputError(
            f"{output} does not belong to this model and {origin['input']}: give another --output, or --overwrite."
        )
    done, end = 0, 0
    with output.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                json.loads(line)["id"]
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{output} is not a file of predictions: give another --output.") from error
            done, end = done + 1, end + len(line)
        file.truncate(end)
    return done


def predict_file(
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    source: Path,
    output: Path,
    *,
    max_samples: int | None = None,
    batch_size: int = 32,
    num_workers: int = 1,
    bf16: bool = False,
    overwrite: bool = False,
) -> None:
    """Predict every post of a file or folder, line by line into a file, and continue an interrupted run.

    Args:
        model: Model in evaluation mode, on the device to compute on.
        processor: Its processor.
        source: See `read_rows`.
        output: File of JSON lines; see `prediction_line`. A post that cannot be read gets {id, error}.
        max_samples: Predict only the first posts.
        batch_size: Posts per forward pass.
        num_workers: Processes that prepare posts; 0 prepares them in this one.
        bf16: Compute in bfloat16 where PyTorch's autocast allows it.
        overwrite: Start again instead of continuing the output.

    Raises:
        InputError: If the input or the output cannot be used, or no post could be read.
    """
    if not source.exists():
        raise InputError(f"There is no {source}.")
    if output.exists() and output.samefile(source):
        raise InputError(f"{source} is both input and output: give another --output.")
    weights = model.classifier.weight.detach().float().cpu().numpy().tobytes()
    origin = {"input": str(source.resolve()), "model": hashlib.sha256(weights).hexdigest()}
    with as_input_error(f"{output} cannot be written", OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            output.unlink(missing_ok=True)
        done = lines_done(output, origin | ({"bf16": True} if bf16 else {}))
        file = output.open("a", encoding="utf-8", errors="backslashreplace")
    batches = PreparedBatches(source, done, max_samples, batch_size, PostCollator(processor, model.config))
    failed, total = 0, 0
    with file, tqdm(initial=done, unit=" posts") as bar:
        for rows, inputs in DataLoader(batches, batch_size=None, num_workers=num_workers):
            for line in predict_rows(model, rows, inputs, bf16):
                write_line(file, line)
                failed, total = failed + ("error" in line), total + 1
            file.flush()
            bar.update(len(rows))
    if failed and failed == done + total:
        raise InputError(f"None of {total} posts could be read; their lines in {output} say why.")
    if failed:
        logger.warning("%d of %d posts could not be read; their lines in %s say why", failed, total, output)
