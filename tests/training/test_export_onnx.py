"""The ONNX file gives the model's logits for any number of posts and tokens, and predict.py its answers."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import TRANSFORMER, make_inputs

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
from clipcacg.processing_clipcacg import ClipCaCgProcessor, modality_scores  # noqa: E402
from clipcacg.scripts import export_onnx, predict  # noqa: E402
from clipcacg.scripts.training.onnx_export import OnnxModel  # noqa: E402

pytestmark = pytest.mark.slow  # an export takes ten seconds

ONE_LAYER = {**TRANSFORMER, "num_hidden_layers": 1}
BOTH = ["input_ids", "attention_mask", "pixel_values"]
CLIP = ["clip_input_ids", "clip_attention_mask", "clip_pixel_values"]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        pytest.param({"use_modality_heads": True, "modality_combination": "average"}, BOTH + CLIP, id="encoder"),
        pytest.param(
            {"clip_mode": "feature", "modality_dropout": 0.1, "use_modality_heads": True},
            [*BOTH, "has_image"],
            id="feature",
        ),
    ],
)
def test_the_file_gives_the_models_logits(
    tiny_config: Callable[..., ClipCaCgConfig], fields: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    text = {"model_type": "roberta", "vocab_size": 60, "max_position_embeddings": 42, **ONE_LAYER}
    model = ClipCaCgForSequenceClassification(tiny_config(text_config=text, **fields)).eval()
    example = make_inputs([6, 2], [5, 3]) | {"has_image": torch.tensor([1, 0])}
    file = tmp_path / "model.onnx"
    export_onnx.export(model, {name: example[name] for name in names}, file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(file)
    assert {given.name: given.shape[:2] for given in session.get_inputs()} == {
        name: ["batch", 3 if "pixel" in name else "clip_text_len" if "clip" in name else "text_len"] for name in names
    } | ({"has_image": ["batch"]} if "has_image" in names else {})
    assert_same_logits(model, names, file)


def assert_same_logits(model: ClipCaCgForSequenceClassification, names: list[str], file: Path) -> None:
    for lengths, clip_lengths in (([9, 5, 1], [7, 4, 2]), ([1], [2]), ([3] * 7, [2] * 7), ([40, 1], [20, 4])):
        inputs = make_inputs(lengths, clip_lengths)
        inputs["attention_mask"][0, 0] = 0  # padding on the left too, and the text of one token is all padding
        inputs |= {"has_image": torch.arange(len(lengths)) % 2}
        inputs = {name: inputs[name] for name in names}
        assert export_onnx.largest_difference(model, inputs, file) < export_onnx.TOLERANCE
        if model.config.use_modality_heads:
            ours, theirs = (modality_scores(run(**inputs), model.config) for run in (model, OnnxModel(model, file)))
            for our, their in zip(ours, theirs, strict=True):
                assert [our[side] is None for side in our] == [their[side] is None for side in their]


def test_an_exported_gru_is_one_operator_and_the_model_stays_as_it_was(
    tiny_config: Callable[..., ClipCaCgConfig], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    text = {"model_type": "distilbert", "vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    model = ClipCaCgForSequenceClassification(tiny_config(text_config=text, modality="text")).eval()
    example = {name: make_inputs([6, 2], [5, 3])[name] for name in BOTH[:2]}
    before, state = model(**example).logits, {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx.export(model, example, tmp_path / "model.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert_same_logits(model, BOTH[:2], tmp_path / "model.onnx")
    assert operators.count("GRU") == 2 and not {"Loop", "Scan"} & set(operators)
    assert torch.equal(model(**example).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_script(
    checkpoint: Path,
    posts_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It writes the file, ends with an error if the file gives other logits, and predict.py answers from the file."""
    monkeypatch.setattr(export_onnx, "TOLERANCE", -1.0)  # no difference is as small
    with pytest.raises(SystemExit, match="is not the model"):
        export_onnx.main([str(checkpoint), "-o", str(tmp_path / "new/model.onnx")])
    assert (tmp_path / "new/model.onnx").is_file() and "on 5 other posts" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["export_onnx.py"])
    with pytest.raises(SystemExit, match="export_onnx.py: "):
        export_onnx.main([str(tmp_path / "nothing")])

    file, found = tmp_path / "new/model.onnx", {}
    for name, flags in (("torch", []), ("onnx", ["--onnx", str(file)])):
        output = tmp_path / f"{name}.jsonl"
        predict.main([str(checkpoint), "--input", str(posts_folder), "--output", str(output), *flags])
        found[name] = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(found["torch"]) == len(found["onnx"]) > 10
    for ours, theirs in zip(found["torch"], found["onnx"], strict=True):
        assert ours["id"] == theirs["id"] and ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    assert any(ours["probabilities"] != found["torch"][0]["probabilities"] for ours in found["torch"])

    model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        next(model.model.text_branch.backbone.parameters()).add_(1)
    model.save_pretrained(tmp_path / "other")
    ClipCaCgProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "other")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    for folder, flags, reason in (
        (tmp_path / "other", ["--onnx", str(file)], "was not made of this checkpoint"),
        (checkpoint, ["--onnx", str(tmp_path / "none.onnx")], "There is no file"),
        (checkpoint, ["--onnx", str(tmp_path / "broken.onnx")], "no ONNX file that can be read"),
        (checkpoint, ["--onnx", str(file), "--bf16"], "leave out --bf16"),
    ):
        with pytest.raises(SystemExit, match=reason):
            predict.main([str(folder), "--input", str(posts_folder), "--output", str(tmp_path / "no.jsonl"), *flags])
