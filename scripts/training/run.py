"""The steps of a training run, which `train.py` and `reproduce.py` share: build, resume, train, evaluate."""

import ctypes
import json
import logging
import math
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from safetensors import SafetensorError
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoConfig, EvalPrediction, PreTrainedModel, TrainerCallback

from clipcacg.configuration_clipcacg import BACKBONES, MODALITY_COMBINATIONS, ClipCaCgConfig, split_keywords
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor, label_scores
from clipcacg.scripts.data.augmentation import Augmentation
from clipcacg.scripts.data.collator import PostCollator, leave_out_unreadable
from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.features import FEATURES, FeatureStore, cache_features
from clipcacg.scripts.data.labels import align, check_classes, label_names, task_of
from clipcacg.scripts.data.loading import SAMPLE_FOLDER, DataArguments, load_posts
from clipcacg.scripts.data.mvsa import labelled
from clipcacg.scripts.data.sample import make_tiny_backbones
from clipcacg.scripts.data.streaming import PostStream
from clipcacg.scripts.reporting.hub import push_checkpoint
from clipcacg.scripts.reporting.predictions import checkpoint_config, load_checkpoint, prediction_line, write_line
from clipcacg.scripts.reporting.tables import calibration_tables, results_table
from clipcacg.scripts.training.arguments import LoadingArguments, ModelArguments, RecipeArguments
from clipcacg.scripts.training.averaging import KeepBestCheckpoints, best_checkpoints, load_average
from clipcacg.scripts.training.calibration import check_wanted_accuracy, choose_min_confidence, fit_temperature
from clipcacg.scripts.training.checks import check_validation
from clipcacg.scripts.training.evaluation import all_scores
from clipcacg.scripts.training.metrics import best_threshold, check_metric_name, load_metric, score
from clipcacg.scripts.training.trainer import EarlyStopping, SentimentTrainer

logger = logging.getLogger(__name__)

# Fields of the config that a trained model may get anew.
CHANGEABLE = ("dropout", "contrastive_loss_weight", "modality_dropout")
# What chooses a checkpoint in place of accuracy, and whether a greater value is better.
BEST_BY = {"regression": ("mse", False), "multi_label_classification": ("f1_micro", True)}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # options of glibc's mallopt, which Python does not name


def load_training_posts(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: RecipeArguments,
    faults: Faults | None = None,
) -> datasets.DatasetDict:
    """Load the posts, in the main process first, and settle the flags that depend on them.

    Raises:
        InputError: If there is no training split, its posts all have one label, or the modality heads lack labels.
    """
    has_heads, config = model_arguments.use_modality_heads, None
    if model_arguments.model_name_or_path:
        config = checkpoint_config(model_arguments.model_name_or_path)
        follow_checkpoint(model_arguments, config, arguments.given)
        has_heads = has_heads or config.use_modality_heads
    if data_arguments.use_conflicting_posts and not has_heads:
        raise InputError("--use_conflicting_posts trains modality heads alone: add --use_modality_heads.")
    if data_arguments.streaming:
        adapt_to_stream(arguments, model_arguments.cache_features)
    with arguments.main_process_first(desc="loading the posts"):
        may_lack = model_arguments.modality_dropout > 0
        posts = load_posts(data_arguments, model_arguments.modality, config, faults, may_lack)
    if "train" not in posts:
        source = data_arguments.dataset_name or data_arguments.data_dir or "the drawn sample"
        if data_arguments.splits not in (None, "random"):
            source += f" with --splits {data_arguments.splits}"
        raise InputError(f"There is no training split: the split train is missing in {source}.")
    if model_arguments.use_modality_heads and not {"text_label", "image_label"} <= set(posts["train"].column_names):
        raise InputError(
            "--use_modality_heads needs labels of text and image alone: name their columns with --text_label_column "
            "and --image_label_column."
        )
    check_classes(posts)
    if model_arguments.model_name_or_path and label_names(posts["train"]):
        if config.task == "regression" and data_arguments.task == "auto" and data_arguments.dataset_name:
            raise InputError(
                f"{model_arguments.model_name_or_path} predicts values, and the labels are read as classes: say with "
                "--task regression or --task classification what is meant."
            )
        with suppress(InputError):  # other classes keep their own order
            posts = datasets.DatasetDict({split: align(part, config.label_names) for split, part in posts.items()})
    adapt_to_data(arguments, posts, model_arguments.modality)
    return posts


def follow_checkpoint(arguments: ModelArguments, config: ClipCaCgConfig, given: Collection[str]) -> None:
    """Take the fields of a checkpoint's config, except for what the command line gives and `CHANGEABLE` allows.

    Args:
        arguments: The flags, which are changed.
        config: Config of `--model_name_or_path`.
        given: Names of the flags on the command line.

    Raises:
        InputError: If the command line gives a field that a trained model cannot change, or names encoders.
    """
    trusted = {f"{part}_trust_remote_code" for part in BACKBONES}  # the checkpoint holds the encoders' own code
    encoders = {f"{part}_model" for part in BACKBONES} | {entry.name for entry in fields(LoadingArguments)} - trusted
    if named := sorted(encoders & set(given)):
        raise InputError(f"--{named[0]} cannot be used with --model_name_or_path, which brings its own encoders.")
    for name in arguments.config_fields().keys() - arguments.head_fields().keys():
        wanted, found = getattr(arguments, name), getattr(config, name)
        if name not in given:
            setattr(arguments, name, found)
        elif wanted != found and name not in CHANGEABLE:
            raise InputError(f"--{name} is {found} in {arguments.model_name_or_path} and cannot be {wanted}.")


def adapt_to_stream(arguments: RecipeArguments, cache_features: bool) -> None:
    """Settle the flags that depend on `--streaming`.

    Raises:
        InputError: If a flag needs all posts.
    """
    need_all = {"cache_features": cache_features, "augment": arguments.augment, "hp_search": arguments.hp_search}
    for flag, is_set in need_all.items():
        if is_set:
            raise InputError(f"--{flag} needs all training posts, which --streaming does not keep: choose one.")
    if arguments.accelerator_config.dispatch_batches:
        raise InputError("--accelerator_config dispatch_batches cannot be used with --streaming: leave it out.")
    # Every process reads all rows, and decodes the posts of its own batches alone: together these are the batches of
    # one process. Accelerate's default, where one process dispatches batches to the others, makes it decode for all,
    # and fails where batches are not padded to the same length. With `split_dataset_by_node` the processes would have
    # different numbers of posts, and rows would lose the numbers by which they find their labels.
    arguments.accelerator_config.dispatch_batches = False
    arguments.train_sampling_strategy = "random"
    arguments.dataloader_num_workers = min(arguments.dataloader_num_workers, 1)  # the order of rows must stay
    arguments.dataloader_persistent_workers = False  # such a worker would repeat the order of its first epoch


def adapt_to_data(arguments: RecipeArguments, posts: datasets.DatasetDict, modality: str) -> None:
    """Settle the flags that depend on the data, such as the metric to choose a checkpoint by.

    Raises:
        InputError: If the flags do not fit together.
    """
    arguments.dataloader_pin_memory &= torch.cuda.is_available()
    if modality == "image" and arguments.train_sampling_strategy == "group_by_length":
        if "train_sampling_strategy" in arguments.given:
            raise InputError(
                "--train_sampling_strategy group_by_length needs texts, which --modality image leaves out."
            )
        arguments.train_sampling_strategy = "random"
    task, is_chosen = task_of(posts["train"]), "metric_for_best_model" in arguments.given
    if task in BEST_BY and not is_chosen and arguments.metric_for_best_model in (None, "accuracy"):
        arguments.metric_for_best_model, arguments.greater_is_better = BEST_BY[task]
    check_wanted_accuracy(arguments.wanted_accuracy, task)
    if arguments.metric_for_best_model:
        check_metric_name(arguments.metric_for_best_model, task)
    if "validation" not in posts:
        check_validation(arguments, list(posts))
        logger.warning("There is no validation split: training runs without evaluation and keeps the last epoch.")
        arguments.eval_strategy, arguments.load_best_model_at_end = "no", False
        arguments.early_stopping_patience = arguments.average_checkpoints = 0
    if arguments.average_checkpoints > 1:
        arguments.save_total_limit = None


def build(
    arguments: ModelArguments, is_sample: bool, labels: dict[str, Any]
) -> tuple[ClipCaCgForSequenceClassification, ClipCaCgProcessor]:
    """Build or load the model and its processor, and freeze the backbones that the flags name.

    Args:
        arguments: The flags.
        is_sample: Use the sample's tiny backbones where no others are named.
        labels: Config fields from `label_fields`.

    Raises:
        InputError: If a backbone is missing or cannot be loaded, or the flags do not fit together.
    """
    if arguments.model_name_or_path:
        model, processor = load_checkpoint(
            arguments.model_name_or_path,
            arguments.trusts_code,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            class_weights=None,
            label_thresholds=None,
            temperature=1.0,
            **{name: getattr(arguments, name) for name in CHANGEABLE},
            **arguments.head_fields(),
            **labels,
        )
    else:
        backbones, loading = backbone_names(arguments, is_sample), arguments.loading_options()
        options = split_keywords(loading)[0]
        for flag, name in backbones.items():
            with as_input_error(f"--{flag} {name} cannot be loaded", OSError, ValueError):
                AutoConfig.from_pretrained(name, **options[flag.removesuffix("_model")])
        with as_input_error("The model cannot be built", OSError, ValueError, SafetensorError):
            model = ClipCaCgForSequenceClassification.from_backbones(
                **backbones, **loading, **arguments.config_fields(), **labels
            )
            processor = ClipCaCgProcessor.from_backbones(**backbones, **loading)
    with as_input_error("The encoders cannot be frozen", ValueError):
        limit_and_freeze(model, processor, arguments)
    return model, processor


def limit_and_freeze(model: PreTrainedModel, processor: ClipCaCgProcessor, arguments: ModelArguments) -> None:
    """Truncate texts at `--max_length`, and freeze the backbones that the flags name.

    Two settings make training on a CPU faster: `keep_freed_memory`, and channels_last weights, with which forward and
    backward of EfficientNet-Lite0 take half the time.
    """
    keep_freed_memory()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if arguments.max_length:
        shared = [processor.clip_tokenizer] if model.config.share_clip_text else []
        for tokenizer in (processor.tokenizer, *shared):
            tokenizer.model_max_length = min(arguments.max_length, tokenizer.model_max_length)
    model.freeze_backbones(
        arguments.freeze_text,
        arguments.freeze_vision,
        arguments.freeze_clip,
        arguments.freeze_text_layers,
        arguments.freeze_vision_blocks,
    )


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that PyTorch frees, for the next step.

    It would return them to the kernel, which clears every page that it gives out again. In a virtual machine, six
    training steps of the end-to-end recipe with their start took 0.74 times the processor time and 1.2 times the
    memory.
    """
    with suppress(OSError, AttributeError, TypeError):  # other systems have other allocators
        glibc = ctypes.CDLL("libc.so.6")
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**27)):
            glibc.mallopt(option, value)


def backbone_names(arguments: ModelArguments, is_sample: bool) -> dict[str, str | None]:
    """The names that `from_backbones` takes; CLIP's only where the model has CLIP's towers.

    Raises:
        InputError: If one is missing.
    """
    needed = ["text_model", "vision_model"]  # `from_backbones` of the processor takes both
    if "clip" in ClipCaCgConfig(modality=arguments.modality, clip_mode=arguments.clip_mode).encoders:
        needed.append("clip_model")
    names = {name: getattr(arguments, name) for name in needed}
    if is_sample and None in names.values():
        tiny = make_tiny_backbones(SAMPLE_FOLDER / "backbones")
        names = {name: value or str(tiny / name.removesuffix("_model")) for name, value in names.items()}
    missing = [f"--{name}" for name, value in names.items() if value is None]
    if missing:
        raise InputError(f"Name {' and '.join(missing)}: a Hub name or a folder.")
    return names


def set_loss(
    model: ClipCaCgForSequenceClassification,
    arguments: RecipeArguments,
    model_arguments: ModelArguments,
    train: datasets.Dataset,
) -> None:
    """Move label smoothing and class weights into the model's own loss.

    The Trainer's label smoothing would hide the labels, and so the contrastive loss, from the model.

    Raises:
        InputError: If `--class_weights balanced` or `--label_smoothing_factor` does not fit the data.
    """
    if arguments.label_smoothing_factor and model.config.task != "single_label_classification":
        raise InputError("--label_smoothing_factor is for one class per post, and these labels are numbers or lists.")
    model.config.label_smoothing, arguments.label_smoothing_factor = arguments.label_smoothing_factor, 0.0
    model.config.class_weights = None
    if model_arguments.class_weights == "balanced":
        model.config.class_weights = balanced_weights(labelled(train))


def balanced_weights(dataset: datasets.Dataset) -> list[float]:
    """One weight per class, inverse to its frequency, 1 on average over the posts (scikit-learn's "balanced").

    Raises:
        InputError: If posts have no or several classes, or a class has no post.
    """
    label = dataset.features["label"]
    if not isinstance(label, datasets.ClassLabel):
        raise InputError("--class_weights balanced is for one class per post, and these labels are numbers or lists.")
    classes, labels = np.arange(label.num_classes), np.asarray(dataset["label"])
    if missing := sorted(set(classes) - set(labels)):
        raise InputError(
            "--class_weights balanced needs training posts of every class, and there is none of "
            f"{', '.join(label.names[index] for index in missing)}: leave the flag out, or add posts."
        )
    return compute_class_weight("balanced", classes=classes, y=labels).tolist()


def check_posts(
    posts: datasets.DatasetDict,
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    arguments: RecipeArguments,
    with_training: bool,
    faults: Faults,
) -> None:
    """Leave out what cannot be read of the splits that must be readable; training replaces such posts as it goes.

    Args:
        posts: Splits, of which some are replaced.
        model: Says what is read.
        processor: Reads it.
        arguments: The recipe.
        with_training: The training split is read as a whole too, to store features of it.
        faults: Says whether bad posts are left out, and counts them.
    """
    collator = PostCollator(processor, model.config)
    for split in [split for split in posts if with_training or split != "train"]:
        workers = arguments.dataloader_num_workers
        posts[split] = leave_out_unreadable(posts[split], collator, faults, f"the {split} split", workers)


def compute_features(
    arguments: RecipeArguments,
    model_arguments: ModelArguments,
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    posts: datasets.DatasetDict,
) -> tuple[datasets.DatasetDict, dict[str, FeatureStore]]:
    """Store the frozen backbones' outputs; see `cache_features`.

    Raises:
        InputError: If posts are augmented anew in every epoch.
    """
    if arguments.augment and not arguments.augment_views:
        raise InputError(
            "--augment changes every post in every epoch, --cache_features stores it: choose one, or store a few "
            "changed versions of each post with --augment_views 4."
        )
    return cache_features(
        model,
        processor,
        posts,
        dtype=model_arguments.cache_dtype,
        device=arguments.device,
        num_workers=arguments.dataloader_num_workers,
        views=arguments.augment_views if arguments.augment else 0,
    )


def make_trainer(
    arguments: RecipeArguments,
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    posts: datasets.DatasetDict,
    features: dict[str, FeatureStore] | None = None,
    faults: Faults | None = None,
    stream: PostStream | None = None,
) -> SentimentTrainer:
    """Make the Trainer; `features` come from `compute_features`. Conflicting posts train modality heads alone.

    With `--on_error skip`, `faults` takes the training posts that cannot be read; with `--streaming`, `stream` are
    the training posts.

    Raises:
        InputError: If checkpoints are to be averaged whose weights are spread over several files.
    """
    names = label_names(posts["train"])
    train = posts["train"] if model.config.use_modality_heads else labelled(posts["train"])
    collator = PostCollator(processor, model.config, features or {})
    patience, averaged = arguments.early_stopping_patience, arguments.average_checkpoints
    callbacks: list[TrainerCallback] = [EarlyStopping()] if patience else []
    if averaged > 1:
        callbacks.append(KeepBestCheckpoints(averaged))
    trainer = SentimentTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=prepare_training(train, collator, arguments) if stream is None else stream,
        eval_dataset=posts.get("validation"),
        processing_class=processor,
        compute_metrics=partial(compute_metrics, metric=load_metric(task_of(posts["train"])), names=names),
        callbacks=callbacks,
        faults=faults,
    )
    if averaged > 1 and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise InputError("--average_checkpoints does not work with FSDP and DeepSpeed: use one process or DDP.")
    return trainer


def prepare_training(
    dataset: datasets.Dataset, collator: PostCollator, arguments: RecipeArguments
) -> datasets.Dataset:
    """Add the number of tokens, to group batches by, and augmentation if asked for."""
    modalities, processor = collator.config.modalities, collator.processor
    if "text" in modalities:
        encoded = processor.tokenizer([text or "" for text in dataset["text"]], truncation=True)
        dataset = dataset.add_column("length", [len(ids) for ids in encoded["input_ids"]])
    if arguments.augment:
        stored = {FEATURES[encoder].column for encoder in collator.features}
        columns = [column for column in modalities if collator.reads(column)]
        columns += [f"{column}_digest" for column in sorted(stored)]
        augmentation = Augmentation(processor, arguments.augment_views)
        dataset = dataset.with_transform(augmentation, columns=columns, output_all_columns=True)
    return dataset


def compute_metrics(evaluated: EvalPrediction, metric: evaluate.Metric, names: list[str] | None) -> dict[str, float]:
    """The scalar scores, which the Trainer logs and chooses a checkpoint by; nan if undefined."""
    scores = score(np.asarray(evaluated.predictions), evaluated.label_ids, metric, names)
    scores = {name: math.nan if value is None else value for name, value in scores.items()}
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def average_checkpoints(trainer: SentimentTrainer) -> list[int]:
    """Load the greedy average of the run's best checkpoints, if asked for.

    Writes it down in `all_results.json`; see `load_average`.

    Returns:
        The steps whose weights were averaged; none without `--average_checkpoints`.
    """
    best = best_checkpoints(trainer.args, trainer.state, trainer.args.average_checkpoints)
    if trainer.args.average_checkpoints < 2 or not best:
        return []
    averaging = load_average(trainer, best)
    trainer.save_metrics("averaging", averaging)
    return averaging["averaged_steps"]


def checkpoints(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in a folder, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, which is one with a state: the Trainer writes that last."""
    for checkpoint in checkpoints(folder):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return str(checkpoint)
        except (OSError, ValueError):
            logger.warning("%s is incomplete and is skipped", checkpoint)
    return None


def where_to_resume(arguments: RecipeArguments) -> str | None:
    """The checkpoint to continue from, or None to start from the beginning.

    Raises:
        InputError: If this run's checkpoints would mix with those of an earlier one.
    """
    with arguments.main_process_first(desc="looking for checkpoints"):  # the main process may delete some
        last = last_checkpoint(Path(arguments.output_dir))
        asked = arguments.resume_from_checkpoint
        if asked and str(asked).lower() in ("true", "last"):
            if last is None:
                logger.warning("%s holds no checkpoint: training starts from the beginning", arguments.output_dir)
            return last
        if asked and str(asked).lower() != "false":
            if not Path(asked).is_dir():
                raise InputError(f"--resume_from_checkpoint {asked} is not a folder.")
            return str(asked)
        if last is not None and not arguments.overwrite_output_dir:
            raise InputError(
                f"{arguments.output_dir} holds checkpoints of an earlier run: continue with "
                "--resume_from_checkpoint True, start again with --overwrite_output_dir, or name another --output_dir."
            )
        for folder in checkpoints(Path(arguments.output_dir)):
            # The Trainer would count them, and choose from them, as its own.
            logger.warning("deleting %s of an earlier run", folder)
            shutil.rmtree(folder, ignore_errors=True)
    return None


def evaluate_splits(trainer: SentimentTrainer, posts: datasets.DatasetDict) -> dict[str, dict[str, Any]]:
    """Score the validation and the test split, those of them that exist.

    Writes `all_results.json` with the scores, prefixed `eval_` and `test_`, and `predictions.jsonl` of the last split.

    Returns:
        Split name to the metric's scores.
    """
    names, config, results, chosen = label_names(posts["train"]), trainer.model.config, {}, None
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split not in posts:
            continue
        output = trainer.predict(posts[split], metric_key_prefix=prefix)
        answers, wanted = (output.predictions, output.label_ids), trainer.args.wanted_accuracy
        if split == "validation" and wanted is not None:
            chosen = choose_min_confidence(*answers, config, wanted)
        results[split] = all_scores(*answers, posts[split], config, chosen)
        details = {f"{prefix}_{name}": value for name, value in results[split].items()}
        trainer.save_metrics(prefix, {**output.metrics, **details})
        if trainer.is_world_process_zero():
            with (Path(trainer.args.output_dir) / "predictions.jsonl").open("w", encoding="utf-8") as file:
                for post_id, logits in zip(posts[split]["id"], torch.from_numpy(output.predictions), strict=True):
                    write_line(file, prediction_line(post_id, logits, config))
            logger.info("\n%s, %d posts\n%s\n", split, len(posts[split]), results_table(results[split], names))
    if tables := calibration_tables(results):
        logger.info("%s\n", tables)
    return results


def choose_combination(trainer: SentimentTrainer, posts: datasets.DatasetDict, asked: str) -> None:
    """Set `modality_combination` of a trained model with heads to what is better on the validation split.

    The score is `--metric_for_best_model`. The classifier wins a tie. It also stays without a validation split, and
    with labels other than negative, neutral and positive, which the average needs.

    Args:
        trainer: Its model and arguments.
        posts: Splits.
        asked: `--modality_combination`; anything but "auto" stands.
    """
    config, arguments = trainer.model.config, trainer.args
    if asked != "auto" or not (config.use_modality_heads and config.has_sentiment_labels and "validation" in posts):
        return
    metric, scores = (arguments.metric_for_best_model or "accuracy").removeprefix("eval_"), {}
    for name in MODALITY_COMBINATIONS:
        config.modality_combination = name
        metrics = trainer.predict(posts["validation"], metric_key_prefix="eval").metrics
        scores[name] = -metrics["eval_loss"] if metric == "loss" else metrics[f"eval_{metric}"]
    config.modality_combination = max(scores, key=scores.__getitem__)
    logger.info("modality_combination: %s, by the validation %s of %s", config.modality_combination, metric, scores)


def calibrate(trainer: SentimentTrainer, posts: datasets.DatasetDict) -> None:
    """Set what turns a trained classifier's logits into answers, by the validation split.

    That is its `temperature` and, with several labels per post, its `label_thresholds`, by the F1 of each label: one
    without validation posts keeps 0.5, and so does one whose F1 no threshold improves.

    Source: the thresholds are our choice. At 0.5 a model predicts rare labels hardly ever.
    """
    config = trainer.model.config
    config.temperature, config.label_thresholds = 1.0, None
    if config.task == "regression" or "validation" not in posts:
        return
    output = trainer.predict(posts["validation"], metric_key_prefix="eval")
    config.temperature = fit_temperature(output.predictions, output.label_ids, config)
    if config.task != "multi_label_classification":
        return
    probabilities = label_scores(torch.from_numpy(output.predictions), config).numpy()
    config.label_thresholds = [
        best_threshold(*label) for label in zip(output.label_ids.T, probabilities.T, strict=True)
    ]
    listed = ", ".join(
        f"{name} {found:.2f}" for name, found in zip(config.label_names, config.label_thresholds, strict=True)
    )
    logger.info("Probability from which a label is predicted: %s", listed)


def take_over_push(arguments: RecipeArguments) -> tuple[bool, str | None]:
    """Switch off the Trainer's own push, which would upload its checkpoints and arguments too.

    Returns:
        Whether to push at the end, and the access token. It is taken out of the arguments, since every checkpoint
        has a copy of them.
    """
    asked, arguments.push_to_hub = arguments.push_to_hub, False
    token, arguments.hub_token = arguments.hub_token, None
    return asked, token


def push(arguments: RecipeArguments, token: str | None, trust_remote_code: bool) -> None:
    """Push the finished run, as `push_to_hub.py` does; see `push_checkpoint`."""
    private, revision = bool(arguments.hub_private_repo), arguments.hub_revision
    push_checkpoint(arguments.output_dir, arguments.hub_model_id, private, revision, token, trust_remote_code)
