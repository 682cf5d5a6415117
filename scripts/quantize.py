"""Quantise a checkpoint's text towers to 8 bits for CPUs, and compare the two on labelled posts.

    python scripts/quantize.py CHECKPOINT -o FOLDER                     # compared on the drawn sample's test split
    python scripts/quantize.py CHECKPOINT -o FOLDER --data_dir MVSA_Single --splits clmlf

Needs the extra `quantize`. torchao rounds the weights of each Linear once and its inputs at each call. The GRU and the
convolutions stay as they are. The folder is a checkpoint that transformers reads where torchao is installed, for
`predict.py` and pipelines; the Trainer, and so `evaluate_checkpoint.py`, refuses quantised models.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, TorchAoConfig

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.loading import DataArguments, label_names, one_sentence
from clipcacg.scripts.training.evaluation import labelled_posts
from clipcacg.scripts.training.metrics import load_metric, score

# A module that is in neither of them, as a regular expression: the form in which a checkpoint keeps it.
NOT_A_TEXT_TOWER = r"(?!.*\b(text_branch\.backbone|interaction\.clip_text)\.).*"


@dataclass
class QuantizationArguments:
    """Where the quantised checkpoint goes, and how it is compared."""

    output: str = field(metadata={"aliases": ["-o"], "help": "Folder of the quantised checkpoint."})
    split: str = field(default="test", metadata={"help": "train, validation or test."})
    batch_size: int = field(default=32, metadata={"help": "Posts at a time."})


def quantize(checkpoint: str) -> ClipCaCgForSequenceClassification:
    """Load a checkpoint with the Linear layers of its text encoder and of CLIP's text tower in 8 bits.

    Raises:
        ValueError: If it reads no text.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig  # an optional extra

    settings = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=[NOT_A_TEXT_TOWER])
    model = ClipCaCgForSequenceClassification.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=settings
    )
    if "text" not in model.backbones():
        raise ValueError(f"{checkpoint} reads no text: there is nothing to quantise.")
    return model.eval()


@torch.inference_mode()
def compare(
    models: dict[str, ClipCaCgForSequenceClassification], batches: DataLoader
) -> dict[str, tuple[Tensor, float]]:
    """The logits of each model over all batches, and its seconds; the models take turns, so that all feel one load."""
    logits, seconds = {name: [] for name in models}, dict.fromkeys(models, 0.0)
    for number, batch in enumerate(batches):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if number == 0:
            for model in models.values():
                model(**inputs)  # what is set up at the first call is not counted
        for name, model in models.items():
            start = time.perf_counter()
            logits[name].append(model(**inputs).logits)
            seconds[name] += time.perf_counter() - start
    return {name: (torch.cat(logits[name]), seconds[name]) for name in models}


def summary(results: dict[str, tuple[Tensor, float]], labels: Any, names: list[str] | None) -> str:
    """A line a model: accuracy and weighted F1, or a regression's error, and the time it took."""
    metric, lines = load_metric(names is None), []
    for name, (logits, seconds) in results.items():
        scores = score(logits.numpy(), labels, metric, names)
        shown = ", ".join(f"{key} {scores[key]:.4f}" for key in ("accuracy", "f1", "mse") if key in scores)
        lines.append(f"{name:>8}: {shown}, {1000 * seconds / len(labels):.2f} ms a post")
    before, after = (seconds for _, seconds in results.values())
    return "\n".join([*lines, f"{before / after:.2f} times as fast on {torch.get_num_threads()} CPU thread(s)"])


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((DataArguments, QuantizationArguments), description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    argv = sys.argv[1:] if argv is None else argv
    if any(word.startswith(("--data_dir", "--dataset_name")) for word in argv):
        parser.set_defaults(splits=None)
    with one_sentence():
        data, arguments, rest = parser.parse_args_into_dataclasses(argv)
        if Path(arguments.output).resolve() == Path(rest.checkpoint).resolve():
            raise ValueError(f"{arguments.output} is the checkpoint itself: name another --output.")
        original = ClipCaCgForSequenceClassification.from_pretrained(rest.checkpoint, dtype=torch.float32).eval()
        quantized = quantize(rest.checkpoint)
        processor = ClipCaCgProcessor.from_pretrained(rest.checkpoint)
        posts = labelled_posts(original, data, arguments.split)
    quantized.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    batches = DataLoader(posts, arguments.batch_size, collate_fn=PostCollator(processor, original.config))
    results = compare({"float32": original, "int8": quantized}, batches)
    print(summary(results, torch.tensor(posts["label"]).numpy(), label_names({"": posts})))


if __name__ == "__main__":
    main()
