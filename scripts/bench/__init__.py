"""The sections of `benchmark.py`: each runs alternatives in turn and returns figures."""

from collections.abc import Callable

from clipcacg.scripts.bench.data import cache, pictures, prediction
from clipcacg.scripts.bench.growth import growth, memory_of_prediction, processes
from clipcacg.scripts.bench.model import fusion, memory, modes, onnx, padding
from clipcacg.scripts.bench.setting import Figure, Setting

SECTIONS: dict[str, Callable[[Setting], dict[str, Figure]]] = {
    "fusion": fusion,
    "memory": memory,
    "padding": padding,
    "cache": cache,
    "pictures": pictures,
    "prediction": prediction,
    "modes": modes,
    "onnx": onnx,
    "growth": growth,
    "memory_of_prediction": memory_of_prediction,
    "processes": processes,
}
