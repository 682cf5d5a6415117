"""The sections of `benchmark.py`: each runs alternatives in turn and returns figures."""

from collections.abc import Callable

from benchmarks.data import cache, pictures, prediction
from benchmarks.growth import growth, memory_of_prediction, processes
from benchmarks.model import fusion, memory, modes, onnx, padding
from benchmarks.setting import Figure, Setting

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
