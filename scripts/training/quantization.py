"""Text towers in 8 bits, and a comparison of two models on the same batches."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TorchAoConfig

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.reporting.predictions import checkpoint_config, load_checkpoint
from clipcacg.scripts.training.metrics import load_metric, score

# The config of the checkpoint keeps this regular expression: it matches every module outside the two text towers.
NOT_A_TEXT_TOWER = r"(?!.*\b(text_branch\.backbone|interaction\.clip_text)\.).*"


def quantize(checkpoint: str, trust_remote_code: bool = False) -> ClipCaCgForSequenceClassification:
    """Load a checkpoint with the Linear layers of its text encoder and of CLIP's text tower in 8 bits.

    Args:
        checkpoint: Folder or Hub name.
        trust_remote_code: See `load_checkpoint`.

    Raises:
        InputError: If the model reads no text, or the extra `quantize` is not installed.
    """
    if "text" not in checkpoint_config(checkpoint).modalities:
        raise InputError(f"{checkpoint} reads no text: there is nothing to quantize.")
    with as_input_error("Install the extra: pip install 'clipcacg[quantize]'", ImportError):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    settings = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=[NOT_A_TEXT_TOWER])
    model, _ = load_checkpoint(checkpoint, trust_remote_code, dtype=torch.float32, quantization_config=settings)
    return model


@torch.inference_mode()
def compare(
    models: dict[str, ClipCaCgForSequenceClassification], batches: DataLoader
) -> dict[str, tuple[Tensor, float]]:
    """Run all batches through each model; the models take turns, so that other load on the machine affects all alike.

    Returns:
        Name of the model to its logits (posts, labels) and its time in seconds.
    """
    logits, seconds = {name: [] for name in models}, dict.fromkeys(models, 0.0)
    for number, batch in enumerate(batches):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if number == 0:
            for model in models.values():
                model(**inputs)  # warm-up
        for name, model in models.items():
            start = time.perf_counter()
            logits[name].append(model(**inputs).logits)
            seconds[name] += time.perf_counter() - start
    return {name: (torch.cat(logits[name]), seconds[name]) for name in models}


def summary(results: dict[str, tuple[Tensor, float]], labels: Any, config: ClipCaCgConfig) -> str:
    """One line per model: its main scores and the time."""
    metric, names, lines = load_metric(config.task), None if config.task == "regression" else config.label_names, []
    for name, (logits, seconds) in results.items():
        scores = score(logits.numpy(), labels, metric, names, config)
        shown = ", ".join(f"{key} {scores[key]:.4f}" for key in ("accuracy", "f1", "f1_micro", "mse") if key in scores)
        lines.append(f"{name:>8}: {shown}, {1000 * seconds / len(labels):.2f} ms per post")
    before, after = (seconds for _, seconds in results.values())
    return "\n".join([*lines, f"{before / after:.2f} times as fast on {torch.get_num_threads()} CPU thread(s)"])
