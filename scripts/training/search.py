"""Search settings on the validation split: `train.py --hp_search N`.

A trial trains as a run with these settings would, but writes no checkpoint. Its score is the best of its evaluations
by `--metric_for_best_model`, or the last without `--load_best_model_at_end`. The first trial has the settings of the
recipe; optuna's TPE sampler proposes the others. No test post is read.

Each finished trial is a line of `hp_search.jsonl` in the output folder. A killed search continues after the last line.
A proposal depends on the lines and the seed alone, so an interrupted search finds what an uninterrupted one finds.
"""

import copy
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from transformers import set_seed

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.labels import label_fields
from clipcacg.scripts.data.lines import append_line, read_lines, short_hash
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.training.arguments import ModelArguments, RecipeArguments
from clipcacg.scripts.training.averaging import metric_and_sign
from clipcacg.scripts.training.record import recipe
from clipcacg.scripts.training.run import build, check_posts, checkpoints, compute_features, make_trainer, set_loss
from clipcacg.scripts.training.trainer import NotFinite, SentimentTrainer

logger = logging.getLogger(__name__)

TRIALS_FILE = "hp_search.jsonl"


class Range(NamedTuple):
    """The values that a setting may take, and that of the first trial."""

    low: float
    high: float
    start: float
    log: bool = False
    step: float | None = None


def search(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: RecipeArguments,
    posts: datasets.DatasetDict,
) -> bool:
    """Make the trials that are missing, and set the flags to the values of the best one.

    Args:
        model_arguments: Flags; dropout is changed.
        data_arguments: Flags.
        arguments: Flags; learning rates, epochs and weight decay are changed.
        posts: Splits.

    Returns:
        Whether any trial was made. If so, earlier checkpoints in the output folder are deleted: they belong to
        settings that may no longer be the best.

    Raises:
        InputError: If no setting is left to search, the folder holds trials of other settings, or every trial failed.
    """
    if arguments.metric_for_best_model is None:
        arguments.metric_for_best_model, arguments.greater_is_better = "loss", False
    posts = datasets.DatasetDict({split: posts[split] for split in ("train", "validation")})
    labels = label_fields(posts["train"])
    model, processor = build(model_arguments, data_arguments.is_sample, labels)
    space = search_space(model, model_arguments, arguments)
    counts = {split: len(dataset) for split, dataset in posts.items()}
    told = recipe(arguments, model_arguments, arguments.label_smoothing_factor) | {"hp_search": "any number of trials"}
    settings = short_hash([asdict(model_arguments), asdict(data_arguments), told, counts, space])
    file, sign = Path(arguments.output_dir) / TRIALS_FILE, metric_and_sign(arguments)[1]
    lines = earlier_trials(file, settings, arguments)
    missing, features, faults = range(len(lines), arguments.hp_search), None, Faults(data_arguments.on_error)
    faults.num_rows = sum(counts.values())
    if missing:
        check_posts(posts, model, processor, arguments, model_arguments.cache_features, faults)
    if missing and model_arguments.cache_features:
        posts, features = compute_features(arguments, model_arguments, model, processor, posts)

    def fresh(trial: Any) -> ClipCaCgForSequenceClassification:
        dropout = suggest(trial, space).get("dropout", model_arguments.dropout)
        made, _ = build(replace(model_arguments, dropout=dropout), data_arguments.is_sample, labels)
        set_loss(made, copy.copy(arguments), model_arguments, posts["train"])
        set_seed(arguments.seed)  # a run seeds itself again once its model is built
        return made

    for number in missing:
        own = copy.deepcopy(arguments)
        own.save_strategy, own.load_best_model_at_end, own.average_checkpoints = "no", False, 0
        set_loss(model, own, model_arguments, posts["train"])
        trainer = make_trainer(own, model, processor, posts, features, faults)
        trainer.model_init = fresh
        start = time.perf_counter()
        found = try_once(trainer, space, lines, arguments)
        facts = {"settings": settings, "trial": number, **found, "seconds": round(time.perf_counter() - start, 1)}
        append_line(file, facts)
        lines.append(facts)
        report(lines, arguments, sign)

    best = best_trial(lines, sign)
    if best is None:
        raise InputError(f"Every trial in {file} failed: lower --learning_rate in the YAML file.")
    logger.info("Training with the best trial, number %d: %s", best["trial"] + 1, best["values"])
    for name, value in best["values"].items():
        setattr(model_arguments if name == "dropout" else arguments, name, value)
    if missing:
        for folder in checkpoints(Path(arguments.output_dir)):
            logger.warning("deleting %s of an earlier run", folder)
            shutil.rmtree(folder, ignore_errors=True)
    return bool(missing)


def earlier_trials(file: Path, settings: str, arguments: RecipeArguments) -> list[dict[str, Any]]:
    """The trials that a killed search has made, unless the search starts again.

    Raises:
        InputError: If they are of other settings.
    """
    if arguments.overwrite_output_dir and not arguments.resume_from_checkpoint:
        file.unlink(missing_ok=True)
    lines = read_lines(file)
    if any(line["settings"] != settings for line in lines):
        raise InputError(
            f"{file} holds trials of other settings or data: name another --output_dir, or start again with "
            "--overwrite_output_dir."
        )
    return lines


def best_trial(lines: list[dict[str, Any]], sign: int) -> dict[str, Any] | None:
    """The trial with the best score, or None if none has one."""
    return max((line for line in lines if "score" in line), key=lambda line: sign * line["score"], default=None)


def search_space(
    model: ClipCaCgForSequenceClassification, model_arguments: ModelArguments, arguments: RecipeArguments
) -> dict[str, Range]:
    """The settings that are searched: those that no flag of the command line fixes and that have an effect.

    Source: our choice. A factor of 10 around the recipe's learning rates, and at most its number of epochs.

    Raises:
        InputError: If there are none.
    """
    rate, decay, dropout = arguments.learning_rate, arguments.weight_decay, model_arguments.dropout
    of_backbones = rate if arguments.backbone_learning_rate is None else arguments.backbone_learning_rate
    trained = [weight for encoder in model.backbones().values() for weight in encoder.parameters()]
    space = {
        "dropout": Range(0, max(0.5, dropout), dropout),
        "weight_decay": Range(1e-6, max(0.1, decay), max(1e-6, decay), log=True),
    }
    if rate:
        space["learning_rate"] = Range(rate / 10, rate * 10, rate, log=True)
    if of_backbones and any(weight.requires_grad for weight in trained):
        space["backbone_learning_rate"] = Range(of_backbones / 10, of_backbones * 10, of_backbones, log=True)
    epochs = math.floor(arguments.num_train_epochs)
    if arguments.max_steps < 1 and epochs > 1:
        space["num_train_epochs"] = Range(1, epochs, epochs, step=1)
    space = {name: values for name, values in space.items() if name not in arguments.given}
    if not space:
        raise InputError("--hp_search has nothing to search, because flags set everything: leave some of them out.")
    return space


def suggest(trial: Any, space: Mapping[str, Range]) -> dict[str, float]:
    """The values of an optuna trial; those of the first trial for None."""
    if trial is None:
        return {name: values.start for name, values in space.items()}
    return {
        name: trial.suggest_float(name, values.low, values.high, log=values.log, step=values.step)
        for name, values in space.items()
    }


def try_once(
    trainer: SentimentTrainer, space: Mapping[str, Range], lines: list[dict[str, Any]], arguments: RecipeArguments
) -> dict[str, Any]:
    """Make one trial.

    Args:
        trainer: Makes its model anew.
        space: See `search_space`.
        lines: Those of the earlier trials.
        arguments: Flags of the command.

    Returns:
        The values, the metric's name and the score; or an error if the loss was not finite.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (name, sign), scores = metric_and_sign(arguments), list[float]()

    def objective(metrics: dict[str, float]) -> float:
        score = sign * metrics[name]
        scores.append(-math.inf if math.isnan(score) else score)
        return max(scores) if arguments.load_best_model_at_end else scores[-1]

    storage, distributions = optuna.storages.InMemoryStorage(), {}
    for key, values in space.items():
        distributions[key] = optuna.distributions.FloatDistribution(*values[:2], log=values.log, step=values.step)
    study = {"storage": storage, "study_name": TRIALS_FILE, "direction": "maximize"}
    earlier = optuna.create_study(**study)
    for line in lines:
        score = sign * line["score"] if "score" in line else None
        state = optuna.trial.TrialState.FAIL if score is None else optuna.trial.TrialState.COMPLETE
        told = {"params": line["values"], "distributions": distributions, "value": score, "state": state}
        earlier.add_trial(optuna.trial.create_trial(**told))
    if not lines:
        earlier.enqueue_trial(suggest(None, space))
    tried: dict[str, float] = {}

    def values_of_arguments(trial: Any) -> dict[str, float]:
        tried.update(suggest(trial, space))
        return {key: value for key, value in tried.items() if key != "dropout"}

    try:
        trainer.hyperparameter_search(
            hp_space=values_of_arguments,
            compute_objective=objective,
            n_trials=1,
            backend="optuna",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=arguments.seed + len(lines)),
            pruner=optuna.pruners.NopPruner(),
            **study,
        )
    except NotFinite as error:
        return {"values": tried, "error": str(error)}
    best = max(scores) if arguments.load_best_model_at_end else scores[-1]
    return {"values": tried, "metric": name.removeprefix("eval_"), "score": sign * best, "epochs": trainer.state.epoch}


def report(lines: list[dict[str, Any]], arguments: RecipeArguments, sign: int) -> None:
    """Log the last trial, the best one, and an estimate of the time that the others will take."""
    last, best = lines[-1], best_trial(lines, sign)
    said = f"{last['metric']} {last['score']:.4f}" if "score" in last else last["error"]
    left = (arguments.hp_search - len(lines)) * sum(line["seconds"] for line in lines) / len(lines)
    logger.info(
        "Trial %d of %d: %s in %.0f seconds; best so far: %s; time left: about %s",
        len(lines),
        arguments.hp_search,
        said,
        last["seconds"],
        "none" if best is None else f"{best['score']:.4f}, trial {best['trial'] + 1}",
        timedelta(seconds=round(left)),
    )
