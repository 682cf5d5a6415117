"""What transformers' own test suite asks of every model, config and processor, as far as no other file here asks it.

That suite is not part of the installed package; the names of its tests stand in the docstrings where they help to
compare.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from inputs import make_inputs
from safetensors.torch import load_file
from test_modeling import KEY_BIASES, LABELS, VARIANTS, Inputs, every_variant
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification, ClipCaCgModel, ClipCaCgPreTrainedModel
from clipcacg.processing_clipcacg import ClipCaCgProcessor

Build = Callable[..., ClipCaCgPreTrainedModel]

CLASSES = {"base": ClipCaCgModel, "classifier": ClipCaCgForSequenceClassification}
every_class = pytest.mark.parametrize("kind", CLASSES)
SENTINEL = 1234.5


@pytest.fixture
def build(tiny_config: Callable[..., ClipCaCgConfig]) -> Build:
    """A function that makes a tiny model of a class and a variant; keywords override config fields."""

    def make(kind: str, variant: str, **overrides: object) -> ClipCaCgPreTrainedModel:
        return CLASSES[kind](tiny_config(**{**VARIANTS[variant], **overrides})).eval()

    return make


@torch.no_grad()
def main_output(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs)["logits" if hasattr(model, "classifier") else "fused_embeds"]


def step(model: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    """Gradients of one backward pass, with the same dropout every time."""
    torch.manual_seed(0)
    model.train().zero_grad()
    output = model(**inputs, labels=LABELS) if hasattr(model, "classifier") else model(**inputs)
    contrastive = output.get("contrastive_loss")
    loss = output.loss if "loss" in output else output.fused_embeds.square().sum()
    (loss if contrastive is None else loss + contrastive).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@every_class
@every_variant
def test_the_rules_of_initialisation_leave_no_parameter_out(build: Build, kind: str, variant: str) -> None:
    """test_can_init_all_missing_weights: on memory that holds anything, as `from_pretrained` builds on meta."""
    model, fresh = build(kind, variant), build(kind, variant)
    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        vars(part).pop("_is_hf_initialized", None)  # transformers' mark of what it need not do again
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(SENTINEL)
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert not (parameter == SENTINEL).any() and parameter.isfinite().all(), name
        wanted = fresh.get_parameter(name)
        if wanted.std(correction=0) == 0:  # a constant is the same constant whoever sets it
            assert torch.equal(parameter, wanted), name
        else:
            factor = 1.5 if wanted.numel() >= 100 else 4
            assert 1 / factor < parameter.std() / wanted.std() < factor, name


@every_class
@every_variant
def test_nothing_random_is_left_in_evaluation_mode(build: Build, inputs: Inputs, kind: str, variant: str) -> None:
    """test_determinism; and in training mode dropout does something."""
    model = build(kind, variant)
    assert torch.equal(main_output(model, inputs), main_output(model, inputs))
    torch.manual_seed(1)
    model.train()
    assert not torch.equal(main_output(model, inputs), main_output(model, inputs))


@every_class
@every_variant
def test_one_config_for_the_model_and_its_parts(build: Build, kind: str, variant: str) -> None:
    """test_internal_model_config_and_subconfig_are_same: a change of the one is a change of the other."""
    model = build(kind, variant)
    config, parts = model.config, model.backbones()
    assert all(part.config is config for part in model.modules() if isinstance(part, ClipCaCgPreTrainedModel))
    wanted = {"text": config.text_config, "vision": config.vision_config}
    wanted |= {f"clip.{side}": getattr(config.clip_config, f"{side}_config") for side in ("text", "vision")}
    assert all(part.config is wanted[name] for name, part in parts.items())


@every_class
@every_variant
def test_the_base_class_in_shards_and_back(
    build: Build, inputs: Inputs, kind: str, variant: str, tmp_path: Path
) -> None:
    """Each class saves in shards, and each reads what the other saved, by its Auto class too."""
    model = build(kind, variant)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict()) and not list(tmp_path.glob("*.bin"))
    fused = model(**inputs).fused_embeds
    autos = {ClipCaCgModel: AutoModel, ClipCaCgForSequenceClassification: AutoModelForSequenceClassification}
    head = {"classifier.weight", "classifier.bias"}
    for cls, auto in autos.items():
        for loader in (cls, auto):
            loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
            assert type(loaded) is cls and not loaded.training
            more = cls is ClipCaCgForSequenceClassification and kind == "base"
            assert info["missing_keys"] == (head if more else set()) and not info["mismatched_keys"]
            assert_close(loaded(**inputs).fused_embeds, fused)


@every_variant
def test_another_size_is_refused_unless_it_was_asked_for(build: Build, variant: str, tmp_path: Path) -> None:
    """test_load_with_mismatched_shapes: what does not fit is told, and drawn anew if the caller says so."""
    model = build("classifier", variant)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, num_labels=5)
    loaded, info = type(model).from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert loaded.classifier.weight.shape == (5, 16) and 0 < loaded.classifier.weight.std() < 1
    assert loaded.config.id2label == {index: f"LABEL_{index}" for index in range(5)}
    assert_close(loaded.model.state_dict(), model.model.state_dict())
    narrow = {"text_config": {**model.config.text_config.to_dict(), "vocab_size": 70}}
    if variant != "image":
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            ClipCaCgModel.from_pretrained(tmp_path, **narrow)


@every_class
@every_variant
def test_a_type_is_kept_on_disk_and_back(
    build: Build, inputs: Inputs, kind: str, variant: str, tmp_path: Path
) -> None:
    """test_load_save_without_changing_dtype: `dtype="auto"` is what was saved."""
    half = torch.float16 if kind == "base" else torch.bfloat16
    model = build(kind, variant).to(half)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    assert {value.dtype for value in stored if value.is_floating_point()} == {half}
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {half} == {loaded.dtype}
    assert main_output(loaded, inputs).dtype == half and torch.equal(
        main_output(loaded, inputs), main_output(model, inputs)
    )
    assert type(model).from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@every_class
@every_variant
def test_copies_are_independent(build: Build, inputs: Inputs, kind: str, variant: str) -> None:
    model = build(kind, variant)
    before = main_output(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(main_output(twin, inputs), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(main_output(model, inputs), before) and twin.config is not model.config


@every_class
@every_variant
def test_rows_of_a_batch_do_not_know_of_each_other(build: Build, inputs: Inputs, kind: str, variant: str) -> None:
    """test_batching_equivalence, for all outputs and not the logits alone; a loss is of the batch."""
    model = build(kind, variant)
    asked = {"output_attentions": True, "output_hidden_states": True}
    together = model(**inputs, **asked)
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}, **asked)
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            if name != "contrastive_loss":
                for one, several in zip(as_tuple(value), as_tuple(together[name]), strict=True):
                    assert_close(one[0], several[row], rtol=0, atol=1e-5)


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@every_class
@every_variant
def test_how_many_attentions_and_hidden_states_there_are(
    build: Build, inputs: Inputs, kind: str, variant: str
) -> None:
    """test_attention_outputs and test_hidden_states_output: asked for in the call or in the config, or not at all."""
    model = build(kind, variant, attn_implementation="eager")  # transformers takes the config's word only then
    attends, reads = variant not in ("no_ca", "image", "text"), {"image": ("image",), "text": ("text",)}
    asked = model(**inputs, output_attentions=True, output_hidden_states=True)
    model.config.output_attentions = model.config.output_hidden_states = True
    by_config = model(**inputs)
    assert by_config.keys() == asked.keys()
    model.config.output_attentions = model.config.output_hidden_states = False
    without = model(**inputs).keys()
    for side in ("image", "text"):
        there = side in reads.get(variant, ("image", "text"))
        assert (f"{side}_attentions" in asked.keys()) == attends
        states = asked.get(f"{side}_hidden_states", ())
        assert len(states) == (0 if not there else 1 if variant in reads else 2)
        length = 16 if side == "image" else 9
        assert all(state.shape == (3, length, 16) for state in states)
        assert not {f"{side}_attentions", f"{side}_hidden_states"} & set(without)


@pytest.mark.filterwarnings("ignore:.*_checkpointing:FutureWarning")  # the names that every release has
@every_class
@every_variant
def test_checkpointing_goes_on_and_off(build: Build, inputs: Inputs, kind: str, variant: str) -> None:
    """test_training_gradient_checkpointing, reentrant or not, for the base class as well; then off again."""
    model = build(kind, variant)
    plain = {name: None if grad is None else grad.clone() for name, grad in step(model, inputs).items()}
    for reentrant in (False, True):
        # Reentrant checkpoints need an input with a gradient, as the Trainer and PEFT arrange it.
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and variant != "image":
            model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert_close(step(model, inputs), plain)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_close(step(model, inputs), plain)


@every_class
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "image"])
def test_embeddings_grow_shrink_and_are_padded(build: Build, inputs: Inputs, kind: str, variant: str) -> None:
    """test_resize_tokens_embeddings: what stays keeps its rows, and the config says what there is."""
    model = build(kind, variant)
    inputs["input_ids"].clamp_(max=49)
    before, output = model.get_input_embeddings().weight.detach().clone(), main_output(model, inputs)
    for size, multiple, rows in ((70, None, 70), (65, 16, 80), (50, None, 50)):
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
        weight = model.get_input_embeddings().weight
        assert weight.shape == (rows, 16) and model.config.text_config.vocab_size == rows
        assert torch.equal(weight[:50], before[:50]) and weight.isfinite().all()
        assert_close(main_output(model, inputs), output)
        trained = copy.deepcopy(model)  # BatchNorm would remember the step
        step(trained, inputs)
        assert trained.get_input_embeddings().weight.grad.shape == (rows, 16)
    with pytest.raises(IndexError):
        model(**{**inputs, "input_ids": inputs["input_ids"].clamp(max=49) + 40})


@every_class
@every_variant
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_are_fetched_when_they_are_needed(
    build: Build, inputs: Inputs, kind: str, variant: str, where: str, tmp_path: Path
) -> None:
    """test_cpu_offload and test_disk_offload_safetensors: every weight is elsewhere between two calls."""
    model = build(kind, variant)
    before = main_output(model, inputs)
    if where == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for _ in range(2):
        with torch.no_grad():
            assert_close(main_output(model, inputs), before)


@every_class
@every_variant
@pytest.mark.parametrize("choice", ["eager", "sdpa"])
def test_attention_is_switched_in_every_variant(
    build: Build, inputs: Inputs, kind: str, variant: str, choice: str, tmp_path: Path
) -> None:
    """The modes are in test_modeling.py; here ablations, the base class, and a refusal that changes nothing."""
    model = build(kind, variant)
    before = main_output(model, inputs)
    model.set_attn_implementation(choice)
    used = [model.config, *(part.config for name, part in model.backbones().items() if name != "vision")]
    assert {config._attn_implementation for config in used} == {choice}
    assert_close(main_output(model, inputs), before, rtol=0, atol=1e-5)
    with pytest.raises((ImportError, ValueError)):
        model.set_attn_implementation("no_such_attention")
    assert {config._attn_implementation for config in used} == {choice}
    assert model.backbones().keys() == build(kind, variant).backbones().keys()  # the vision encoder is back
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()


@every_class
@every_variant
def test_it_writes_no_texts_and_says_what_it_reads(build: Build, kind: str, variant: str) -> None:
    model = build(kind, variant)
    assert not model.can_generate() and model.get_output_embeddings() is None
    assert model.main_input_name in model.config.required_inputs
    assert set(model.config.required_inputs) <= set(make_inputs([1], [2]))


@every_class
@pytest.mark.parametrize("variant", ["encoder", "image"])
def test_adapters_of_both_classes_and_without_a_text(
    build: Build, inputs: Inputs, kind: str, variant: str, tmp_path: Path
) -> None:
    """test_lora has the classifier's texts: here the base class as features, and convolutions; merged, unmerged."""
    peft = pytest.importorskip("peft")
    modules = {"image": ["convolution"], "encoder": ["q_proj", "value"]}[variant]
    task = "FEATURE_EXTRACTION" if kind == "base" else "SEQ_CLS"
    base = build(kind, variant)
    before = main_output(base, inputs)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, r=2, target_modules=modules)).eval()
    assert_close(main_output(model, inputs), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = model(**inputs).fused_embeds
    assert (adapted - build(kind, variant)(**inputs).fused_embeds).abs().max() > 1e-4
    model.merge_adapter()
    assert_close(model(**inputs).fused_embeds, adapted, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    assert_close(model(**inputs).fused_embeds, adapted, rtol=0, atol=1e-4)
    merged = model.merge_and_unload()
    assert type(merged) is CLASSES[kind]
    merged.save_pretrained(tmp_path)
    loaded = CLASSES[kind].from_pretrained(tmp_path)
    assert_close(loaded(**inputs).fused_embeds, adapted, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao takes its place some day
@pytest.mark.parametrize("variant", ["encoder", "none", "text"])
def test_encoders_in_8_bits_by_torch_alone(build: Build, inputs: Inputs, variant: str) -> None:
    """torch's own dynamic quantization, which needs no other library; that of torchao has a file of its own."""
    model = build("classifier", variant)
    small, quantized = copy.deepcopy(model), torch.ao.nn.quantized.dynamic.Linear
    for name, encoder in model.backbones().items():
        if name != "vision":  # convolutions alone
            before = sum(isinstance(module, nn.Linear) for module in encoder.modules())
            torch.ao.quantization.quantize_dynamic(small.backbones()[name], {nn.Linear}, torch.qint8, inplace=True)
            assert sum(isinstance(module, quantized) for module in small.backbones()[name].modules()) == before > 0
    with torch.no_grad():
        assert 0 < (small(**inputs).logits - model(**inputs).logits).abs().max() < 0.05


def test_key_biases_are_all_that_a_softmax_does_not_feel(build: Build, inputs: Inputs) -> None:
    """What test_gradients_reach_every_parameter lets pass is no more than it says."""
    excused = [name for name, grad in step(build("classifier", "encoder"), inputs).items() if grad.abs().max() < 1e-7]
    assert excused and all(name.endswith(KEY_BIASES) for name in excused)


# ---- the config ----------------------------------------------------------------------------------------------------


@every_variant
def test_a_config_in_every_form(tiny_config: Callable[..., ClipCaCgConfig], variant: str, tmp_path: Path) -> None:
    """ConfigTester: to_json_string, to_json_file, to_dict, to_diff_dict, a deep copy, a subfolder."""
    config = tiny_config(**VARIANTS[variant], unknown={"deep": [1, {"er": None}]}, dropout=0.125)
    config.clip_config.vision_config.patch_size = 8
    wanted = config.to_dict()
    config.to_json_file(tmp_path / "all.json", use_diff=False)
    config.to_json_file(tmp_path / "changed.json")
    config.save_pretrained(tmp_path / "deep" / "er")
    ways = {
        "string": ClipCaCgConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        "difference": ClipCaCgConfig.from_dict(json.loads(config.to_json_string())),
        "file": ClipCaCgConfig.from_json_file(tmp_path / "all.json"),
        "changes": ClipCaCgConfig.from_json_file(tmp_path / "changed.json"),
        "dict": ClipCaCgConfig.from_dict(config.to_dict()),
        "to_diff_dict": ClipCaCgConfig.from_dict(config.to_diff_dict()),
        "copy": copy.deepcopy(config),
        "subfolder": ClipCaCgConfig.from_pretrained(tmp_path / "deep", subfolder="er"),
        "auto": AutoConfig.from_pretrained(tmp_path / "deep" / "er"),
    }
    for way, other in ways.items():
        assert without_notes(other.to_dict()) == without_notes(wanted), way
        assert other.unknown == {"deep": [1, {"er": None}]} and other.clip_config.vision_config.patch_size == 8
        other.text_config.vocab_size = 99  # ... and none shares a part with the first
    assert config.text_config.vocab_size == 60 and config == copy.deepcopy(config)


def without_notes(fields: dict[str, Any]) -> dict[str, Any]:
    """A config's values without what saving and loading note in it."""
    return {k: v for k, v in fields.items() if k not in ("auto_map", "custom_pipelines", "_name_or_path")}


def test_asking_for_a_dict_changes_no_config(tiny_config: Callable[..., ClipCaCgConfig]) -> None:
    config = tiny_config()
    config.text_config._name_or_path = "/somewhere/here"
    before = config.to_dict()
    config.to_diff_dict(), config.to_json_string(), repr(config)
    assert config.to_dict() == before and config.text_config._name_or_path == "/somewhere/here"


def test_a_config_takes_what_every_config_takes(tiny_config: Callable[..., ClipCaCgConfig]) -> None:
    """create_and_test_config_common_properties and check_config_arguments_init."""
    fields = {"output_hidden_states": True, "return_dict": False, "problem_type": "regression", "num_labels": 1}
    config = tiny_config(**fields, dtype="float16", architectures=["X"])
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.dtype in (torch.float16, "float16") and config.architectures == ["X"]
    assert ClipCaCgConfig.from_dict(config.to_dict()).return_dict is False
    rest = ClipCaCgConfig.from_dict(config.to_dict(), return_unused_kwargs=True, dropout=0.25, foo=False)
    assert (rest[0].dropout, rest[1]) == (0.25, {"foo": False})
    with pytest.raises(TypeError):
        ClipCaCgConfig(*[None] * 30)


# ---- the processor -------------------------------------------------------------------------------------------------


@pytest.fixture
def processor(checkpoint: Path) -> ClipCaCgProcessor:
    return ClipCaCgProcessor.from_pretrained(checkpoint)


def test_a_processor_in_every_form(processor: ClipCaCgProcessor, tmp_path: Path) -> None:
    """test_processor_to_json_string, test_processor_from_and_save_pretrained, also by AutoProcessor."""
    written = json.loads(processor.to_json_string())
    processor.to_json_file(tmp_path / "processor.json")
    assert json.loads((tmp_path / "processor.json").read_text()) == written
    processor.save_pretrained(tmp_path / "saved")
    again, auto = (cls.from_pretrained(tmp_path / "saved") for cls in (ClipCaCgProcessor, AutoProcessor))
    assert type(auto) is ClipCaCgProcessor
    for other in (again, auto):
        assert json.loads(other.to_json_string()) == written
        assert other.model_input_names == processor.model_input_names
        for part in ("image_processor", "clip_image_processor"):
            assert getattr(other, part).to_dict() == getattr(processor, part).to_dict()
        for part in ("tokenizer", "clip_tokenizer"):
            mine, theirs = getattr(processor, part), getattr(other, part)
            assert mine.get_vocab() == theirs.get_vocab() and mine.model_max_length == theirs.model_max_length
    assert "- tokenizer: " in repr(processor) and "clip_image_processor" in repr(processor)


def test_defaults_of_the_parts_hold_until_a_keyword_says_otherwise(processor: ClipCaCgProcessor) -> None:
    """test_tokenizer_defaults_preserved_by_kwargs, test_image_processor_defaults_preserved_by_image_kwargs."""
    picture = torch.full((3, 50, 50), 200, dtype=torch.uint8)
    processor.tokenizer.padding_side = "left"
    processor.image_processor.do_rescale, processor.image_processor.do_normalize = True, False
    data = processor(images=[picture] * 2, text=["a", "a b c d"], return_tensors="pt")
    assert data["attention_mask"][0, 0] == 0 and data["pixel_values"].max() <= 1
    data = processor(images=[picture] * 2, text=["a", "a b c d"], padding_side="right", do_rescale=False)
    assert data["attention_mask"][0][0] == 1 and torch.as_tensor(data["pixel_values"][0]).max() > 100
    again = processor(images=[picture] * 2, text=["a", "a b c d"], return_tensors="pt")  # nothing was remembered
    assert again["attention_mask"][0, 0] == 0 and again["pixel_values"].max() <= 1


def test_keywords_by_kind_are_refused_by_name(processor: ClipCaCgProcessor) -> None:
    """test_structured_kwargs_nested of processors that route by kind; ours takes the flat names alone, and says so."""
    for keywords in ({"text_kwargs": {"padding": True}}, {"images_kwargs": {"size": 4}}, {"common_kwargs": {}}):
        with pytest.raises(TypeError, match=f"{next(iter(keywords))}: no such keyword"):
            processor(text="a", **keywords)


def test_it_has_no_chat_and_decodes_what_it_encoded(processor: ClipCaCgProcessor) -> None:
    with pytest.raises(ValueError, match="chat template"):
        processor.apply_chat_template([{"role": "user", "content": "hello"}])
    ids = processor(text=["so happy today", "sad"])["input_ids"]
    decoded = processor.batch_decode(ids, skip_special_tokens=True)
    assert [text.strip() for text in decoded] == ["so happy today", "sad"]
    assert processor.decode(ids[1], skip_special_tokens=True).strip() == "sad"


def test_one_post_is_a_batch_of_one(processor: ClipCaCgProcessor) -> None:
    picture = torch.zeros((3, 50, 50), dtype=torch.uint8)
    one, listed = (processor(images=i, text=t, return_tensors="pt") for i, t in ((picture, "a"), ([picture], ["a"])))
    assert list(one) == list(listed) == processor.model_input_names
    assert all(torch.equal(one[name], listed[name]) and len(one[name]) == 1 for name in one)
    half = one.to(torch.bfloat16)
    assert half["pixel_values"].dtype == half["clip_pixel_values"].dtype == torch.bfloat16
    assert half["input_ids"].dtype == half["clip_attention_mask"].dtype == torch.int64
