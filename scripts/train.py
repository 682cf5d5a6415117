"""Train CLIP-CA-CG, test it, and leave a checkpoint that loads anywhere.

    accelerate launch scripts/train.py      # the drawn sample, in a minute or two
    accelerate launch scripts/train.py scripts/configs/mvsa_single.yaml --data_dir MVSA_Single
    accelerate launch scripts/train.py --dataset_name posts.csv --text_column tweet --output_dir outputs/mine
    accelerate launch scripts/train.py --push_to_hub --hub_model_id USER/NAME

The flags override the defaults in the YAML file. Without a file these are `sample.yaml`, or the paper's recipe
`mvsa_single.yaml` if the flags name data. `--help` lists all flags, those of `TrainingArguments` among them.
"""

import sys

from transformers import enable_full_determinism, set_seed

from clipcacg.scripts.data.errors import one_sentence, set_up_logging
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.labels import label_fields
from clipcacg.scripts.data.loading import training_stream
from clipcacg.scripts.training.arguments import parse_arguments
from clipcacg.scripts.training.checks import check_flags
from clipcacg.scripts.training.record import complete_checkpoint
from clipcacg.scripts.training.run import (
    average_checkpoints,
    build,
    calibrate,
    check_posts,
    choose_combination,
    compute_features,
    evaluate_splits,
    load_training_posts,
    make_trainer,
    push,
    set_loss,
    take_over_push,
    where_to_resume,
)
from clipcacg.scripts.training.search import search
from clipcacg.scripts.training.trainer import training_faults


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with one_sentence(argv):
        model_arguments, data_arguments, arguments = parse_arguments(argv, __doc__.partition("\n")[0])
        set_up_logging(arguments.process_index == 0)
        (enable_full_determinism if arguments.full_determinism else set_seed)(arguments.seed)
        with training_faults(arguments.output_dir):
            check_flags(model_arguments, arguments)
            pushes, token = take_over_push(arguments)
            faults = Faults(data_arguments.on_error)
            posts = load_training_posts(model_arguments, data_arguments, arguments, faults)
            checkpoint = where_to_resume(arguments)
            if arguments.hp_search and search(model_arguments, data_arguments, arguments, posts):
                checkpoint = None  # those in the folder are of other settings
            if arguments.hp_search:
                set_seed(arguments.seed)
            model, processor = build(model_arguments, data_arguments.is_sample, label_fields(posts["train"]))
            if data_arguments.dataset_name:
                model.config.text_columns = data_arguments.text_column
                model.config.image_column = data_arguments.image_column
            check_posts(posts, model, processor, arguments, model_arguments.cache_features, faults)
            set_loss(model, arguments, model_arguments, posts["train"])
            features = None
            if model_arguments.cache_features:
                with arguments.main_process_first(desc="computing features"):
                    posts, features = compute_features(arguments, model_arguments, model, processor, posts)

            stream = None
            if data_arguments.streaming:
                stream = training_stream(data_arguments, model_arguments.modality, posts, model.config, arguments.seed)
            trainer = make_trainer(arguments, model, processor, posts, features, faults, stream)
            trained = trainer.train(resume_from_checkpoint=checkpoint)
            averaged = average_checkpoints(trainer)
            choose_combination(trainer, posts, model_arguments.modality_combination)
            calibrate(trainer, posts)
            trainer.save_model()
            trainer.save_state()
            trainer.save_metrics("train", trained.metrics)
            faults.gather()
            if skipped := faults.summary():
                trainer.save_metrics("skipped", skipped)
            results = evaluate_splits(trainer, posts)
            if trainer.is_world_process_zero():
                seconds, resumed = trained.metrics["train_runtime"], checkpoint is not None
                flags = (model_arguments, data_arguments)
                complete_checkpoint(trainer, posts, results, flags, seconds, resumed, averaged)
                if pushes:
                    push(arguments, token, model_arguments.trusts_code)


if __name__ == "__main__":
    main()
