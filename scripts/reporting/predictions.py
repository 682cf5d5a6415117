"""Predict the sentiment of posts.

    python scripts/predict.py CHECKPOINT --image picture.jpg --text "What a lovely morning!"
    python scripts/predict.py CHECKPOINT --input posts.csv --output predictions.jsonl

The input is a `.csv` or `.jsonl` file with the columns id, text and image (paths relative to the file), or a folder in
the layout of MVSA. The output has one JSON line a post, in the order of the input: id, label and probabilities. A post
that cannot be read gets a line with its id and an error instead. Called again with the same output, a run that was
broken off goes on where it stopped.
"""

import csv
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import HfArgumentParser

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.images import locate_image
from clipcacg.scripts.data.loading import one_sentence
from clipcacg.scripts.data.mvsa import read_text

logger = logging.getLogger(__name__)


@dataclass
class PredictionArguments:
    """What to predict, and where to."""

    image: str | None = field(default=None, metadata={"help": "Path or URL of one picture."})
    text: str | None = field(default=None, metadata={"help": "One text."})
    input: str | None = field(default=None, metadata={"help": "Or: a .csv or .jsonl file, or a folder like MVSA's."})
    output: str = field(default="predictions.jsonl", metadata={"help": "JSON lines, for --input."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew instead of going on with the output."})
    max_samples: int | None = field(default=None, metadata={"help": "Predict the first so many posts only."})
    batch_size: int = field(default=32, metadata={"help": "Posts at a time."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 where PyTorch deems it safe: faster."})
    num_workers: int = field(default=1, metadata={"help": "Processes that prepare posts; 0: none beside this one."})

    def __post_init__(self) -> None:
        if (self.input is None) == (self.image is None and self.text is None):
            raise ValueError("Give one post with --image and --text, or many with --input.")


def read_rows(source: Path) -> Iterator[dict[str, Any]]:
    """The posts of a file or folder one by one, however many there are: id, and text and image or else an error.

    Raises:
        ValueError: If the source is neither a folder of posts nor a .csv or .jsonl file.
    """
    if source.is_dir():
        yield from read_folder(source / "data" if (source / "data").is_dir() else source)
    elif source.suffix == ".csv":
        yield from read_csv(source)
    elif source.suffix == ".jsonl":
        with source.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield as_post(json.loads(line), number, source.parent)
                except (AttributeError, RecursionError, ValueError) as error:
                    yield {"id": str(number), "error": f"line {number} is not a JSON object: {error}"}
    else:
        raise ValueError(f"{source} is neither a folder nor a .csv or .jsonl file.")


def read_csv(source: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table; strictly, or a quote that is not closed would swallow those below it unnoticed."""
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


def read_folder(folder: Path) -> Iterator[dict[str, Any]]:
    """The posts <ID>.jpg and <ID>.txt of a folder, by ID.

    Raises:
        ValueError: If there are none.
    """
    ids = {path.stem for path in folder.iterdir() if path.suffix in (".jpg", ".txt")}
    if not ids:
        raise ValueError(f"{folder} holds neither <ID>.jpg nor <ID>.txt.")
    for post_id in sorted(ids, key=lambda post_id: (len(post_id), post_id)):
        try:
            yield {
                "id": post_id,
                "text": read_text(folder / f"{post_id}.txt"),
                "image": str(folder / f"{post_id}.jpg"),
            }
        except InputError as error:
            yield {"id": post_id, "error": str(error)}


def as_post(row: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """What we read of a row, whatever else it holds; a row without an ID is called by its number."""
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
    """Batches of rows and the model inputs of the good ones, made by one worker process or several.

    Worker k of n makes every n-th batch, and the loader takes from the workers in turn: the order stays.
    """

    source: Path
    start: int
    stop: int | None
    batch_size: int
    collator: PostCollator

    def __iter__(self) -> Iterator[tuple[list[dict[str, Any]], dict[str, torch.Tensor] | None]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = islice(read_rows(self.source), self.start, self.stop)
        turn = 0
        while batch := list(islice(rows, self.batch_size)):
            if turn % workers == number:
                yield prepare(batch, self.collator)
            turn += 1


def prepare(
    rows: list[dict[str, Any]], collator: PostCollator
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor] | None]:
    """Make the inputs of the good rows, and give each bad one an error; only a batch that fails is looked at singly.

    Returns:
        The rows, and the inputs of those without an error, in their order; None if there is no such row.
    """
    for row in rows:
        if "error" not in row:
            row |= missing_part(row, collator.config.modality)
    good = [row for row in rows if "error" not in row]
    try:
        return rows, collator(good) if good else None
    except (OSError, TypeError, ValueError):
        for row in good:
            row |= unreadable(row, collator)
        good = [row for row in good if "error" not in row]
        return rows, collator(good) if good else None


def missing_part(row: dict[str, Any], modality: str) -> dict[str, str]:
    needed = {"both": ("text", "image"), "text": ("text",), "image": ("image",)}[modality]
    missing = [name for name in needed if not isinstance(row.get(name), str)]
    return {"error": f"the model needs {' and '.join(missing)}, which this post does not have"} if missing else {}


def unreadable(row: dict[str, Any], collator: PostCollator) -> dict[str, str]:
    try:
        collator([row])
    except (OSError, TypeError, ValueError) as error:
        return {"error": str(error)}
    return {}


def lines_done(output: Path) -> int:
    """How many posts an earlier run finished; a last line that was broken off is cut away.

    Raises:
        ValueError: If the file holds anything but lines of ours.
    """
    done, end = 0, 0
    with output.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                json.loads(line)["id"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{output} is not a file of predictions: name another --output.") from error
            done, end = done + 1, end + len(line)
        file.truncate(end)
    return done


def check_origin(output: Path, origin: dict[str, str]) -> int:
    """The number of posts that are done, if the output comes from this model and this input.

    A hidden file beside the output tells where it comes from.

    Raises:
        ValueError: If it comes from others, so that going on would mix two sets of predictions.
    """
    note = output.with_name(f".{output.name}.origin")
    if output.is_file() and output.stat().st_size:
        if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != origin:
            raise ValueError(
                f"{output} does not belong to this model and {origin['input']}: name another --output, or --overwrite."
            )
        return lines_done(output)
    note.write_text(json.dumps(origin), encoding="utf-8")
    return 0


@torch.inference_mode()
def predict_rows(
    model: ClipCaCgForSequenceClassification,
    rows: list[dict[str, Any]],
    inputs: dict[str, torch.Tensor] | None,
    bf16: bool = False,
) -> list[dict[str, Any]]:
    """One line a row: its prediction or its error."""
    scores = iter(())
    if inputs is not None:
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            scores = iter(model(**inputs).logits.float().cpu())
    return [
        {"id": str(row["id"]), "error": row["error"]}
        if "error" in row
        else prediction_line(str(row["id"]), next(scores), model.config)
        for row in rows
    ]


def predict_file(
    model: ClipCaCgForSequenceClassification, processor: ClipCaCgProcessor, arguments: PredictionArguments
) -> None:
    """Predict every post of `--input`, line by line into `--output`, and tell how many could not be read.

    Raises:
        FileNotFoundError, ValueError: If input or output cannot be used, or no post at all could be read.
    """
    source, output = Path(arguments.input), Path(arguments.output)
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and output.samefile(source):
        raise ValueError(f"{source} is both input and output: name another --output.")
    if arguments.overwrite:
        output.unlink(missing_ok=True)
    weights = model.classifier.weight.detach().float().cpu().numpy().tobytes()
    origin = {"input": str(source.resolve()), "model": hashlib.sha256(weights).hexdigest()}
    done = check_origin(output, origin | ({"bf16": True} if arguments.bf16 else {}))
    collator = PostCollator(processor, model.config)
    batches = PreparedBatches(source, done, arguments.max_samples, arguments.batch_size, collator)
    loader = DataLoader(batches, batch_size=None, num_workers=arguments.num_workers)
    with (
        output.open("a", encoding="utf-8", errors="backslashreplace") as file,
        tqdm(initial=done, unit=" posts") as bar,
    ):
        failed, total = 0, 0
        for rows, inputs in loader:
            for line in predict_rows(model, rows, inputs, arguments.bf16):
                write_line(file, line)
                failed, total = failed + ("error" in line), total + 1
            file.flush()
            bar.update(len(rows))
    if failed and failed == done + total:
        raise ValueError(f"none of {total} posts could be read; their lines in {output} say why.")
    if failed:
        logger.warning("%d of %d posts could not be read; their lines in %s say why", failed, total, output)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(PredictionArguments, description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    with one_sentence():
        arguments, rest = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
        model = ClipCaCgForSequenceClassification.from_pretrained(rest.checkpoint).to(PartialState().device).eval()
        model.to(memory_format=torch.channels_last)  # the vision encoder's convolutions are faster so
        processor = ClipCaCgProcessor.from_pretrained(rest.checkpoint)
        if arguments.input:
            predict_file(model, processor, arguments)
            return
    row = {"id": arguments.image or "text", "text": arguments.text, "image": arguments.image}
    rows, inputs = prepare([row], PostCollator(processor, model.config))
    line = predict_rows(model, rows, inputs, arguments.bf16)[0]
    if "error" in line:
        sys.exit(f"predict.py: {line['error']}")
    write_line(sys.stdout, line)


if __name__ == "__main__":
    main()
