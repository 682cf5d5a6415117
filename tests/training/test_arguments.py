"""Flags and YAML files: which value holds, and which are refused."""

from pathlib import Path

import pytest
from inputs import SCRIPTS

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.training.arguments import names_data, parse_arguments


def test_flags_override_the_yaml_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("learning_rate: 2.5e-1\nmodality: text\nuse_gating: false\nfreeze_text: true\n")
    model, _, arguments = parse_arguments([str(config), "--modality", "image", "--output_dir", str(tmp_path)])
    values = (arguments.learning_rate, model.modality, model.use_gating, model.freeze_text)
    assert values == (0.25, "image", False, True)
    assert parse_arguments([])[2].output_dir == "outputs/sample"
    assert parse_arguments(["--data_dir", "somewhere"])[2].adam and names_data(["--data-dir", "somewhere"])
    config.write_text("tuning: {dropout: [0.1]}\nlr_scheduler_kwargs: {num_cycles: 2}\n")  # tuning is reproduce.py's
    assert parse_arguments([str(config)])[2].lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 0.25", "Unknown key learning_rat in .*mine.yaml. Allowed: .* Did you mean learning_rate?"),
        ("clip_mode: encodr", "mine.yaml: clip_mode must be one of encoder, feature, none, got 'encodr'"),
        ("on_error: [skip]", r"mine.yaml: on_error must be one of raise, skip, got \['skip'\]"),
        ("eval_strategy: no", "eval_strategy must be one of no, steps, epoch, got False .* in quotes"),
        ("hidden_size: 2.5", "mine.yaml: hidden_size must be a value of type int, got 2.5"),
        ("learning_rate:", "mine.yaml: learning_rate must be a value of type float, got None"),
        ("use_gating: 7", "mine.yaml: use_gating must be true or false, got 7"),
        ("- a list", "mine.yaml is not a YAML file of flags"),
    ],
)
def test_a_yaml_file_is_checked_as_flags_are(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        parse_arguments([str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--hiden_size 5", "Unknown argument --hiden_size. Did you mean --hidden_size?"),
        ("--nonsense=5", "Unknown argument --nonsense=5. --help lists the flags."),
        ("--augment --augment_views 4", "--augment_views needs --augment and --cache_features"),
        ("--cache_features --augment_views 4", "--augment_views needs --augment and --cache_features"),
        ("nothing.yaml", "nothing.yaml is not a YAML file"),
    ],
)
def test_flags_that_cannot_be_used(flags: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_arguments(flags.split())


@pytest.mark.parametrize("flag", ["clip_mode", "modality", "class_weights", "cache_dtype", "on_error"])
def test_the_parser_lists_the_allowed_values_of_a_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([f"--{flag}", "wrong"])
    assert "invalid choice: 'wrong' (choose from " in capsys.readouterr().err


def test_debug_needs_no_value_and_keeps_those_of_transformers() -> None:
    assert parse_arguments(["--debug"])[2].debug == []
    assert [option.value for option in parse_arguments(["--debug", "underflow_overflow"])[2].debug] == [
        "underflow_overflow"
    ]


@pytest.mark.parametrize("name", ["mvsa_single", "mvsa_multiple"])
def test_the_mvsa_configs_are_the_papers_recipe(name: str) -> None:
    model, _, arguments = parse_arguments([str(SCRIPTS / f"configs/{name}.yaml")])
    assert (model.text_model, model.vision_model) == ("FacebookAI/roberta-base", "microsoft/resnet-50")
    assert (model.clip_model, model.clip_mode, model.dropout) == ("openai/clip-vit-base-patch32", "encoder", 0.3)
    assert (arguments.adam, arguments.learning_rate, arguments.weight_decay) == (True, 1e-4, 1e-5)
    assert (arguments.step_decay_epochs, arguments.num_train_epochs) == (10, 100)
    assert arguments.per_device_train_batch_size == {"mvsa_single": 64, "mvsa_multiple": 128}[name]
