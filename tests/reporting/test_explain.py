"""Explanations: attributions that add up, weights at the right places, and a figure for every model."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("captum", reason='needs the extra "explain"')

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.explain import main
from clipcacg.scripts.reporting import explanation
from clipcacg.scripts.reporting.explanation import (
    Explanation,
    add_up,
    draw,
    explain,
    find_words,
    grid_shape,
    readable,
    summary,
    token_spans,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "explain.py"
TEXT = "RT @anna: I LOVE  the beach 😊 (again)…\n#photo http://t.co/k5bdsbEr8G"
WORDS = ["RT", "@anna:", "I", "LOVE", "the", "beach", "😊", "(again)…", "#photo", "http://t.co/k5bdsbEr8G"]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def make(backbones: Path) -> Callable[..., tuple[Any, Any]]:
    """A function that makes an untrained model and its processor; keywords are fields of the config."""

    def build(**fields: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        names = [backbones / part for part in ("text", "vision", "clip")]
        model = ClipCaCgForSequenceClassification.from_backbones(*names, hidden_size=32, **fields)
        if model.config.modality != "text":
            # An untrained projection maps a grey image to zeros, and scaling those to unit length has no gradient.
            torch.nn.init.normal_(model.base_model.image_branch.projection.bias)
        return model, ClipCaCgProcessor.from_backbones(*names)

    return build


@pytest.fixture(scope="module")
def explained(make: Callable, image: Image.Image) -> dict[str, Explanation]:
    return {mode: explain(*make(clip_mode=mode), image, TEXT) for mode in ("encoder", "feature", "none")}


@pytest.mark.parametrize("mode", ["encoder", "feature", "none"])
def test_the_attribution_adds_up_to_the_score(explained: dict[str, Explanation], mode: str) -> None:
    found = explained[mode].attribution
    assert found.total == pytest.approx(found.difference, rel=0.05, abs=0.01)
    assert abs(found.difference) > 0.01 and np.abs(found.words).sum() > 0.001
    assert list(found.regions) == ["the vision encoder", "CLIP"][: 2 if mode == "encoder" else 1]
    for heat_map in found.regions.values():
        assert heat_map.weights.shape == (4, 4) and np.abs(heat_map.weights).max() > 0


@pytest.mark.parametrize("mode", ["encoder", "feature", "none"])
def test_attention_is_that_of_the_model(explained: dict, make: Callable, image: Image.Image, mode: str) -> None:
    model, processor = make(clip_mode=mode)
    inputs = processor(images=image, text=TEXT, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs, output_attentions=True)
    for side, weights in (("text", outputs.text_attentions), ("image", outputs.image_attentions)):
        attention, mean = explained[mode].attention[side], weights[0].mean(dim=(0, 1))
        assert sum(attention.shares.values()) == pytest.approx(1, abs=1e-5)
        assert ("first token" in attention.shares) == (mode != "none")
        first = 0 if mode == "none" else 1
        torch.testing.assert_close(
            torch.from_numpy(attention.regions.weights.ravel()).float(), mean[first : first + 16]
        )
        # The second word is "@anna:", split into several tokens; markers around the text are left out.
        name = "clip_input_ids" if mode == "encoder" else "input_ids"
        owners = find_words(processor, TEXT, inputs)[1][name]
        words = mean[first + 16 :]
        expected = words[torch.from_numpy(owners == 1)].mean().item()
        assert attention.words[1] == pytest.approx(expected, rel=1e-4) and (owners == 1).sum() > 1
        assert attention.shares["words"] == pytest.approx(words[torch.from_numpy(owners >= 0)].sum().item(), rel=1e-4)


def test_the_rest_of_an_explanation(explained: dict, make: Callable, image: Image.Image) -> None:
    model, processor = make(clip_mode="encoder")
    inputs = processor(images=image, text=TEXT, return_tensors="pt")
    outputs = model(**inputs)
    found = explained["encoder"]
    assert list(found.scores) == ["negative", "neutral", "positive"]
    assert list(found.scores.values()) == pytest.approx(outputs.logits.softmax(dim=-1)[0].tolist(), abs=1e-6)
    assert found.predicted == max(found.scores, key=found.scores.get)
    assert found.gate == pytest.approx(outputs.gate.mean().item()) and found.balance == 0.5
    assert found.words == WORDS and found.modalities is None
    assert found.view.shape == (61, 61, 3)  # the image is 70 high, and ConvNext's processor crops 224/256 of it


def test_it_is_deterministic_and_leaves_the_model_unchanged(make: Callable, image: Image.Image) -> None:
    model, processor = make(clip_mode="feature")
    model.train()
    first, second = (explain(model, processor, image, TEXT) for _ in range(2))
    assert first.scores == second.scores and not model.training
    np.testing.assert_array_equal(first.attribution.words, second.attribution.words)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_what_a_model_reads_can_matter(make: Callable, image: Image.Image) -> None:
    """Without connections to the text no word moves the score, and the image regions account for all of it."""
    model, processor = make(clip_mode="none", use_cross_attention=False, use_gating=False)
    with torch.no_grad():
        first = model.base_model.fusion.mlp[0]
        first.weight[:, 32:64], first.weight[:, 96:] = 0, 0  # x = [image, text], then image, text
    found = explain(model, processor, image, TEXT)
    assert not found.attribution.words.any() and not found.attention
    total = found.attribution.regions["the vision encoder"].weights.sum()
    assert total == pytest.approx(found.attribution.difference, rel=0.05, abs=1e-3)


def test_a_word_between_markers_gets_all_of_the_text(make: Callable) -> None:
    model, processor = make(modality="text")
    found = explain(model, processor, text="wonderful").attribution
    assert found.words == pytest.approx([found.difference], rel=0.05)


@pytest.mark.parametrize(
    ("fields", "maps", "panels"),
    [
        ({"modality": "text"}, 0, 2),
        ({"use_cross_attention": False}, 2, 5),
        ({"use_gating": False}, 2, 9),
        ({"num_labels": 12, "clip_mode": "feature"}, 1, 8),
        ({"num_labels": 2, "problem_type": "multi_label_classification", "clip_mode": "none"}, 1, 8),
    ],
)
def test_every_model_has_a_figure(
    make: Callable, image: Image.Image, tmp_path: Path, fields: dict, maps: int, panels: int
) -> None:
    model, processor = make(**fields)
    found = explain(model, processor, image, TEXT)
    assert len(found.attribution.regions) == maps
    figure = draw(found)
    assert sum(axes.axison or bool(axes.images) for axes in figure.axes) == panels
    for axes in figure.axes:  # what is not attribution does not call itself so
        title = axes.get_title()
        assert title.startswith(("The part of the image", "PREDICTION", "ATTENTION", "ATTRIBUTION")) or not axes.axison
    figure.savefig(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 500


@pytest.mark.slow
def test_odd_texts_are_drawn(make: Callable, image: Image.Image, recwarn: pytest.WarningsRecorder) -> None:
    model, processor = make(clip_mode="feature")
    for text in ("", " \n ", "$\\bad{$ and $", "<b>&amp;</b> _a_ ^", "🎉" * 3 + " 好 日", "word " * 400, "a" * 5000):
        found = explain(model, processor, image, text)
        assert found.words == text.split() and len(found.attribution.words) == len(found.words)
        assert np.isfinite(found.attention["text"].words).all()
        draw(found).savefig(io.BytesIO())
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_words_of_any_tokenizer(make: Callable, image: Image.Image) -> None:
    _, processor = make(clip_mode="encoder")
    inputs = processor(images=image, text=TEXT, return_tensors="pt")
    words, owners = find_words(processor, TEXT, inputs)
    assert words == WORDS
    for name, tokenizer in (("input_ids", processor.tokenizer), ("clip_input_ids", processor.clip_tokenizer)):
        ids = inputs[name][0]
        assert len(owners[name]) == len(ids) and owners[name][0] == owners[name][-1] == -1
        assert set(owners[name]) == {-1, *range(len(WORDS))}
        for index, word in enumerate(WORDS):
            pieces = tokenizer.decode(ids[torch.from_numpy(owners[name] == index)].tolist())
            assert pieces.lower().replace(" ", "") == word.lower()


class SlowTokenizer:
    """Words in lower case, cut in two, in brackets; it does not know where they stood."""

    is_fast, all_special_ids = False, [0, 1]
    pieces = ["<s>", "</s>", "i", "lo", "ve", "the", "sea", "?"]

    def decode(self, ids: list[int]) -> str:
        return self.pieces[ids[0]]


def test_a_tokenizer_that_does_not_tell_positions() -> None:
    spans = token_spans(SlowTokenizer(), "I LOVE the  sea", [0, 2, 3, 4, 5, 7, 6, 1])
    assert spans == [(0, 0), (0, 1), (2, 4), (4, 6), (7, 10), (0, 0), (12, 15), (0, 0)]


def test_small_sums() -> None:
    assert add_up(np.array([1.0, 2, 4, 8]), np.array([-1, 0, 0, 2]), 3).tolist() == [6, 0, 8]
    assert grid_shape(49, 224, 224) == (7, 7)
    assert grid_shape(12, 96, 128) == (3, 4) and grid_shape(12, 128, 96) == (4, 3)


def test_what_the_font_lacks_is_named() -> None:
    assert readable("yay🎉️!") == "yay[party popper]…"
    assert readable("http://t.co/k5bdsbEr8G") == "http://t.co/k5bds…"
    assert readable("好日") == "□□" and readable("👍🏽") == "[thumbs up sign]□"


@pytest.mark.parametrize(
    ("fields", "image", "text", "sentence"),
    [
        ({}, None, "text", "This model needs an image."),
        ({}, None, None, "This model needs an image and a text."),
        ({"modality": "text"}, None, None, "This model needs a text."),
        ({}, "missing.jpg", "text", "There is no image 'missing.jpg'."),
    ],
)
def test_a_missing_part_is_named(make: Callable, fields: dict, image: Any, text: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        explain(*make(**fields), image, text)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("mode", ["encoder", "feature"])
def test_a_post_that_lacks_a_part(make: Callable, image: Image.Image, mode: str) -> None:
    """What is there is explained; nothing is said of the rest, and the figure has no panel for it."""
    model, processor = make(clip_mode=mode, modality_dropout=0.1)
    for missing in model.modules():
        if type(missing).__name__ == "MissingModality":
            torch.nn.init.normal_(missing.image)
            torch.nn.init.normal_(missing.text)
    without_image, without_text = explain(model, processor, None, TEXT), explain(model, processor, image, None)
    assert without_image.words == WORDS and without_image.view is None and not without_image.attribution.regions
    assert without_text.words is None and without_text.attribution.words is None and without_text.view is not None
    for found in (without_image, without_text):
        assert not found.attention and sum(found.scores.values()) == pytest.approx(1)
        assert found.attribution.total == pytest.approx(found.attribution.difference, abs=0.05)
        draw(found)
    with pytest.raises(InputError, match="This model needs an image and a text."):
        explain(model, processor)


def test_modality_heads_are_read(make: Callable, image: Image.Image) -> None:
    model, processor = make(clip_mode="feature", use_modality_heads=True, modality_dropout=0.1)
    with torch.no_grad():
        model.modality_heads.text.bias[2] += 4
        model.modality_heads.image.bias[0] += 4
    found = explain(model, processor, image, TEXT)
    outputs = model(**processor(images=image, text=TEXT, return_tensors="pt"))
    for side in ("text", "image"):
        scores = outputs[f"{side}_logits"].softmax(-1)[0].tolist()
        assert list(found.modalities[side].values()) == pytest.approx(scores, abs=1e-5)
    notes = f"conflict: {found.modalities['conflict']:.3f}"
    below = next(axes.get_xlabel() for axes in draw(found).axes if axes.get_title() == "PREDICTION")
    assert "text alone: positive 0." in below and "image alone: negative 0." in below and notes in below
    assert notes.replace(":", "") in summary(found) and found.modalities["conflict"] > 0.5
    without = explain(model, processor, None, TEXT)
    assert "text alone positive" in summary(without)
    assert "image alone" not in summary(without) and "conflict" not in summary(without)


def test_several_labels_get_independent_probabilities(make: Callable, image: Image.Image) -> None:
    model, processor = make(problem_type="multi_label_classification", clip_mode="none", num_labels=2)
    found = explain(model, processor, image, TEXT)
    logits = model(**processor(images=image, text=TEXT, return_tensors="pt")).logits[0]
    assert list(found.scores.values()) == pytest.approx(logits.sigmoid().tolist(), abs=1e-6)


def test_on_the_command_line(make: Callable, image: Image.Image, tmp_path: Path) -> None:
    model, processor = make(clip_mode="encoder")
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    image.save(tmp_path / "post.png")
    arguments = [str(tmp_path / "checkpoint"), "--text", TEXT, "--image"]
    done = commands.run([SCRIPT, *arguments, "post.png", "-o", "out.png"], tmp_path)
    assert done.stdout == f"{summary(explain(model, processor, image, TEXT))}\nThe image is in out.png.\n"
    assert Image.open(tmp_path / "out.png").width > 1500
    with pytest.raises(SystemExit, match="There is no image 'nothing.png'."):
        main([*arguments, "nothing.png"])
    with pytest.raises(SystemExit, match="--output .*out.xyz cannot be written"):
        main([*arguments, str(tmp_path / "post.png"), "-o", str(tmp_path / "out.xyz")])


def test_an_error_of_the_program_keeps_its_traceback(
    make: Callable, checkpoint: Path, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match="not int"):
        explain(*make(), 7, TEXT)
    monkeypatch.setattr(explanation, "GOLD", "no colour")
    image.save(tmp_path / "post.png")
    flags = ["--image", str(tmp_path / "post.png"), "--text", "a", "-o", str(tmp_path / "out.png")]
    with pytest.raises(ValueError, match="valid color|RGBA argument"):
        main([str(checkpoint), *flags])


def test_the_code_of_a_checkpoint_runs_only_on_request(checkpoint: Path, image: Image.Image, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "marked")
    with (folder / "modeling_clipcacg.py").open("a") as file:
        file.write(f"\nfrom pathlib import Path\n\nPath({str(tmp_path / 'mark')!r}).touch()\n")
    image.save(tmp_path / "post.png")
    flags = ["--image", str(tmp_path / "post.png"), "--text", "a", "-o", str(tmp_path / "out.png")]
    main([str(folder), *flags])
    assert not (tmp_path / "mark").exists()
    main([str(folder), *flags, "--trust_remote_code"])
    assert (tmp_path / "mark").exists()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "auto_map"}))
    with pytest.raises(SystemExit, match="holds no code: leave out --trust_remote_code"):
        main([str(folder), *flags, "--trust_remote_code"])
