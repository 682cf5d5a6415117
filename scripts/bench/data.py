"""What the data path costs: images, the feature cache, and prediction from a file of posts."""

import json
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.bench.model import train_step
from clipcacg.scripts.bench.setting import (
    Figure,
    Setting,
    in_turn,
    make_model,
    make_posts,
    make_processor,
    rate,
    ratio,
    seconds,
)
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.features import cache_features
from clipcacg.scripts.data.loading import DataArguments, load_posts
from clipcacg.scripts.reporting.predictions import predict_file
from clipcacg.scripts.training.arguments import RecipeArguments
from clipcacg.scripts.training.run import make_trainer


def cache(setting: Setting) -> dict[str, Figure]:
    """An epoch with frozen backbones: without the feature cache, with it, and on tensors in memory.

    The first two run in the Trainer with its data loader, the third is the training steps alone.
    """
    model, processor = make_model(setting), make_processor(setting)
    model.freeze_backbones(text=True, vision=True, clip=True)
    count = max(2 * setting.num_posts // setting.batch_size, 1) * setting.batch_size
    plain = datasets.DatasetDict(train=make_posts(setting, count))
    folder = setting.folder / "features"
    cached, stores = cache_features(model, processor, plain, "float16", folder, setting.device)
    size = sum(store[digest].nbytes for store, digest in every_feature(cached, stores)) / count
    arguments = RecipeArguments(
        output_dir=str(setting.folder / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=setting.batch_size,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def epoch(posts: datasets.DatasetDict, features: dict[str, Any] | None) -> None:
        trainer = make_trainer(arguments, model, processor, posts, features)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    collator = PostCollator(processor, model.config, stores)
    batches = [collator(rows) for rows in batches_of(list(cached["train"]), setting.batch_size)]
    batches = [{name: value.to(setting.device) for name, value in batch.items()} for batch in batches]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def in_memory() -> None:
        for batch in batches:
            train_step(model.train(), optimizer, batch)

    times = in_turn(
        min(setting.repeats, 3),
        without=partial(epoch, plain, None),
        cached=partial(epoch, cached, stores),
        memory=in_memory,
    )
    return {
        "cache_epoch_speedup": ratio(times["without"], times["cached"], f"epoch of {count} posts, without / with"),
        "cache_over_memory": ratio(times["cached"], times["memory"], "epoch from the cache / the head on tensors"),
        "cache_bytes_per_post": Figure(size, "bytes a post in float16, all backbones"),
    }


def every_feature(posts: datasets.DatasetDict, stores: dict[str, Any]) -> list[tuple[Any, str]]:
    columns = {name: "text_digest" if name.endswith("text") else "image_digest" for name in stores}
    return [(store, digest) for name, store in stores.items() for digest in posts["train"][columns[name]]]


def batches_of(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def images(setting: Setting) -> dict[str, Figure]:
    """Our processor against two stock image processors that each open the files, and the share of time spent waiting.

    The images are photographs of 600 x 400, and of 2400 x 1600, which our processor decodes at half size.
    """
    processor = make_processor(setting)
    small = [value["path"] for value in make_posts(setting, 64)["image"]]
    large = [str(setting.folder / f"large{number}.jpg") for number in range(8)]
    for source, path in zip(small, large, strict=False):
        with Image.open(source) as image:
            Image.fromarray(np.tile(np.asarray(image), (4, 4, 1))).save(path, quality=85)

    def stock(paths: list[str]) -> None:
        for part in (processor.image_processor, processor.clip_image_processor):
            for batch in batches_of(paths, 32):
                part([Image.open(path).convert("RGB") for path in batch], return_tensors="pt")

    def ours(paths: list[str]) -> None:
        for batch in batches_of(paths, 32):
            processor(images=batch, return_tensors="pt")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker of the data loader
    try:
        times = in_turn(setting.repeats, stock=partial(stock, small), ours=partial(ours, small))
        big = in_turn(setting.repeats, stock=partial(stock, large), ours=partial(ours, large))
    finally:
        torch.set_num_threads(threads)
    per_second = len(small) / min(times["ours"])
    return {
        "processor_speedup": ratio(times["stock"], times["ours"], f"two stock processors / ours ({per_second:.0f}/s)"),
        "processor_speedup_large": ratio(big["stock"], big["ours"], "likewise, photographs of 2400 x 1600"),
        "data_wait_share": data_wait(setting, processor),
    }


def data_wait(setting: Setting, processor: ClipCaCgProcessor) -> Figure:
    """Share of a training epoch spent waiting for a batch, with two workers as in our recipes."""
    model = make_model(setting).train()
    model.freeze_backbones(text=True, vision=True, clip=True)  # the fastest step needs the most images per second
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    posts = make_posts(setting, 16 * setting.batch_size)
    loader = DataLoader(
        posts, batch_size=setting.batch_size, num_workers=2, collate_fn=PostCollator(processor, model.config)
    )
    waiting, start, batches = 0.0, perf_counter(), iter(loader)
    for _ in range(5):  # the workers start only once per epoch
        next(batches)
    start = perf_counter()
    while True:
        asked = perf_counter()
        batch = next(batches, None)
        waiting += perf_counter() - asked
        if batch is None:
            break
        batch = {name: value.to(setting.device) for name, value in batch.items()}
        seconds(partial(train_step, model, optimizer, batch))
    return Figure(waiting / (perf_counter() - start), "share of an epoch spent waiting for images, backbones frozen")


def prediction(setting: Setting) -> dict[str, Figure]:
    """`predict.py` from file to file against forward passes alone, at the fastest batch size."""
    model, processor = make_model(setting), make_processor(setting)
    posts = posts_to_predict(setting)
    source = write_posts(setting.folder / "posts.jsonl", posts)
    collator = PostCollator(processor, model.config)
    sizes = [size for size in (8, 16, 32, 64) if size <= len(posts)] or [len(posts)]

    def collated(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
        return [without_labels(collator(batch)) for batch in batches_of(rows, size)]

    def forward(batches: list[dict[str, Any]]) -> None:
        for batch in batches:
            model(**{name: value.to(setting.device) for name, value in batch.items()}).logits.cpu()

    with torch.inference_mode():
        trial = in_turn(1, **{str(size): partial(forward, collated(posts[:128], size)) for size in sizes})
        best = min(sizes, key=lambda size: trial[str(size)][0])
        output, options = setting.folder / "out.jsonl", {"overwrite": True, "batch_size": best}
        times = in_turn(
            min(setting.repeats, 3),
            forward=partial(forward, collated(posts, best)),
            predict=partial(predict_file, model, processor, str(source), output, **options),
        )
    how = f"{len(posts)} posts, batches of {best}"
    return {
        "predict_efficiency": ratio(times["forward"], times["predict"], f"forward passes alone / predict.py, {how}"),
        "predict_posts_per_second": rate(times["predict"], len(posts), f"posts per second, predict.py, {how}"),
    }


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.endswith("labels")}


def posts_to_predict(setting: Setting) -> list[dict[str, Any]]:
    if setting.data_dir is None:
        return list(make_posts(setting, setting.num_posts))
    arguments = DataArguments(data_dir=setting.data_dir, splits=None, max_eval_samples=setting.num_posts)
    return list(load_posts(arguments)["test"])


def write_posts(path: Path, posts: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for post in posts:
            row = {"id": post["id"], "text": post["text"], "image": post["image"]["path"]}
            file.write(json.dumps(row) + "\n")
    return path
