"""Predict posts: one at a time, a source line by line into a file, or its shards by several processes."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, TextIO

import datasets
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from clipcacg.configuration_clipcacg import ClipCaCgConfig, did_you_mean
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor, missing_parts, modality_scores
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError, as_input_error, set_up_logging
from clipcacg.scripts.data.faults import ALLOWED_SHARE, advice, kind_of
from clipcacg.scripts.data.lines import origin_note, remove_parts, whole_file
from clipcacg.scripts.data.loading import ColumnArguments, load_shards, load_to_predict
from clipcacg.scripts.data.progress import Progress
from clipcacg.scripts.data.sources import batches_of_rows, reading

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

Row = dict[str, Any]
Inputs = dict[str, torch.Tensor]


def checkpoint_config(checkpoint: str) -> ClipCaCgConfig:
    """Load the config of a CLIP-CA-CG checkpoint.

    Raises:
        InputError: If it cannot be loaded, or belongs to another kind of model.
    """
    check_folder(checkpoint)
    with as_input_error(f"The checkpoint {checkpoint} cannot be loaded", OSError, ValueError):
        check_model_type(PreTrainedConfig.get_config_dict(checkpoint)[0])
        return ClipCaCgConfig.from_pretrained(checkpoint)


def check_folder(checkpoint: str) -> None:
    """Raise an InputError if the name of a checkpoint is that of a folder, and no checkpoint is there.

    Elsewhere the Hub would be asked for it.
    """
    folder, name = Path(checkpoint).expanduser(), str(checkpoint)
    if (folder / "config.json").is_file():
        return
    if folder.is_dir():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f" Its folders {', '.join(inside)} are checkpoints." if inside else ""
        raise InputError(f"{checkpoint} is no checkpoint: it has no config.json.{hint}")
    beside = [path.name for path in folder.parent.glob("*/")] if folder.parent.is_dir() else []
    hint = did_you_mean(folder.name, beside)
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or hint:
        raise InputError(f"There is no checkpoint {checkpoint}.{hint}")


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
    check_folder(checkpoint)
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
        model = model_class.from_pretrained(checkpoint, **kwargs).eval()
        # False, and not None, with which transformers would ask at the terminal.
        processor = processor_class.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    return model, processor


def prediction_line(
    post_id: str,
    logits: torch.Tensor,
    config: ClipCaCgConfig,
    modalities: dict[str, Any] | None = None,
    min_confidence: float | None = None,
) -> dict[str, Any]:
    """The line that is written for one post.

    Args:
        post_id: The post's ID.
        logits: (labels,), the model's output for the post.
        config: Config of the model.
        modalities: What `modality_scores` returns for the post, of a model with modality heads.
        min_confidence: Probability below which the label is "uncertain".

    Returns:
        {id, label, probabilities}; {id, labels, probabilities} for several labels; {id, value} for a regression.
        `modalities` adds text and image, each {label, probabilities} or None, and conflict.
    """
    answer = ClipCaCgProcessor.post_process(logits[None], config, min_confidence)[0]
    if "value" in answer:
        return {"id": post_id, "value": round(answer["value"], 6)}
    scores = rounded(answer.pop("scores"))
    line = {"id": post_id, **answer, "probabilities": scores}
    if modalities is not None:
        for side in ("text", "image"):
            own = modalities[side]
            line[side] = own and {"label": max(own, key=own.get), "probabilities": rounded(own)}
        conflict = modalities["conflict"]
        line["conflict"] = None if conflict is None else round(conflict, 6)
    return line


def rounded(scores: dict[str, float]) -> dict[str, float]:
    """The probabilities with six digits behind the point."""
    return {label: round(score, 6) for label, score in scores.items()}


def write_line(file: TextIO, line: dict[str, Any]) -> None:
    """Write one JSON line."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def prepare(rows: list[Row], collator: PostCollator) -> tuple[list[Row], Inputs | None]:
    """Make the model inputs of the readable rows.

    Rows are tried one by one only after the batch failed, which keeps the usual case fast.

    Returns:
        {id, error} of each row, where the error of a readable one is None; and the inputs of those, in their order,
        or None if there are none.
    """
    found = []
    for row in rows:
        missing = missing_parts(row, collator.config)
        fault = f"it has no {' and no '.join(missing)}, which the model needs" if missing else None
        found.append({"id": str(row["id"]), "error": row.get("error") or fault})
    good = [(row, line) for row, line in zip(rows, found, strict=True) if not line["error"]]
    try:
        return found, collator([row for row, _ in good]) if good else None
    except InputError:
        bad = collator.faults([row for row, _ in good])
        for index, reason in bad.items():
            good[index][1]["error"] = reason
        rest = [row for index, (row, _) in enumerate(good) if index not in bad]
        return found, collator(rest) if rest else None


@torch.inference_mode()
def predict_rows(
    model: ClipCaCgForSequenceClassification,
    rows: list[Row],
    inputs: Inputs | None,
    bf16: bool = False,
    min_confidence: float | None = None,
) -> list[Row]:
    """Predict what `prepare` returned: one line per row, with its prediction or its error."""
    found: Iterator[tuple[torch.Tensor, Any]] = iter(())
    if inputs is not None:
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            outputs = model(**inputs)
        every = outputs.logits.float().cpu()
        has_heads = model.config.use_modality_heads
        found = zip(every, modality_scores(outputs, model.config) if has_heads else repeat(None), strict=False)
    lines = []
    for row in rows:
        if not row["error"]:
            logits, modalities = next(found)
            row = prediction_line(row["id"], logits, model.config, modalities, min_confidence)
        lines.append(row)
    return lines


def lines_done(output: Path, origin: dict[str, Any]) -> tuple[int, Counter[str], str | None]:
    """Count the posts that an earlier run finished, and their errors by kind; cut off an incomplete last line.

    A hidden file beside the output records its origin.

    Returns:
        The two, and the ID of the last of these posts.

    Raises:
        InputError: If the file is no output of this model for this input: appending would mix two sets of predictions.
    """
    is_new = not output.is_file() or not output.stat().st_size
    check_origin(output, origin, is_new)
    if is_new:
        return 0, Counter(), None
    done, end, errors, last = 0, 0, Counter[str](), None
    with output.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)
                last = found["id"]
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{output} is not a file of predictions: give another --output.") from error
            errors.update(faults_of(found))
            done, end = done + 1, end + len(line)
        file.truncate(end)
    return done, errors, last


def check_origin(output: Path, origin: dict[str, Any], is_new: bool) -> None:
    """Record what the predictions of a file or folder are of, or compare that with the record of an earlier run.

    Raises:
        InputError: If the predictions are not of this origin.
    """
    note = origin_note(output)
    if is_new:
        with whole_file(note) as file:
            json.dump(origin, file)
    elif not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != origin:
        hint = "" if output.is_dir() else ", or --overwrite"
        raise InputError(f"{output} does not belong to this model and {origin['input']}: give another --output{hint}.")


def predict_file(
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    source: str,
    output: Path,
    *,
    columns: ColumnArguments | None = None,
    split: str = "test",
    max_samples: int | None = None,
    batch_size: int = 32,
    num_workers: int = 1,
    bf16: bool = False,
    min_confidence: float | None = None,
    overwrite: bool = False,
) -> None:
    """Predict every post of a source, line by line into a file, and continue an interrupted run.

    Args:
        model: Model in evaluation mode, on the device to compute on, or an `OnnxModel`.
        processor: Its processor.
        source: See `load_to_predict`.
        output: File of JSON lines; see `prediction_line`. A post that cannot be read gets {id, error}.
        columns: Says which columns to read, and with `on_error="raise"` to stop at the first post that cannot be read.
        split: Which split, of a source that has several.
        max_samples: Predict only the first posts.
        batch_size: Posts per forward pass.
        num_workers: Processes that prepare posts; 0 prepares them in this one.
        bf16: Compute in bfloat16 where PyTorch's autocast allows it.
        min_confidence: Probability below which a label is "uncertain".
        overwrite: Start again instead of continuing the output.

    Raises:
        InputError: If the input or the output cannot be used, or more than a tenth of the posts could not be read.
    """
    columns = columns or ColumnArguments(on_error="skip")
    path = Path(source).expanduser()
    if path.exists() and output.exists() and output.samefile(path):
        raise InputError(f"{source} is both input and output: give another --output.")
    posts = load_to_predict(columns, source, split, model.config)
    told = origin(model, source, columns) | {"split": split, "bf16": bf16, "min_confidence": min_confidence}
    with as_input_error(f"{output} cannot be written", OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            output.unlink(missing_ok=True)
        done, errors, last = lines_done(output, told)
        now = next((str(post["id"]) for post in one_of(posts, done - 1)), "missing") if done else last
        if now != last:
            raise InputError(
                f"{source} has changed: row {done} is {now}, and in {output} it is {last}. Give another --output, or "
                "--overwrite."
            )
        file = output.open("a", encoding="utf-8", errors="backslashreplace")
    rest, total = remaining(posts, done, max_samples)
    batches = predict_batches(model, processor, rest, source, columns, batch_size, num_workers, bf16, min_confidence)
    written = done
    with file, Progress(total, "predicting", initial=done) as bar:
        for lines in batches:
            for line in lines:
                write_line(file, line)
                errors.update(faults_of(line))
            written += len(lines)
            file.flush()
            bar.update(len(lines))
    report_errors(errors, written, output)


def predict_batches(
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    posts: Any,
    source: str,
    columns: ColumnArguments,
    batch_size: int,
    num_workers: int,
    bf16: bool,
    min_confidence: float | None,
) -> Iterator[list[Row]]:
    """Yield the lines of one batch of posts after another; see `predict_file`."""
    make = partial(prepare, collator=PostCollator(processor, model.config))
    loader: DataLoader[Any]
    if isinstance(posts, datasets.Dataset):
        loader = DataLoader(posts, batch_size=batch_size, num_workers=num_workers, collate_fn=make)
    else:
        batches = StreamBatches(posts, batch_size, make)
        loader = DataLoader(batches, batch_size=None, num_workers=num_workers, collate_fn=unchanged)
    for rows, inputs in read_batches(loader, source):
        lines = predict_rows(model, rows, inputs, bf16, min_confidence)
        bad = next((line for line in lines if "error" in line), None)
        if bad and columns.on_error == "raise":
            yield lines[: lines.index(bad)]
            raise InputError(f"{source}, post {bad['id']}: {bad['error']}")
        yield lines


class StreamBatches(IterableDataset):
    """The batches of a stream in their order, prepared by several processes.

    Each process reads the whole stream, which is cheap because images stay undecoded, and prepares its share: process
    k of n the batches k, k + n, ..., which is the order in which a `DataLoader` asks them.

    Args:
        posts: The stream.
        batch_size: Posts in a batch.
        make: Makes a batch of its rows.
    """

    def __init__(self, posts: datasets.IterableDataset, batch_size: int, make: Callable[[list[Row]], Any]) -> None:
        self.posts, self.batch_size, self.make = posts, batch_size, make

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        own, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index, rows in enumerate(batches_of_rows(self.posts, self.batch_size)):
            if index % count == own:
                yield self.make(rows)


def unchanged(batch: Any) -> Any:
    """A batch that is prepared already."""
    return batch


def read_batches(loader: DataLoader, source: str) -> Iterator[tuple[list[Row], Inputs | None]]:
    """Yield the batches; a stream may turn out to be faulty in the middle."""
    with reading(source):
        yield from loader


def report_errors(errors: Counter[str], written: int, output: Path) -> None:
    """Say how many posts were predicted and how many could not be read.

    Raises:
        InputError: If those are more than a tenth.
    """
    if errors:
        fault = f"{errors.total()} of {written} posts could not be read; their lines in {output} say why"
        if errors.total() > ALLOWED_SHARE * written:
            raise InputError(f"{fault}. That is more than a tenth: {advice(errors.elements())}.")
        logger.warning(fault)
    logger.info("%d predictions are in %s", written - errors.total(), output)


def predict_shards(
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    source: str,
    folder: Path,
    *,
    columns: ColumnArguments,
    split: str = "test",
    batch_size: int = 32,
    num_workers: int = 1,
    bf16: bool = False,
    min_confidence: float | None = None,
) -> None:
    """Predict this process's share of the shards of a source, each into a file of its own.

    No process waits for another. A file appears when it is whole and is not computed again, so a later call, of any
    number of processes, continues. The last process writes `manifest.json`: the counts of posts and errors and the
    SHA-256 of each file, their sums, and what the predictions are of.

    Args:
        folder: Folder of files of JSON lines, each with the name of its shard.
        model, processor, source, columns, split, batch_size, num_workers, bf16, min_confidence: As in `predict_file`.

    Raises:
        InputError: If the input or the output cannot be used, or more than a tenth of the posts could not be read.
    """
    state, path = PartialState(), Path(source).expanduser()
    if path.exists() and folder.resolve() == (path if path.is_dir() else path.parent).resolve():
        raise InputError(f"{folder} is both input and output: give another --output.")
    shards, content = load_shards(columns, source, split, model.config)
    told = origin(model, source, columns) | {"split": split, "bf16": bf16, "min_confidence": min_confidence}
    told["content"] = content
    outputs = {folder / f"{name}.jsonl": posts for name, posts in shards.items()}
    with as_input_error(f"{folder} cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        found = set(folder.glob("*.jsonl"))
        check_origin(folder, told, is_new=not found and not origin_note(folder).exists())
    if others := found - outputs.keys():
        raise InputError(f"{min(others)} is of no shard of {source}: remove it, or give another --output.")
    if found < outputs.keys():
        (folder / MANIFEST).unlink(missing_ok=True)
    logger.info("%d of %d shards are done", len(found), len(outputs))
    if len(outputs) < state.num_processes:
        logger.warning("%s has %d shards: the other processes have nothing to do", source, len(outputs))
    with Progress(None, "predicting", disable=not state.is_main_process) as bar:
        for output, posts in list(outputs.items())[state.process_index :: state.num_processes]:
            if output.exists():
                continue
            batches = predict_batches(
                model, processor, posts, source, columns, batch_size, num_workers, bf16, min_confidence
            )
            with whole_file(output) as file:
                for lines in batches:
                    for line in lines:
                        write_line(file, line)
                    bar.update(len(lines))
    if all(output.exists() for output in outputs):
        set_up_logging()  # the last process reports, whichever it is
        write_manifest(folder, list(outputs), told)


def write_manifest(folder: Path, outputs: list[Path], origin: dict[str, Any]) -> None:
    """Count the lines of all files and write `manifest.json`; see `predict_shards`."""
    shards, errors = {}, Counter[str]()
    for output in outputs:
        digest, posts, bad = hashlib.sha256(), 0, Counter[str]()
        with output.open("rb") as file:
            for line in file:
                digest.update(line)
                posts += 1
                if b', "error": ' in line:  # within a string the quotes are escaped
                    bad.update(faults_of(json.loads(line)))
        shards[output.name] = {"posts": posts, "errors": bad.total(), "sha256": digest.hexdigest()}
        errors += bad
    written = sum(shard["posts"] for shard in shards.values())
    every = "".join(shard["sha256"] for shard in shards.values())
    sums = {"posts": written, "errors": errors.total(), "sha256": hashlib.sha256(every.encode()).hexdigest()}
    with whole_file(folder / MANIFEST) as file:
        json.dump(origin | sums | {"shards": shards}, file, indent=1)
    remove_parts(folder)
    report_errors(errors, written, folder)


def faults_of(line: dict[str, Any]) -> list[str]:
    """The kind of the error of a line of predictions, if it has one."""
    return [kind_of(line["error"])] if "error" in line else []


def origin(model: ClipCaCgForSequenceClassification, source: str, columns: ColumnArguments) -> dict[str, Any]:
    """What tells the predictions of this model for this source from others."""
    path = Path(source).expanduser()
    return {
        "input": str(path.resolve()) if path.exists() else source,
        "model": fingerprint(model),
        "temperature": model.config.temperature,
        "modalities": model.config.use_modality_heads,  # whose keys each line then has
        "columns": [columns.text_column, columns.image_column],
        "config": columns.dataset_config,
        "splits": columns.own_splits(),
    }


def fingerprint(model: ClipCaCgForSequenceClassification) -> str:
    """A digest of the model's weights, and of what turns their logits into answers."""
    if isinstance(found := getattr(model, "fingerprint", None), str):  # an OnnxModel
        return found
    config = model.config
    facts = [config.label_names, config.problem_type, config.label_thresholds, config.modality_combination]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, weights in sorted(model.state_dict().items()):
        plain = weights if type(weights) is torch.Tensor else weights.dequantize()  # in 8 bits
        digest.update(name.encode())
        digest.update(plain.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def one_of(posts: Any, index: int) -> Any:
    """The post of an index as a source of one post, or of none behind the last one."""
    if isinstance(posts, datasets.Dataset):
        return posts.select(range(index, min(index + 1, len(posts))))
    return posts.skip(index).take(1)


def remaining(posts: Any, done: int, limit: int | None) -> tuple[Any, int | None]:
    """The posts that an earlier run has not finished, and how many posts there are with those that it has.

    Args:
        posts: A data set, or a stream, of unknown length.
        done: Posts that it has finished.
        limit: Take only the first posts.
    """
    if isinstance(posts, datasets.Dataset):
        total = len(posts) if limit is None else min(len(posts), limit)
        return posts.select(range(done, total) if done < total else []), total
    rest = posts.skip(done)
    return rest if limit is None else rest.take(max(limit - done, 0)), limit
