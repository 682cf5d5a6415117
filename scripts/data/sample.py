"""Make the sample, a small data set with tiny encoders to train on, from a seed.

`make_sample` writes drawn images and templated tweets in the layout of MVSA-Single. `make_tiny_backbones` writes tiny
random encoders of the real families as ordinary Hugging Face folders. The label of a post follows from its text label
and its image label by the paper's rule, so one modality does not determine it: a model that reads one of them without
error gets 5 of 7 posts right. The sample shows that the code learns; it says nothing about real tweets.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers as hf
from filelock import FileLock
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from clipcacg.scripts.data.drawing import draw_image, encode_tweet, write_tweet
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.mvsa import LABEL_FILE, LABELS, combine_labels

# (text label, image label), by index in LABELS: the pairs that the rule of `combine_labels` keeps, and those it drops.
PAIRS = list(product(range(len(LABELS)), range(len(LABELS))))
KEPT_PAIRS = [(text, image) for text, image in PAIRS if combine_labels(LABELS[text], LABELS[image]) is not None]
DROPPED_PAIRS = [pair for pair in PAIRS if pair not in KEPT_PAIRS]
IMAGE_SIZE = 64  # height and width of the tiny encoders' input, in pixels
NUM_MERGES = 700  # enough for most words of the tweets to be one token
TRANSFORMER_SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
# Written last, so a folder that holds it is complete. It records what the folder was made from.
MARKER = "sample.json"


def make_sample(folder: str | Path, num_posts: int = 800, seed: int = 0) -> Path:
    """Write a sample in the layout of MVSA-Single, unless it is there already.

    Args:
        folder (`str` or `Path`): receives `labelResultAll.txt`, `data/<ID>.txt` and `data/<ID>.jpg`.
        num_posts (`int`): number of posts. One in forty is positive against negative, which the labelling rule drops;
            the other pairs of labels are equally frequent.
        seed (`int`): the same seed gives the same bytes.

    Returns:
        `Path`: the absolute path of the folder.

    Raises:
        InputError: the folder holds something else.

    Source: our choice; the labelling rule is the paper's, section IV.A.
    """
    return _build_once(
        folder, {"num_posts": num_posts, "seed": seed}, lambda path: _write_posts(path, num_posts, seed)
    )


def make_tiny_backbones(folder: str | Path, seed: int = 0) -> Path:
    """Write tiny random encoders of the real families, unless they are there already.

    Args:
        folder (`str` or `Path`): receives `text` (RoBERTa, 128 tokens), `vision` (ResNet, 4 x 4 regions) and `clip`
            (CLIP, 77 tokens, 4 x 4 patches), each with its tokenizer or image processor, for the Auto classes to load.
        seed (`int`): the same seed gives the same bytes. The state of torch's random number generator is kept.

    Returns:
        `Path`: the absolute path of the folder.

    Raises:
        InputError: the folder holds something else.

    Source: our choice: sizes and initialisation that train on a few hundred posts within seconds.
    """
    return _build_once(folder, {"seed": seed}, lambda path: _write_backbones(path, seed))


def _build_once(folder: str | Path, parameters: dict[str, int], fill: Callable[[Path], None]) -> Path:
    """Fill a folder, unless it was already filled with the same parameters by the same code.

    The files are written to a hidden sibling that is renamed at the end, so no process sees half a sample. The lock
    makes the processes of one `accelerate launch` wait for the first; the system frees it when its holder dies.
    """
    folder = Path(folder).absolute()
    sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("sample.py", "drawing.py"))
    marker = json.dumps({**parameters, "sources": hashlib.sha256(sources).hexdigest()})
    if _is_made(folder, marker):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, stale, lock = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "stale", "lock"))
    with FileLock(lock):
        if _is_made(folder, marker):
            return folder
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
            raise InputError(f"{folder} holds something that is not a sample: empty it or name another folder.")
        for leftover in (partial, stale):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        (partial / MARKER).write_text(marker, encoding="utf-8")
        if folder.exists():
            folder.rename(stale)
        partial.rename(folder)
        shutil.rmtree(stale, ignore_errors=True)
    return folder


def _is_made(folder: Path, marker: str) -> bool:
    return (folder / MARKER).is_file() and (folder / MARKER).read_text(encoding="utf-8") == marker


def _write_posts(folder: Path, num_posts: int, seed: int) -> None:
    (folder / "data").mkdir()
    rows = ["ID\ttext,image"]
    for number, (text_label, image_label) in enumerate(_draw_labels(num_posts, seed), start=1):
        rng = Random(f"post {number}, seed {seed}")
        rows.append(f"{number}\t{LABELS[text_label]},{LABELS[image_label]}")
        (folder / f"data/{number}.txt").write_bytes(encode_tweet(write_tweet(text_label, rng), rng))
        draw_image(image_label, rng).save(folder / f"data/{number}.jpg", quality=85)
    (folder / LABEL_FILE).write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def _draw_labels(num_posts: int, seed: int) -> list[tuple[int, int]]:
    """Draw the (text, image) labels of every post, 0 negative, 1 neutral, 2 positive, in random order."""
    dropped = num_posts // 40
    pairs = [KEPT_PAIRS[i % 7] for i in range(num_posts - dropped)] + [DROPPED_PAIRS[i % 2] for i in range(dropped)]
    Random(f"labels, seed {seed}").shuffle(pairs)
    return pairs


def _write_backbones(folder: Path, seed: int) -> None:
    rng = Random(f"backbones, seed {seed}")
    tweets = [write_tweet(number % 3, rng) for number in range(600)]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        _save_text(folder / "text", tweets)
        _save_vision(folder / "vision")
        _save_clip(folder / "clip", tweets)


def _learn_bpe(blank: hf.PreTrainedTokenizerBase, tweets: list[str], suffix: str = "") -> tuple[list[str], list[Any]]:
    """Learn a byte-level vocabulary that spells any text.

    Args:
        blank: an empty tokenizer of the wanted class, which normalises and splits the tweets.
        tweets: the texts to learn from.
        suffix: marks the end of a word in this class, if anything does.

    Returns:
        The tokens, every byte first, and the merges in order.
    """
    alphabet = sorted(ByteLevel.alphabet())
    # The trainer numbers word endings in an order that differs between runs, and breaks ties by number, unless they
    # are special tokens. Every byte may end a word, not only those that did in the tweets.
    endings = [byte + suffix for byte in alphabet] if suffix else []
    settings: dict[str, Any] = {"end_of_word_suffix": suffix} if suffix else {}
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + len(endings) + NUM_MERGES,
        initial_alphabet=alphabet,
        special_tokens=endings,
        show_progress=False,
        **settings,
    )
    blank.backend_tokenizer.train_from_iterator(tweets, trainer)
    merges = [tuple(pair) for pair in json.loads(blank.backend_tokenizer.to_str())["model"]["merges"]]
    return list(dict.fromkeys(alphabet + endings + [left + right for left, right in merges])), merges


def _save_text(folder: Path, tweets: list[str]) -> None:
    tokens, merges = _learn_bpe(hf.RobertaTokenizer(), tweets)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]  # IDs 0 to 3 as in roberta-base
    vocab = {token: index for index, token in enumerate(tokens)}
    hf.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=128).save_pretrained(folder)
    config = hf.RobertaConfig(
        vocab_size=len(vocab),
        max_position_embeddings=130,  # RoBERTa counts positions from 2
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=0.1,
        **TRANSFORMER_SIZES,
    )
    hf.RobertaModel(config).save_pretrained(folder)


def _save_vision(folder: Path) -> None:
    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    hf.ResNetModel(config).save_pretrained(folder)
    hf.ConvNextImageProcessor(size={"shortest_edge": IMAGE_SIZE}).save_pretrained(folder)


def _save_clip(folder: Path, tweets: list[str]) -> None:
    tokens, merges = _learn_bpe(hf.CLIPTokenizer(), tweets, suffix="</w>")
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    hf.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)
    end = len(vocab) - 1  # CLIP pools at the first end token and pads with more of them
    sizes = {**TRANSFORMER_SIZES, "projection_dim": 32}
    text = {**sizes, "vocab_size": len(vocab), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    # With the default factor a random ViT's outputs are too small to learn from a few hundred images.
    vision = {**sizes, "image_size": IMAGE_SIZE, "patch_size": 16, "initializer_factor": 2.0}
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    hf.CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop).save_pretrained(folder)
