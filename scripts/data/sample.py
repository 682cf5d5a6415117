"""Make a small sample to train on, posts and backbones, from nothing but a seed.

    python scripts/make_sample.py FOLDER

writes FOLDER/posts, drawn pictures and templated tweets in the layout of MVSA-Single, and FOLDER/backbones, tiny
random models of the real families as ordinary Hugging Face folders. A post's label follows from its text label and
its picture label by the paper's rule, so neither modality can tell it alone: whoever reads one of them without error
gets 5 of 7 posts right. The sample shows that the code learns; it says nothing about real tweets.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import transformers as hf
from filelock import FileLock
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from clipcacg.scripts.data.drawing import draw_picture, encode_tweet, write_tweet
from clipcacg.scripts.data.mvsa import LABELS

# (text, picture): the seven pairs that the labelling rule keeps, and the two that it drops.
KEPT_PAIRS = [(text, picture) for text in range(3) for picture in range(3) if abs(text - picture) < 2]
DROPPED_PAIRS = [(0, 2), (2, 0)]
PICTURE_SIZE = 64  # pixels a side that the tiny backbones look at
NUM_MERGES = 700  # enough for most words of the tweets to be one token
TRANSFORMER_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
# Written last, so a folder that holds it is complete. It says what the folder was made from.
MARKER = "sample.json"


def make_sample(folder: str | Path, num_posts: int = 800, seed: int = 0) -> Path:
    """Write a sample in the official layout of MVSA-Single, unless it is there already.

    Args:
        folder: Gets `labelResultAll.txt`, `data/<ID>.txt` and `data/<ID>.jpg`.
        num_posts: Posts to write. One in forty is positive against negative, which the labelling rule drops; the other
            pairs of labels are equally frequent.
        seed: The same seed gives the same bytes.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: If the folder holds something else.

    Source: our choice; the labelling rule is that of the paper, section IV.A.
    """
    return _build_once(
        folder, {"num_posts": num_posts, "seed": seed}, lambda path: _write_posts(path, num_posts, seed)
    )


def make_tiny_backbones(folder: str | Path, seed: int = 0) -> Path:
    """Write tiny random backbones of the real families, unless they are there already.

    Args:
        folder: Gets `text` (RoBERTa, 128 tokens), `vision` (ResNet, 4 x 4 regions) and `clip` (CLIP, 77 tokens, 4 x 4
            patches), each with its tokenizer or image processor, for the Auto classes to load.
        seed: The same seed gives the same bytes. torch's own generator is left as it was.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: If the folder holds something else.

    Source: our choice: sizes and initialisation that a few hundred posts train within seconds.
    """
    return _build_once(folder, {"seed": seed}, lambda path: _write_backbones(path, seed))


def _build_once(folder: str | Path, parameters: dict, fill: Callable[[Path], None]) -> Path:
    """Fill a folder in one step, unless it was already filled with the same parameters.

    The work is done in a hidden sibling that is renamed at the end, so nobody ever meets half a sample. The lock lets
    the processes of one `accelerate launch` share the first one's work; the system frees it when its holder dies.
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
            raise FileExistsError(f"{folder} holds something that is not a sample: empty it or name another folder.")
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
    for number, (text_label, picture_label) in enumerate(_draw_labels(num_posts, seed), start=1):
        rng = Random(f"post {number}, seed {seed}")
        rows.append(f"{number}\t{LABELS[text_label]},{LABELS[picture_label]}")
        (folder / f"data/{number}.txt").write_bytes(encode_tweet(write_tweet(text_label, rng), rng))
        draw_picture(picture_label, rng).save(folder / f"data/{number}.jpg", quality=85)
    (folder / "labelResultAll.txt").write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def _draw_labels(num_posts: int, seed: int) -> list[tuple[int, int]]:
    """Draw the (text, picture) labels of every post, 0 negative, 1 neutral, 2 positive, in random order."""
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


def _learn_bpe(
    blank: hf.PreTrainedTokenizerBase, tweets: list[str], suffix: str = ""
) -> tuple[list[str], list[tuple]]:
    """Learn a byte-level vocabulary that spells any text.

    Args:
        blank: An empty tokenizer of the wanted class, which normalises and splits the tweets.
        tweets: The texts to learn from.
        suffix: What marks the end of a word in this class, if anything.

    Returns:
        The tokens, every byte first, and the merges in order.
    """
    alphabet = sorted(ByteLevel.alphabet())
    # The trainer numbers the ends of words in an order that changes from run to run, and breaks ties by number, unless
    # they come in as special tokens. Any byte may end a word, not only those that did in the tweets.
    endings = [byte + suffix for byte in alphabet] if suffix else []
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + len(endings) + NUM_MERGES,
        initial_alphabet=alphabet,
        special_tokens=endings,
        show_progress=False,
        **({"end_of_word_suffix": suffix} if suffix else {}),
    )
    blank.backend_tokenizer.train_from_iterator(tweets, trainer)
    merges = [tuple(pair) for pair in json.loads(blank.backend_tokenizer.to_str())["model"]["merges"]]
    return list(dict.fromkeys(alphabet + endings + [left + right for left, right in merges])), merges


def _save_text(folder: Path, tweets: list[str]) -> None:
    tokens, merges = _learn_bpe(hf.RobertaTokenizer(), tweets)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]  # IDs 0 to 3 as in roberta-base
    vocab = {token: index for index, token in enumerate(tokens)}
    hf.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=128).save_pretrained(folder)
    # Positions start after the padding ID, hence two more of them than tokens.
    shape = {"vocab_size": len(vocab), "max_position_embeddings": 130, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    hf.RobertaModel(hf.RobertaConfig(**shape, **TRANSFORMER_SIZES, initializer_range=0.1)).save_pretrained(folder)


def _save_vision(folder: Path) -> None:
    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    hf.ResNetModel(config).save_pretrained(folder)
    hf.ConvNextImageProcessor(size={"shortest_edge": PICTURE_SIZE}).save_pretrained(folder)


def _save_clip(folder: Path, tweets: list[str]) -> None:
    tokens, merges = _learn_bpe(hf.CLIPTokenizer(), tweets, suffix="</w>")
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    hf.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(folder)
    end = len(vocab) - 1  # CLIP pools at the first end token and pads with more of them
    sizes = {**TRANSFORMER_SIZES, "projection_dim": 32}
    text = {**sizes, "vocab_size": len(vocab), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    # A random ViT starts too near zero to learn from a few hundred pictures.
    vision = {**sizes, "image_size": PICTURE_SIZE, "patch_size": 16, "initializer_factor": 2.0}
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    crop = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    hf.CLIPImageProcessor(size={"shortest_edge": PICTURE_SIZE}, crop_size=crop).save_pretrained(folder)


def main() -> None:
    """Make the posts and the backbones that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a small sample to train on, posts and backbones.")
    parser.add_argument("folder", type=Path, help="gets posts/ and backbones/")
    parser.add_argument("--num_posts", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_sample(arguments.folder / "posts", arguments.num_posts, arguments.seed))
    print(make_tiny_backbones(arguments.folder / "backbones", arguments.seed))


if __name__ == "__main__":
    main()
