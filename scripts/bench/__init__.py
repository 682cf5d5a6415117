"""The sections of `benchmark.py`. Each times alternatives in turn and returns its figures by name."""

from collections.abc import Callable
from functools import partial

from clipcacg.scripts.bench.comparison import alternatives
from clipcacg.scripts.bench.data import cache, images, prediction
from clipcacg.scripts.bench.model import fusion, memory, padding, sharing
from clipcacg.scripts.bench.setting import Figure, Setting

SECTIONS: dict[str, Callable[[Setting], dict[str, Figure]]] = {
    "fusion": fusion,
    "fusion_bf16": partial(fusion, numbers="bf16"),
    "fusion_bf16_compiled": partial(fusion, numbers="bf16", compiled=True),
    "memory": memory,
    "sharing": sharing,
    "padding": padding,
    "cache": cache,
    "images": images,
    "prediction": prediction,
    "alternatives": alternatives,
}
