"""What transformers' own test suite asks of every processor; the names of its tests are in the docstrings."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from clipcacg.processing_clipcacg import ClipCaCgProcessor


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
        with pytest.raises(TypeError, match=f"Unknown keyword {next(iter(keywords))}"):
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
