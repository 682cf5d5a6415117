"""The best weights of a run, and their greedy average.

Source: "greedy soup" of Wortsman et al., "Model soups", ICML 2022, here over the evaluations of one run.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]


@dataclass
class Evaluated:
    """One evaluation of a run.

    Args:
        value: The validation metric, negative where lower is better.
        step: Step of the Trainer.
        epoch: The same in epochs.
        weights: The weights in memory, or None if they are in the checkpoint of the step.
    """

    value: float
    step: int
    epoch: float | None
    weights: Weights | None = None


def metric_and_sign(args: TrainingArguments) -> tuple[str, int]:
    """The name of the validation metric in the Trainer's logs, and -1 where lower is better, otherwise 1."""
    return f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}", 1 if args.greater_is_better else -1


class KeepBest(TrainerCallback):
    """Keep the trained weights of a run's best evaluations in memory; the earlier one wins a tie.

    Args:
        count: How many to keep.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.best: list[Evaluated] = []

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        model: PreTrainedModel,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        name, sign = metric_and_sign(args)
        evaluated = Evaluated(sign * metrics[name], state.global_step, state.epoch)
        self.best = sorted([*self.best, evaluated], key=lambda one: -one.value)[: self.count]
        if any(one is evaluated for one in self.best):
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            kept = {name: value for name, value in model.state_dict().items() if name not in frozen}
            evaluated.weights = {name: value.detach().to("cpu", copy=True) for name, value in kept.items()}


def best_checkpoints(args: TrainingArguments, state: TrainerState, count: int) -> list[Evaluated]:
    """The best evaluations that have a checkpoint on disk, best first; the earlier one wins a tie."""
    name, sign = metric_and_sign(args)
    found = [Evaluated(sign * log[name], log["step"], log["epoch"]) for log in state.log_history if name in log]
    on_disk = [one for one in found if checkpoint_of(args, one.step).is_dir()]
    return sorted(on_disk, key=lambda one: -one.value)[:count]


def checkpoint_of(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


class KeepBestCheckpoints(TrainerCallback):
    """Delete a run's checkpoints except the best and the last one, in place of the Trainer's `save_total_limit`.

    Args:
        count: How many of the best to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            kept = {one.step for one in best_checkpoints(args, state, self.count)} | {state.global_step}
            for step in {log["step"] for log in state.log_history} - kept:
                shutil.rmtree(checkpoint_of(args, step), ignore_errors=True)


def greedy_average(
    candidates: Iterable[Weights], value: float, evaluate: Callable[[Weights], float]
) -> tuple[Weights, list[int], list[float]]:
    """Start with the best weights, and average the next ones in unless the average's metric gets worse.

    Args:
        candidates: Weights of one model, the best first; they are read one at a time.
        value: Validation metric of the first; higher is better.
        evaluate: Returns the same metric for any weights.

    Returns:
        The average; the indices of the candidates in it; and for each candidate the metric of the average that it was
        tried in, which is `value` for the first.
    """
    weights = iter(candidates)
    average, chosen, values = next(weights), [0], [value]
    for index, candidate in enumerate(weights, start=1):
        tried = {name: _include(tensor, candidate[name], len(chosen)) for name, tensor in average.items()}
        values.append(evaluate(tried))
        if values[-1] >= value:
            average, value = tried, values[-1]
            chosen.append(index)
    return average, chosen, values


def _include(mean: Tensor, tensor: Tensor, count: int) -> Tensor:
    """Include a tensor in the mean of `count` others; an integer, such as BatchNorm's counter, stays the best's."""
    return mean.float().lerp(tensor.float(), 1 / (count + 1)).to(mean.dtype) if mean.is_floating_point() else mean


def load_average(trainer: Trainer, best: list[Evaluated]) -> dict[str, Any]:
    """Load the greedy average of a run's best weights into its model, in every process.

    Args:
        trainer: The Trainer, after training.
        best: Its best evaluations, best first.

    Returns:
        What the results say: `averaged_steps`, and `averaging`, which has for each candidate its step, its own metric
        on validation, and that of the average in which it was tried.
    """
    metric, sign = metric_and_sign(trainer.args)

    def evaluate(weights: Weights) -> float:
        trainer.model.load_state_dict(weights, strict=False)
        # Unlike `evaluate`, `predict` writes no log and calls no early stopping.
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        return sign * output.metrics[metric]

    candidates = (
        load_file(checkpoint_of(trainer.args, one.step) / SAFE_WEIGHTS_NAME) if one.weights is None else one.weights
        for one in best
    )
    average, chosen, values = greedy_average(candidates, best[0].value, evaluate)
    trainer.model.load_state_dict(average, strict=False)
    steps = [best[index].step for index in chosen]
    logger.info("the weights are the average after %s steps", " and ".join(map(str, steps)))
    tried = [
        {"step": one.step, metric: sign * one.value, f"average_{metric}": sign * value}
        for one, value in zip(best, values, strict=True)
    ]
    return {"averaged_steps": steps, "averaging": tried}
