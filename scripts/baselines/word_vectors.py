"""Word vectors as a text encoder: one vector a word, whatever its neighbours.

The systems before BERT start from such vectors. As a transformers model they take the place of any text encoder
(`--text_model FOLDER`, `from_backbones(text_model=FOLDER)`); `make_word_vectors.py` writes such a folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput


class WordVectorsConfig(PreTrainedConfig):
    """Size of the table.

    Args:
        vocab_size: Words, the special ones included.
        hidden_size: Width of a vector.
        pad_token_id: The word that stands for nothing.
    """

    model_type = "word-vectors"

    def __init__(self, vocab_size: int = 10_000, hidden_size: int = 50, pad_token_id: int = 0, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class WordVectors(PreTrainedModel):
    """A table of word vectors, trained along unless it is frozen."""

    config_class = WordVectorsConfig
    base_model_prefix = "word_vectors"

    def __init__(self, config: WordVectorsConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.4)  # about the spread of GloVe's
            init.zeros_(module.weight[module.padding_idx])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Words (batch, text_len) and their mask to vectors (batch, text_len, hidden), zeros at padding."""
        vectors = self.embeddings(input_ids)
        if attention_mask is not None:
            vectors = vectors * attention_mask.unsqueeze(-1).to(vectors.dtype)
        return BaseModelOutput(last_hidden_state=vectors)


AutoConfig.register(WordVectorsConfig.model_type, WordVectorsConfig, exist_ok=True)
AutoModel.register(WordVectorsConfig, WordVectors, exist_ok=True)
