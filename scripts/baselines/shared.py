"""What the other systems of the paper's Table III share: the config, the two encoders and the loss.

A system is a subclass of `BaselineForSequenceClassification` that turns the encoders' outputs into `Scores`. Its class
attributes are shown in the tables:

    label           name of the row
    fidelity        A: follows official code; B: known structure, assumed sizes and initial weights; C: a proxy
    substitutions   what differs from the original
    published       accuracy and F1 of the paper's Table III in percent, from mixed splits and mixed kinds of F1

In the docstrings, [V] marks what we verified in a public source, [R] what is commonly reported but could not be
confirmed, and [A] our assumption. Axis names and masks are those of `modeling_clipcacg.py`. Most originals do not mask
padding; here padding is masked everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import (
    ClipCaCgClassifierOutput,
    ClipCaCgForSequenceClassification,
    ClipCaCgPreTrainedModel,
    as_mask,
    build_encoder,
    feature_map,
    token_states,
)
from clipcacg.scripts.baselines import word_vectors  # noqa: F401  registers the word-vector encoder with the Auto classes


class BaselineConfig(ClipCaCgConfig):
    """Fields that every system has; subclasses add their own.

    Args:
        hidden_size: Width of the system's own layers.
        num_attention_heads: Attention heads of the systems that use several; must divide `hidden_size`.
        dropout: Dropout probability of the system's own layers, in [0, 1).
        **kwargs: Fields of the encoders and the loss, as in `ClipCaCgConfig`. CLIP is left out by default.
    """

    model_type = "clipcacg-baseline"

    def __init__(
        self,
        hidden_size: int = 512,
        num_attention_heads: int = 1,
        dropout: float = 0.5,
        clip_config: PreTrainedConfig | dict[str, Any] | None = None,
        clip_mode: str = "none",
        **kwargs: Any,
    ) -> None:
        sizes = {"hidden_size": hidden_size, "num_attention_heads": num_attention_heads, "dropout": dropout}
        super().__init__(clip_config=clip_config, clip_mode=clip_mode, **sizes, **kwargs)

    def at_least_one(self, *names: str) -> None:
        """Raise a ValueError that names the first of these fields that is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` alone: the model code of a CLIP-CA-CG checkpoint does not belong to this system."""
        PreTrainedConfig.save_pretrained(self, save_directory, push_to_hub=push_to_hub, **kwargs)


class Scores(NamedTuple):
    """A system's output for a batch.

    Args:
        logits: (batch, labels).
        fused: (batch, width), input of the classifier.
        branches: Logits (batch, labels) of single branches, for systems that train them separately.
        modalities: Logits (batch, labels) of the text's and of the image's own label, with `use_modality_heads`.
    """

    logits: Tensor
    fused: Tensor
    branches: tuple[Tensor, ...] = ()
    modalities: tuple[Tensor, Tensor] | None = None


class TextEncoder(nn.Module):
    """Last hidden state of any text encoder, word vectors included, or cached features in its place."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.backbone, self.width = build_encoder(config.text_config, "text")

    def forward(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, text_features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the states (batch, text_len, width) and the bool mask (batch, text_len)."""
        tokens: Any = input_ids if text_features is None else text_features
        if tokens is None:
            raise ValueError("This system reads text: give input_ids or text_features.")
        mask = as_mask(attention_mask, tokens)
        return token_states(self.backbone, tokens, mask, text_features), mask


class ImageEncoder(nn.Module):
    """Last feature map of any vision encoder, or cached features in its place."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.backbone, self.channels = build_encoder(config.vision_config, "vision")

    def forward(self, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor:
        """Return the feature map (batch, channels, height, width)."""
        pixels: Any = pixel_values if image_features is None else image_features
        if pixels is None:
            raise ValueError("This system reads images: give pixel_values or image_features.")
        return feature_map(self.backbone, pixels, image_features)


class XavierLinear(nn.Linear):
    """A Linear that starts with uniform weights of the Xavier bound sqrt(6 / fans), and with zero biases.

    Args:
        input_size, output_size, bias: As for `nn.Linear`.
        fans: Sum of the two widths that the bound is computed from; by default those of the layer.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = True, fans: int | None = None) -> None:
        self.bound = (6 / (fans or input_size + output_size)) ** 0.5
        super().__init__(input_size, output_size, bias=bias)


class BaselineForSequenceClassification(ClipCaCgPreTrainedModel):
    """Base class of the systems: text encoder, vision encoder, the subclass's `score`, and our own model's loss."""

    config: BaselineConfig
    config_class = BaselineConfig
    accepts_loss_kwargs = False
    _no_split_modules = None

    label: str
    fidelity: str
    substitutions: tuple[str, ...] = ()
    published: dict[str, tuple[float, float]] = {}

    answer = ClipCaCgForSequenceClassification.answer
    modality_loss = ClipCaCgForSequenceClassification.modality_loss
    task_loss = ClipCaCgForSequenceClassification.task_loss

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        config.check_values()
        self.num_labels = config.num_labels
        self.text_branch = TextEncoder(config) if "text" in config.encoders else None
        self.image_branch = ImageEncoder(config) if "vision" in config.encoders else None

    def backbones(self) -> dict[str, PreTrainedModel]:
        branches = {"text": self.text_branch, "vision": self.image_branch}
        encoders = {name: getattr(branch, "backbone", None) for name, branch in branches.items()}
        return {name: encoder for name, encoder in encoders.items() if encoder is not None}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start every layer as PyTorch does, which is what the authors' own code does where it is public."""
        if isinstance(module, XavierLinear):
            init.uniform_(module.weight, -module.bound, module.bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        text_features: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **extras: Any,
    ) -> ClipCaCgClassifierOutput | tuple[Any, ...]:
        """Classify posts.

        Args:
            input_ids: (batch, text_len), token ids of the text encoder.
            attention_mask: (batch, text_len), 1 for a real token, 0 for padding; None means no padding.
            pixel_values: (batch, channels, height, width), preprocessed images.
            text_features: (batch, text_len, width), the text encoder's last hidden state, in place of `input_ids`.
            image_features: (batch, channels, height, width), the vision encoder's last feature map, in place of
                `pixel_values`.
            labels: (batch,), class indices.
            return_dict: False returns a tuple of the fields that are not None.
            **extras: Inputs of single systems, documented at their `score`, and the labels that
                `ClipCaCgForSequenceClassification.modality_loss` documents; other systems ignore them.

        Returns:
            `ClipCaCgClassifierOutput` with `loss`, `logits`, `fused_embeds` and what `use_modality_heads` adds.

        Raises:
            ValueError: If an input that the system reads is missing.
        """
        words, mask = (
            (None, None) if self.text_branch is None else self.text_branch(input_ids, attention_mask, text_features)
        )
        regions = None if self.image_branch is None else self.image_branch(pixel_values, image_features)
        scores = self.score(words, mask, regions, **extras)
        text_logits, image_logits, modality_loss = None, None, None
        if scores.modalities is not None:
            text_logits, image_logits = scores.modalities
            scores = scores._replace(logits=self.answer(scores.logits, text_logits, image_logits))
        loss = None if labels is None else self.training_loss(scores, labels)
        if scores.modalities is not None and self.training and loss is not None:
            modality_loss = self.modality_loss(text_logits, image_logits, **extras)
            loss = loss + self.config.modality_loss_weight * modality_loss
        output = ClipCaCgClassifierOutput(
            loss=loss,
            logits=scores.logits,
            fused_embeds=scores.fused,
            text_logits=text_logits,
            image_logits=image_logits,
            modality_loss=modality_loss,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def score(self, words: Tensor | None, mask: Tensor | None, feature_map: Tensor | None, **extras: Any) -> Scores:
        """Compute the system's own equations.

        Args:
            words: (batch, text_len, width); None without a text encoder.
            mask: (batch, text_len), bool; None without a text encoder.
            feature_map: (batch, channels, height, width); None without a vision encoder.
        """
        raise NotImplementedError

    def training_loss(self, scores: Scores, labels: Tensor) -> Tensor:
        """Loss of the logits; systems that train their branches override it."""
        return self.task_loss(scores.logits, labels)
