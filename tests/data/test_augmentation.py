"""Random changes of training posts."""

from pathlib import Path

import numpy as np
import torch
from inputs import flags
from PIL import Image

from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.augmentation import Augmentation, augment_text
from clipcacg.scripts.data.labels import label_fields
from clipcacg.scripts.training import run
from clipcacg.scripts.training.arguments import parse_arguments


def test_words_are_deleted_and_swapped_and_one_stays() -> None:
    words = [f"w{number}" for number in range(200)]
    changed = augment_text(" ".join(words)).split()
    assert len(changed) == len(set(changed)) and set(changed) < set(words)
    assert 0.8 < len(changed) / 200 < 0.97
    moved = sum(word != expected for word, expected in zip(changed, sorted(changed, key=words.index), strict=True))
    assert 0.08 < moved / 200 < 0.35
    for text in ("", " ", "alone", "a b"):
        for _ in range(50):
            new = augment_text(text, rate=0.9)
            assert bool(new.split()) == bool(text.split()) and set(new.split()) <= set(text.split())
    assert augment_text("alone ") == "alone " and augment_text("a b", rate=0) == "a b"


def test_only_training_posts_change_and_anew_in_every_epoch(
    posts_folder: Path, backbones: Path, tmp_path: Path
) -> None:
    model_arguments, data_arguments, arguments = parse_arguments(flags(posts_folder, backbones, tmp_path, "--augment"))
    posts = run.load_training_posts(model_arguments, data_arguments, arguments)
    model, processor = run.build(model_arguments, data_arguments.is_sample, label_fields(posts["train"]))
    trainer = run.make_trainer(arguments, model, processor, posts)
    plain = trainer.data_collator([posts["train"][number] for number in range(8)])
    first, second = (trainer.data_collator([trainer.train_dataset[n] for n in range(8)]) for _ in range(2))
    for name in ("pixel_values", "clip_pixel_values"):
        assert first[name].shape == plain[name].shape
        assert not torch.equal(first[name], second[name]) and not torch.equal(first[name], plain[name])
    assert first["input_ids"].tolist() != second["input_ids"].tolist() != plain["input_ids"].tolist()
    assert torch.equal(first["labels"], plain["labels"])
    one, other = (trainer.data_collator([trainer.eval_dataset[n] for n in range(8)]) for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_image_has_about_the_models_size_before_it_changes(checkpoint: Path, tmp_path: Path) -> None:
    processor = ClipCaCgProcessor.from_pretrained(checkpoint)
    Image.fromarray(np.full((300, 900), 40_000, dtype=np.uint16)).save(tmp_path / "wide.png")
    change = Augmentation(processor)
    changed = change({"image": [{"path": str(tmp_path / "wide.png"), "bytes": None}], "text": [None]})
    edge = processor.needed_edge({})
    assert changed["image"][0].size == (3 * edge, edge) and changed["image"][0].mode == "RGB"
    assert changed["text"] == [""]
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = {"path": str(tmp_path / "broken.png"), "bytes": None}
    assert change({"image": [broken, None]})["image"] == [broken, None]
