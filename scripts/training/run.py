"""Train CLIP-CA-CG, test it, and leave a checkpoint that loads anywhere.

    accelerate launch scripts/train.py      # the drawn sample, in a minute or two
    accelerate launch scripts/train.py scripts/configs/mvsa_single.yaml --data_dir MVSA_Single
    accelerate launch scripts/train.py --dataset_name posts.csv --text_column tweet --output_dir outputs/mine
    accelerate launch scripts/train.py --push_to_hub --hub_model_id USER/NAME

A YAML file gives defaults that flags override. Without one it is `sample.yaml`, or the paper's recipe
`mvsa_single.yaml` if data is named. `--help` lists the flags: those below and every one of `TrainingArguments`.
"""

import json
import logging
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torchvision.transforms import v2
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, enable_full_determinism, set_seed

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import NO_LIMIT, ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.features import FEATURES, FeatureStore, cache_features, frozen_backbones
from clipcacg.scripts.data.loading import (
    SAMPLE_FOLDER,
    SPLIT_NAMES,
    DataArguments,
    label_names,
    load_posts,
    one_sentence,
)
from clipcacg.scripts.data.sample import MARKER, make_tiny_backbones
from clipcacg.scripts.reporting.hub import check_repo_id, push_checkpoint
from clipcacg.scripts.reporting.model_card import write_model_card
from clipcacg.scripts.reporting.plots import CONFUSION_MATRIX_FILE, CURVES_FILE, plot_confusion_matrix, plot_curves
from clipcacg.scripts.reporting.predictions import prediction_line, write_line
from clipcacg.scripts.reporting.run_facts import (
    RunFacts,
    hardware_name,
    how_it_ended,
    library_versions,
    training_recipe,
)
from clipcacg.scripts.reporting.tables import results_table
from clipcacg.scripts.training.arguments import ModelArguments, RecipeArguments, parse_arguments
from clipcacg.scripts.training.metrics import load_metric, score
from clipcacg.scripts.training.trainer import SentimentTrainer, training_faults

logger = logging.getLogger(__name__)


def build(
    arguments: ModelArguments, is_sample: bool, names: list[str] | None
) -> tuple[ClipCaCgForSequenceClassification, ClipCaCgProcessor]:
    """The model, frozen where asked for, and its processor.

    Args:
        arguments: Which ones.
        is_sample: Take the sample's tiny backbones where none are named.
        names: Names of the classes, or None for a regression.

    Raises:
        ValueError: If a backbone is needed and not named.
    """
    labels = label_fields(names)
    if arguments.model_name_or_path:
        source = arguments.model_name_or_path
        model = ClipCaCgForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, class_weights=None, **labels
        )
        processor = ClipCaCgProcessor.from_pretrained(source)
    else:
        backbones = backbone_names(arguments, is_sample)
        model = ClipCaCgForSequenceClassification.from_backbones(**backbones, **arguments.config_fields(), **labels)
        processor = ClipCaCgProcessor.from_backbones(**backbones)
    limit_and_freeze(model, processor, arguments)
    return model, processor


def label_fields(names: list[str] | None) -> dict[str, Any]:
    """The fields of a config that speak of the labels; None for a regression."""
    if names is None:
        return {"num_labels": 1, "problem_type": "regression"}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return {**labels, "problem_type": "single_label_classification" if len(names) > 1 else None}


def limit_and_freeze(model: PreTrainedModel, processor: ClipCaCgProcessor, arguments: ModelArguments) -> None:
    """Cut texts at `--max_length`, and freeze the backbones that are to be."""
    if arguments.max_length:
        processor.tokenizer.model_max_length = min(arguments.max_length, processor.tokenizer.model_max_length)
    model.freeze_backbones(
        arguments.freeze_text, arguments.freeze_vision, arguments.freeze_clip, arguments.freeze_text_layers
    )


def backbone_names(arguments: ModelArguments, is_sample: bool) -> dict[str, str | None]:
    """The three names that `from_backbones` takes; CLIP's only where the model has CLIP's towers."""
    needed = ["text_model", "vision_model"]
    if arguments.clip_mode == "encoder" and arguments.modality == "both":
        needed.append("clip_model")
    names = {name: getattr(arguments, name) for name in needed}
    if is_sample and None in names.values():
        tiny = make_tiny_backbones(SAMPLE_FOLDER / "backbones")
        names = {name: value or str(tiny / name.removesuffix("_model")) for name, value in names.items()}
    missing = [f"--{name}" for name, value in names.items() if value is None]
    if missing:
        raise ValueError(f"Name {' and '.join(missing)}: a Hub name or a folder.")
    return names


def prepare_training(
    dataset: datasets.Dataset, processor: ClipCaCgProcessor, collator: PostCollator, augment: bool
) -> datasets.Dataset:
    """Add the texts' lengths, by which batches can be grouped, and random changes to the pictures if asked for."""
    if collator.config.modality != "image":
        encoded = processor.tokenizer([text or "" for text in dataset["text"]], truncation=True)
        dataset = dataset.add_column("length", [len(ids) for ids in encoded["input_ids"]])
    if augment and collator.config.modality != "text":
        dataset = dataset.cast_column("image", datasets.Image())
        dataset = dataset.with_transform(change_pictures, columns=["image"], output_all_columns=True)
    return dataset


def change_pictures(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Crop, flip and colour each picture at random; our choice, weak enough to leave its sentiment alone."""
    change = v2.Compose(
        [
            v2.RGB(),
            v2.RandomResizedCrop(256, scale=(0.7, 1.0), ratio=(0.8, 1.25), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ]
    )
    return {"image": [change(image) for image in columns["image"]]}


def balanced_weights(dataset: datasets.Dataset) -> list[float]:
    """One weight a class, inverse to its frequency, 1 on average over the posts; scikit-learn's "balanced".

    Raises:
        ValueError: If a class has no post.
    """
    counts = np.bincount(dataset["label"], minlength=dataset.features["label"].num_classes)
    if not counts.all():
        raise ValueError("--class_weights balanced needs posts of every class in the training split.")
    return compute_class_weight("balanced", classes=np.arange(len(counts)), y=np.asarray(dataset["label"])).tolist()


def set_loss(
    model: ClipCaCgForSequenceClassification,
    arguments: RecipeArguments,
    model_arguments: ModelArguments,
    train: datasets.Dataset,
) -> None:
    """Put label smoothing and class weights into the model's own loss.

    The Trainer's label smoothing would take the labels away from the model, and the contrastive loss with them.
    """
    model.config.label_smoothing, arguments.label_smoothing_factor = arguments.label_smoothing_factor, 0.0
    if model_arguments.class_weights not in ("none", "balanced"):
        raise ValueError(f"--class_weights must be none or balanced, not {model_arguments.class_weights!r}.")
    if model_arguments.class_weights == "balanced" and not isinstance(train.features["label"], datasets.ClassLabel):
        raise ValueError("--class_weights balanced is for classes, and these labels are numbers.")
    model.config.class_weights = balanced_weights(train) if model_arguments.class_weights == "balanced" else None


def compute_metrics(evaluated: EvalPrediction, metric: evaluate.Metric, names: list[str] | None) -> dict[str, float]:
    """The numbers among them, which is what the Trainer logs and chooses by."""
    scores = score(np.asarray(evaluated.predictions), evaluated.label_ids, metric, names)
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def take_over_push(arguments: RecipeArguments) -> tuple[bool, str | None]:
    """Whether to push at the end. The Trainer's own push, of its checkpoints and arguments too, is switched off.

    Returns:
        That, and the access token, which the arguments hold no longer: every checkpoint has a copy of them.

    Raises:
        ValueError: If there is no name to push to.
    """
    asked, arguments.push_to_hub = arguments.push_to_hub, False
    token, arguments.hub_token = arguments.hub_token, None
    if asked:
        check_repo_id(arguments.hub_model_id, "--hub_model_id")
    return asked, token


def push(arguments: RecipeArguments, token: str | None) -> None:
    """Push what the run left behind, as `push_to_hub.py` does."""
    private, revision = bool(arguments.hub_private_repo), arguments.hub_revision
    push_checkpoint(arguments.output_dir, arguments.hub_model_id, private, revision, token)


def checkpoints(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in a folder, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; the Trainer writes its own state last."""
    for checkpoint in checkpoints(folder):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return str(checkpoint)
        except (OSError, ValueError):
            logger.warning("%s was not written to its end and is passed over", checkpoint)
    return None


def where_to_resume(arguments: RecipeArguments) -> str | None:
    """The checkpoint to go on from, or None to start anew.

    Raises:
        ValueError: If that would mix this run's checkpoints with those of an earlier one.
    """
    last = last_checkpoint(Path(arguments.output_dir))
    asked = arguments.resume_from_checkpoint
    if asked and str(asked).lower() in ("true", "last"):
        if last is None:
            logger.warning("%s holds no checkpoint to go on from: training starts anew", arguments.output_dir)
        return last
    if asked and str(asked).lower() != "false":
        return str(asked)
    if last is not None and not arguments.overwrite_output_dir:
        raise ValueError(
            f"{arguments.output_dir} holds checkpoints of an earlier run: go on with --resume_from_checkpoint True, "
            "start anew with --overwrite_output_dir, or name another --output_dir."
        )
    for folder in checkpoints(Path(arguments.output_dir)):
        # The Trainer would count them, and choose from them, as its own.
        logger.warning("deleting %s of an earlier run", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def adapt_to_data(arguments: RecipeArguments, posts: datasets.DatasetDict, modality: str) -> None:
    """Settle what depends on the data: without validation nothing can be chosen; a regression wants a small error."""
    arguments.remove_unused_columns = False  # the collator reads columns that the model does not know
    arguments.dataloader_pin_memory &= torch.cuda.is_available()
    arguments.restore_callback_states_from_checkpoint = True  # early stopping goes on counting after a resume
    if modality == "image" and arguments.train_sampling_strategy == "group_by_length":
        arguments.train_sampling_strategy = "random"
    if label_names(posts) is None and arguments.metric_for_best_model in (None, "accuracy"):
        arguments.metric_for_best_model, arguments.greater_is_better = "mse", False
    if "validation" not in posts:
        logger.warning("there is no validation split: nothing is evaluated during training, the last epoch is kept")
        arguments.eval_strategy, arguments.load_best_model_at_end = "no", False
        arguments.early_stopping_patience = 0


def compute_features(
    arguments: RecipeArguments,
    model_arguments: ModelArguments,
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    posts: datasets.DatasetDict,
) -> tuple[datasets.DatasetDict, dict[str, FeatureStore]]:
    """See `cache_features`.

    Raises:
        ValueError: If pictures are to change from epoch to epoch.
    """
    if arguments.augment and any(FEATURES[name].column == "image" for name in frozen_backbones(model)):
        raise ValueError("--augment changes every picture in every epoch, and --cache_features keeps it: choose one.")
    return cache_features(
        model,
        processor,
        posts,
        dtype=model_arguments.cache_dtype,
        device=arguments.device,
        num_workers=arguments.dataloader_num_workers,
    )


def make_trainer(
    arguments: RecipeArguments,
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    posts: datasets.DatasetDict,
    features: dict[str, FeatureStore] | None = None,
) -> SentimentTrainer:
    """Put the parts together; `features` are those of `compute_features`."""
    names = label_names(posts)
    collator = PostCollator(processor, model.config, features or {})
    patience = arguments.early_stopping_patience
    return SentimentTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=prepare_training(posts["train"], processor, collator, arguments.augment),
        eval_dataset=posts.get("validation"),
        processing_class=processor,
        compute_metrics=partial(compute_metrics, metric=load_metric(names is None), names=names),
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )


def evaluate_splits(trainer: SentimentTrainer, posts: datasets.DatasetDict) -> dict[str, dict[str, Any]]:
    """Score the validation and the test split, as far as they exist, and write what was found.

    Leaves `all_results.json` with the scores, prefixed `eval_` and `test_`, and `predictions.jsonl` of the last split.

    Returns:
        Split name to the metric's scores.
    """
    names, results = label_names(posts), {}
    metric = load_metric(names is None)
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split not in posts:
            continue
        output = trainer.predict(posts[split], metric_key_prefix=prefix)
        results[split] = score(output.predictions, output.label_ids, metric, names)
        details = {f"{prefix}_{name}": value for name, value in results[split].items()}
        trainer.save_metrics(prefix, {**output.metrics, **details})
        if trainer.is_world_process_zero():
            scores = torch.from_numpy(output.predictions)
            lines = [
                prediction_line(*post, trainer.model.config) for post in zip(posts[split]["id"], scores, strict=True)
            ]
            with (Path(trainer.args.output_dir) / "predictions.jsonl").open("w", encoding="utf-8") as file:
                for line in lines:
                    write_line(file, line)
            logger.info("\n%s, %d posts\n%s\n", split, len(posts[split]), results_table(results[split], names))
    return results


def data_kind(arguments: DataArguments, posts: datasets.DatasetDict) -> str:
    """Which data the model card speaks of; a folder that `make_sample.py` made is no MVSA, though it looks like it."""
    if arguments.is_sample or (arguments.data_dir and (Path(arguments.data_dir) / MARKER).is_file()):
        return "sample"
    return f"mvsa-{next(iter(posts.values())).info.config_name}" if arguments.data_dir else "other"


def complete_checkpoint(
    trainer: SentimentTrainer,
    posts: datasets.DatasetDict,
    results: dict[str, dict[str, Any]],
    arguments: tuple[ModelArguments, DataArguments],
    seconds: float,
    resumed: bool = False,
) -> None:
    """Add the pictures and the model card, and take out what is of no use elsewhere."""
    folder, (model_arguments, data_arguments) = Path(trainer.args.output_dir), arguments
    config, state, ended = trainer.model.config, trainer.state, how_it_ended(trainer.args, trainer.state)
    for split, scores in list(results.items())[-1:]:
        if "confusion_matrix" in scores:
            title, file = f"Confusion matrix of the {split} split", folder / CONFUSION_MATRIX_FILE
            plot_confusion_matrix(scores["confusion_matrix"], label_names(posts), file, title)
    plot_curves(state.log_history, folder / CURVES_FILE, ended.get("chosen_epoch"))
    # A pickle of the arguments, with paths of this machine; and the one path in the Trainer's state.
    (folder / "training_args.bin").unlink(missing_ok=True)
    state.best_model_checkpoint = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
    state.save_to_json(str(folder / "trainer_state.json"))
    limit = trainer.processing_class.tokenizer.model_max_length
    facts = RunFacts(
        config=config,
        data_kind=data_kind(data_arguments, posts),
        dataset_name=data_arguments.dataset_name or data_arguments.data_dir or "the drawn sample",
        splits=split_name(data_arguments, posts),
        num_posts={split: len(dataset) for split, dataset in posts.items()},
        split_settings=split_settings(data_arguments),
        base_models=base_models(model_arguments, trainer.model),
        hub_model_id=trainer.args.hub_model_id,
        num_parameters=trainer.model.num_parameters(),
        max_tokens=limit if limit < NO_LIMIT else None,
        training=recipe(trainer.args, model_arguments, config.label_smoothing),
        **ended,
        seconds=seconds,
        resumed=resumed,
        hardware=hardware_name(trainer.args),
        versions=library_versions(config),
        validation=results.get("validation"),
        test=results.get("test"),
    )
    write_model_card(folder, facts)
    logger.info("Checkpoint, results and model card are in %s", folder)


def split_name(arguments: DataArguments, posts: datasets.DatasetDict) -> str:
    """How the data was split; a split that the data set brought knows itself by its name."""
    drawn = f"(seed {arguments.split_seed})"
    if arguments.dataset_name is None:
        return f"random 8:1:1 {drawn}" if arguments.splits == "random" else str(arguments.splits)
    brought = {split for split, rows in posts.items() if SPLIT_NAMES.get(str(rows.split), str(rows.split)) == split}
    if "validation" not in posts or "validation" in brought:
        return "those of the data set"
    if "test" not in posts or "test" in brought:
        return f"those of the data set, with a random ninth of its training posts for validation {drawn}"
    return f"random 8:1:1 {drawn}"


def split_settings(arguments: DataArguments) -> dict[str, Any]:
    """What else decides which posts are in a split, as far as it was asked for and is heeded."""
    names = ["max_train_samples", "max_eval_samples"] + ([] if arguments.dataset_name else ["group_duplicates"])
    return {name: value for name in names if (value := getattr(arguments, name))}


def recipe(arguments: RecipeArguments, model_arguments: ModelArguments, label_smoothing: float) -> dict[str, Any]:
    """The settings that the model card tells, ours included."""
    values = training_recipe(arguments)
    if arguments.adam:
        values["optim"] = "Adam with coupled weight decay"
    if arguments.step_decay_epochs:
        values["lr_scheduler_type"] = f"divided by 10 every {arguments.step_decay_epochs} epochs"
    frozen = [part for part in ("text", "vision", "clip") if getattr(model_arguments, f"freeze_{part}")]
    layers = 0 if "text" in frozen else model_arguments.freeze_text_layers
    ours = {
        "backbone_learning_rate": arguments.backbone_learning_rate,
        "early_stopping_patience": arguments.early_stopping_patience,
        "frozen_backbones": ", ".join(frozen),
        "frozen_text_layers": f"embeddings and the first {layers}" if layers else "",
        "class_weights": model_arguments.class_weights.replace("none", ""),
        "augment": arguments.augment,
        "label_smoothing": label_smoothing,
    }
    return values | {name: value for name, value in ours.items() if value}


def base_models(arguments: ModelArguments, model: ClipCaCgForSequenceClassification) -> dict[str, str]:
    """Part to the pretrained weights it started from; the sample's random ones do not count."""
    if arguments.model_name_or_path:
        return {"model": arguments.model_name_or_path}
    parts = {name.partition(".")[0]: None for name in model.backbones()}
    return {part: name for part in parts if (name := getattr(arguments, f"{part}_model"))}


def set_up_logging(is_main: bool) -> None:
    """Say what happens once, whatever the number of processes."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if is_main else logging.ERROR)
    logging.getLogger("clipcacg").setLevel(logging.INFO if is_main else logging.ERROR)


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        model_arguments, data_arguments, arguments = parse_arguments(
            sys.argv[1:] if argv is None else argv, __doc__.split("\n")[0]
        )
    set_up_logging(arguments.process_index == 0)
    (enable_full_determinism if arguments.full_determinism else set_seed)(arguments.seed)

    with one_sentence(), training_faults(arguments.output_dir):
        pushes, token = take_over_push(arguments)
        if model_arguments.model_name_or_path:
            source = ClipCaCgConfig.from_pretrained(model_arguments.model_name_or_path)
            model_arguments.modality = source.modality  # a checkpoint brings its own
        with arguments.main_process_first(desc="loading the posts"):
            posts = load_posts(data_arguments, model_arguments.modality)
        if "train" not in posts:
            raise ValueError(
                f"There is no training split: the posts of {data_arguments.dataset_name} are for testing."
            )
        adapt_to_data(arguments, posts, model_arguments.modality)
        with arguments.main_process_first(desc="looking for checkpoints"):  # the first one may delete some
            checkpoint = where_to_resume(arguments)
        model, processor = build(model_arguments, data_arguments.is_sample, label_names(posts))
        set_loss(model, arguments, model_arguments, posts["train"])
        features = None
        if model_arguments.cache_features:
            with arguments.main_process_first(desc="computing features"):
                posts, features = compute_features(arguments, model_arguments, model, processor, posts)

        trainer = make_trainer(arguments, model, processor, posts, features)
        trained = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", trained.metrics)
        results = evaluate_splits(trainer, posts)
        if trainer.is_world_process_zero():
            seconds = trained.metrics["train_runtime"]
            arguments_told = (model_arguments, data_arguments)
            complete_checkpoint(trainer, posts, results, arguments_told, seconds, resumed=checkpoint is not None)
            if pushes:
                push(arguments, token)


if __name__ == "__main__":
    main()
