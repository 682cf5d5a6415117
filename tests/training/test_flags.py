"""Flags mean what they say: they beat every default, or are refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from inputs import SCRIPTS

from clipcacg.scripts import train
from clipcacg.scripts.data.labels import label_fields
from clipcacg.scripts.training import run
from clipcacg.scripts.training.arguments import SWITCHED_OFF, ModelArguments, RecipeArguments, parse_arguments
from clipcacg.scripts.training.checks import check_flags
from clipcacg.scripts.training.trainer import SentimentTrainer

BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
VIEWS = {"augment": True, "cache_features": True, "augment_views": 4}
OF_DATA_SET = {
    "dataset_name": "x", "image_column": "a", "text_column": ["a", "b"], "dataset_config": "a", "train_split": "a",
    "validation_split": "b", "test_split": "c",
}  # fmt: skip
STREAM = {"streaming": True, "dataset_name": "x", "shuffle_buffer": 9}
NO_STREAM = {"streaming": False, "shuffle_buffer": None}
# A file's settings, flags, and what holds then.
BEATEN: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"adam": True}, "--optim sgd", {"adam": False, "optim": "sgd"}),
    ({"adam": True}, "--optim_args eps=1e-6", {"adam": False}),
    ({"step_decay_epochs": 9}, "--lr_scheduler_type cosine", {"step_decay_epochs": None}),
    ({"step_decay_epochs": 9}, '--lr_scheduler_kwargs {"num_cycles":2}', {"step_decay_epochs": None}),
    ({"max_steps": 9}, "--num_train_epochs 2", {"max_steps": -1, "num_train_epochs": 2}),
    ({"fp16": True}, "--bf16 --use_cpu", {"fp16": False, "bf16": True}),
    ({"bf16": True, "use_cpu": True}, "--fp16", {"fp16": True, "bf16": False}),
    ({"freeze_text": True}, "--freeze_text_layers 1", {"freeze_text": False, "freeze_text_layers": 1}),
    ({"freeze_vision": True}, "--freeze_vision_blocks 1", {"freeze_vision": False}),
    ({"model_name_or_path": "x"}, "--text_model y", {"model_name_or_path": None}),
    ({"model_name_or_path": "x"}, "--vision_model y", {"model_name_or_path": None}),
    ({"model_name_or_path": "x"}, "--clip_model y", {"model_name_or_path": None}),
    ({"data_dir": "x", "splits": "clmlf"}, "--dataset_name y", {"data_dir": None, "splits": "random"}),
    ({"dataset_name": "x", "text_label_column": "a", "image_label_column": "b"}, "--data_dir y", {
        "dataset_name": None, "text_label_column": None, "image_label_column": None, "data_dir": "y",
    }),
    (OF_DATA_SET, "--data_dir y", dict.fromkeys(OF_DATA_SET)),
    ({"use_conflicting_posts": True}, "--dataset_name y", {"use_conflicting_posts": False}),
    ({"use_conflicting_posts": True}, "--use_modality_heads False", {"use_conflicting_posts": False}),
    (STREAM, "--data_dir y", NO_STREAM),
    (STREAM, "--group_duplicates", NO_STREAM | {"group_duplicates": True}),
    (STREAM, "--streaming False", NO_STREAM),
    (STREAM, "--augment", NO_STREAM | {"augment": True}),
    (STREAM, "--cache_features", NO_STREAM),
    (STREAM, "--hp_search 3", NO_STREAM),
    (VIEWS | {"group_duplicates": True, "dataset_name": "x"}, "--streaming", {
        "streaming": True, "group_duplicates": False, "augment": False, "cache_features": False, "augment_views": 0,
    }),
    (VIEWS, "--augment False", {"augment_views": 0}),
    (VIEWS, "--cache_features False", {"augment_views": 0}),
    (BEST | {"early_stopping_patience": 5, "average_checkpoints": 2}, "--eval_strategy no", {
        "early_stopping_patience": 0, "load_best_model_at_end": False, "average_checkpoints": 0,
    }),
    (BEST | {"early_stopping_patience": 5, "average_checkpoints": 2}, "--save_strategy no", {
        "early_stopping_patience": 5, "load_best_model_at_end": False, "average_checkpoints": 0,
    }),
    (BEST | {"average_checkpoints": 2}, "--load_best_model_at_end False", {"average_checkpoints": 0}),
    (BEST, "--eval_steps 7", {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 7}),
    (BEST, "--save_steps 7", {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 7}),
    (BEST, "--eval_steps 7 --save_steps 14", {"eval_steps": 7, "save_steps": 14, "load_best_model_at_end": True}),
    (BEST, "--save_strategy best", {"eval_strategy": "epoch", "save_strategy": "best"}),
    ({"logging_strategy": "epoch"}, "--logging_steps 7", {"logging_strategy": "steps", "logging_steps": 7}),
    # A flag that says the same as the file, or nothing, changes nothing.
    ({"adam": True, "step_decay_epochs": 9}, "--adam --seed 1", {"adam": True, "step_decay_epochs": 9}),
    ({"freeze_text": True}, "--freeze_text_layers 0", {"freeze_text": True}),
    (VIEWS, "--augment --cache_features", {"augment_views": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("file", "words", "holds"), BEATEN, ids=[f"{list(b[0])[0]} {b[1]}" for b in BEATEN])
def test_a_flag_beats_a_setting_of_the_file(
    file: dict[str, Any], words: str, holds: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps(file))
    parsed = parse_arguments([str(tmp_path / "mine.yaml"), *words.split()])
    found = {name: value for part in parsed for name, value in vars(part).items()}
    assert {name: found[name] for name in holds} == holds


def test_every_setting_that_yields_is_tested() -> None:
    pairs = {(name, word[2:]) for file, words, _ in BEATEN for name in file for word in words.split()}
    for setting, (_, overridden, needed) in SWITCHED_OFF.items():
        assert {(setting, flag) for flag in (*overridden, *needed)} <= pairs


@pytest.mark.parametrize("name", ["mvsa_single", "mvsa_single_best"])
def test_every_setting_of_a_recipe_can_be_changed_by_its_flag(name: str) -> None:
    config = SCRIPTS / f"configs/{name}.yaml"
    other = {
        "clip_mode": "none", "eval_strategy": "no", "save_strategy": "no", "lr_scheduler_type": "constant",
        "train_sampling_strategy": "random", "report_to": "all", "metric_for_best_model": "loss", "splits": "random",
        "cache_dtype": "float32",
    }  # fmt: skip
    settings = yaml.safe_load(config.read_text())
    for flag in settings.keys() - {"systems", "tuning"}:
        now = settings[flag]
        value = other.get(
            flag, not now if isinstance(now, bool) else now + 1 if isinstance(now, (int, float)) else "x"
        )
        if flag in ("eval_steps", "save_steps"):
            value = 7
        parsed = parse_arguments([str(config), f"--{flag}", str(value), "--use_cpu"])
        found = next(getattr(part, flag) for part in parsed if hasattr(part, flag))
        assert found == value or flag == "report_to", flag


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A table of texts whose labels no text tells."""
    rows = "".join(f"so good {number},{'ab'[number % 2]},{number % 7}.5\n" for number in range(40))
    (tmp_path / "posts.csv").write_text(f"text,label,value\n{rows}")
    return tmp_path / "posts.csv"


def words(own: Path, backbones: Path, *more: str) -> list[str]:
    """Flags of a short run with the recipe for own data."""
    tiny = f"--modality text --text_model {backbones}/text --vision_model {backbones}/vision --hidden_size 16"
    few = "--num_attention_heads 2 --use_cpu --disable_tqdm True --dataloader_num_workers 0"
    return [*f"--dataset_name {own} --output_dir {own.parent}/out {tiny} {few}".split(), *more]


def trainer_of(argv: list[str]) -> SentimentTrainer:
    model_arguments, data_arguments, arguments = parse_arguments(argv)
    check_flags(model_arguments, arguments)
    posts = run.load_training_posts(model_arguments, data_arguments, arguments)
    return run.make_trainer(arguments, *run.build(model_arguments, False, label_fields(posts["train"])), posts)


def test_the_optimizer_and_schedule_on_own_data_are_those_of_the_flags(own: Path, backbones: Path) -> None:
    trainer = trainer_of(words(own, backbones, "--optim", "sgd", "--lr_scheduler_type", "cosine"))
    trainer.create_optimizer_and_scheduler(10)
    trainer.optimizer.step()
    rates = [trainer.optimizer.param_groups[0]["lr"]]
    for _ in range(9):
        trainer.lr_scheduler.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert "SGD" in type(trainer.optimizer).__name__ and rates[5] == pytest.approx(rates[0] / 2)


def test_the_step_decay_warms_up(own: Path, backbones: Path) -> None:
    trainer = trainer_of(words(own, backbones, "--warmup_steps", "4"))  # 32 posts are one batch, an epoch one step
    trainer.create_optimizer_and_scheduler(30)
    trainer.optimizer.step()
    factors = []
    for _ in range(21):
        factors.append(trainer.lr_scheduler.get_last_lr()[0] / trainer.args.learning_rate)
        trainer.lr_scheduler.step()
    assert factors == pytest.approx([0, 0.25, 0.5, 0.75, *[1] * 6, *[0.1] * 10, 0.01])


REFUSED = [
    ("--early_stopping_patience 2 --eval_strategy no", "--early_stopping_patience needs evaluations"),
    ("--early_stopping_patience -1", "--early_stopping_patience must be at least 0, got -1"),
    (
        "--metric_for_best_model f2",
        "f2 is no score .* loss, accuracy, f1, f1_macro for classes; .*pearsonr for numbers",
    ),
    ("--report_to tensorboard", "--report_to tensorboard cannot be used: .*requires tensorboard to be installed"),
    ("--report_to wandb", "--report_to wandb cannot be used: .*pip install wandb"),
    ("--report_to nonsense", "--report_to nonsense cannot be used: .*only .*wandb"),
    ("--deepspeed ds.json", "--deepspeed needs the package deepspeed: pip install deepspeed"),
    ("--fsdp full_shard", "--fsdp needs several processes"),
    ("--load_best_model_at_end True --eval_strategy no", "--load_best_model_at_end requires the save and eval"),
    ("--eval_strategy epoch --save_strategy steps --load_best_model_at_end True", "strategy to match"),
    ("--torch_compile_backend nonsense", "--torch_compile cannot be used with backend='nonsense'"),
    ("--torch_compile_mode nonsense", "mode='nonsense': Unrecognized mode"),
    ("--bf16 --fp16 --use_cpu", "At most one of fp16 and bf16"),
    ("--tf32 True", "--tf32 requires Ampere"),
    ("--push_to_hub", "To push, give --hub_model_id as USER/NAME"),
    ("--push_to_hub --hub_model_id a/b", "--push_to_hub needs the network, and HF_HUB_OFFLINE forbids it"),
    ("--optim lomo", "--optim lomo cannot be used: .*pip install lomo-optim"),
    ("--optim sgd --optim_args moment=0.9", "--optim_args moment=0.9 has no effect on --optim sgd"),
    ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr cannot be used: .*min_lr"),
    ('--lr_scheduler_kwargs {"a":1}', "--lr_scheduler_type linear cannot be used: .*unexpected keyword"),
    ("--adam --optim sgd", "--adam and --optim contradict each other"),
    ("--step_decay_epochs 2 --lr_scheduler_type cosine", "--step_decay_epochs and --lr_scheduler_type contradict"),
    ("--step_decay_epochs 0", "--step_decay_epochs must be at least 1"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1"),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1"),
    ("--eval_accumulation_steps 0", "--eval_accumulation_steps must be at least 1"),
    ("--learning_rate -1", "--learning_rate must be at least 0"),
    ("--max_length 0", "--max_length must be at least 1"),
    ("--average_checkpoints 2 --load_best_model_at_end False", "--average_checkpoints needs --load_best_model_at_end"),
    ("--prediction_loss_only", "--prediction_loss_only True cannot be used: the scores need"),
    ("--batch_eval_metrics", "--batch_eval_metrics True cannot be used"),
    ("--eval_do_concat_batches False", "--eval_do_concat_batches False cannot be used"),
    ("--label_names mood", "--label_names .* cannot be used"),
    ("--length_column_name words", "--length_column_name words cannot be used"),
    ("--remove_unused_columns True", "--remove_unused_columns True cannot be used"),
    ("--dataloader_drop_last", "--dataloader_drop_last True cannot be used: it would drop posts of validation"),
    ("--use_liger_kernel", "--use_liger_kernel True cannot be used"),
    ("--accelerator_config nowhere.json", "The flags cannot be used: .*nowhere.json"),
]


@pytest.mark.parametrize(("flag", "said"), REFUSED, ids=[flag for flag, _ in REFUSED])
def test_a_flag_that_cannot_be_used_is_refused_before_anything_is_loaded(
    flag: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipcacg.scripts.training.checks.HF_HUB_OFFLINE", True)
    argv = ["--dataset_name", "nowhere.csv", "--output_dir", str(tmp_path / "out"), *flag.split()]
    with pytest.raises(SystemExit, match=said) as ended:
        train.main(argv)
    assert "\n" not in str(ended.value) and not (tmp_path / "out").exists()


def test_a_push_without_a_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcacg.scripts.training.checks.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="--push_to_hub needs an access token: run hf auth login, or set HF_TOKEN"):
        train.main(["--dataset_name", "nowhere.csv", "--push_to_hub", "--hub_model_id", "a/b"])


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--metric_for_best_model mse",
            "mse is no score of an evaluation: use loss, accuracy, f1, f1_macro for classes",
        ),
        ("--label_column value --metric_for_best_model accuracy", "use loss, mse, mae, pearsonr for numbers"),
    ],
)
def test_a_flag_that_does_not_suit_the_data_is_refused_before_the_model_is_loaded(
    flag: str, said: str, own: Path, backbones: Path
) -> None:
    with pytest.raises(SystemExit, match=said):
        train.main(words(own, backbones, "--text_model", "nowhere/nothing", *flag.split()))


@pytest.mark.parametrize("flag", ["early_stopping_patience 3", "eval_strategy epoch", "load_best_model_at_end True"])
def test_a_flag_that_needs_a_validation_split_is_refused_without_one(
    flag: str, posts_folder: Path, tmp_path: Path
) -> None:
    ids = [path.stem for path in (posts_folder / "data").glob("*.txt")]
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[:60], "test": ids[60:90]}))
    data = f"--data_dir {posts_folder} --splits {tmp_path}/split.json --output_dir {tmp_path}/out --{flag}"
    with pytest.raises(SystemExit, match=rf"--{flag.split()[0]} needs a validation split, and .* only train, test"):
        train.main(data.split())


@pytest.mark.parametrize(
    ("metric", "greater"), [("accuracy", True), ("f1", True), ("loss", False), ("mse", False), ("eval_mae", False)]
)
def test_the_best_model_is_the_lowest_where_lower_is_better(metric: str, greater: bool) -> None:
    assert parse_arguments(["--metric_for_best_model", metric])[2].greater_is_better is greater
    opposite = ["--metric_for_best_model", metric, "--greater_is_better", str(not greater)]
    assert parse_arguments(opposite)[2].greater_is_better is not greater


def test_an_undefined_score_is_never_the_best(own: Path, backbones: Path) -> None:
    more = "--label_column value --metric_for_best_model pearsonr --max_eval_samples 1 --num_train_epochs 1"
    train.main(words(own, backbones, *more.split()))
    assert json.loads((own.parent / "out/config.json").read_text())["problem_type"] == "regression"


def test_a_checkpoint_keeps_its_fields_unless_a_flag_changes_one_that_can_change(
    checkpoint: Path, own: Path, backbones: Path
) -> None:
    start = ["--dataset_name", str(own), "--output_dir", str(own.parent / "out"), "--use_cpu"]
    start += ["--model_name_or_path", str(checkpoint), "--text_column", "text", "--image_column", "text"]
    for flag, said in (
        (f"--text_model {backbones}/text", "--text_model cannot be used with --model_name_or_path"),
        ("--clip_token x", "--clip_token cannot be used with --model_name_or_path"),
        ("--hidden_size 64", "--hidden_size is 32 in .* and cannot be 64"),
        ("--modality text", "--modality is both in .* and cannot be text"),
    ):
        with pytest.raises(SystemExit, match=said):
            train.main([*start, *flag.split()])
    for more, dropout in (([], 0.3), (["--dropout", "0.45", "--hidden_size", "32"], 0.45)):
        model_arguments, _, arguments = parse_arguments([*start, *more])
        run.follow_checkpoint(model_arguments, run.checkpoint_config(str(checkpoint)), arguments.given)
        assert run.build(model_arguments, False, {"id2label": {0: "a", 1: "b"}})[0].config.dropout == dropout


@pytest.fixture
def stopped(own: Path, backbones: Path) -> Any:
    """A function that trains without learning anything, evaluates every step, and returns the number of steps."""

    def train_and_count(*more: str) -> int:
        every = "--eval_strategy steps --eval_steps 1 --save_steps 1 --save_total_limit 99 --learning_rate 0"
        train.main(words(own, backbones, *every.split(), "--max_steps", "8", *more))
        return json.loads((own.parent / "out/trainer_state.json").read_text())["global_step"]

    return train_and_count


@pytest.mark.slow
def test_a_resumed_run_follows_a_changed_patience(stopped: Any, own: Path) -> None:
    resume = ["--resume_from_checkpoint", str(own.parent / "out/checkpoint-2"), "--early_stopping_patience"]
    assert stopped("--early_stopping_patience", "2") == 3
    assert stopped(*resume, "4") == 5
    assert stopped(*resume, "1") == 3
    assert stopped(*resume, "0") == 8
    # Checkpoint 8 is of a run without patience. Its state knows nothing of the callback.
    resume[1] = str(own.parent / "out/checkpoint-6")
    assert stopped(*resume, "1") == 7


def test_the_arguments_beside_a_checkpoint_hold_no_token(own: Path) -> None:
    tokens = ["--text_token", "secret-1", "--hub_token", "secret-2"]
    arguments = parse_arguments(["--dataset_name", str(own), *tokens])[2]
    run.take_over_push(arguments)
    assert "hub_token" in arguments.given and "secret" not in repr(vars(arguments))


def test_every_flag_of_ours_is_found_on_the_command_line(tmp_path: Path) -> None:
    given = parse_arguments(["--freeze_text", "--adam", "--no_use_gating", "--output_dir", str(tmp_path)])[2].given
    assert given == {"freeze_text", "adam", "use_gating", "output_dir"}
    assert not {"given"} & (ModelArguments.__dataclass_fields__.keys() | set(RecipeArguments().to_dict()))
