"""Baselines without a neural model: the majority class, and a logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from clipcacg.modeling_clipcacg import as_mask, masked_mean

MODALITIES = ("text", "image", "both")
CHOICES = (0.0001, 0.001, 0.01, 0.1, 1.0)
MAJORITY_LABEL = "Majority class"
LABELS = {modality: f"Logistic regression on frozen features ({modality})" for modality in MODALITIES}


def majority(train_labels: Sequence[int], posts: int) -> np.ndarray:
    """The most frequent class, the smallest index in a tie, repeated for `posts` posts."""
    return np.full(posts, np.bincount(train_labels).argmax())


def pooled_features(
    text_features: Tensor | None, attention_mask: Tensor | None, image_features: Tensor | None, modality: str = "both"
) -> np.ndarray:
    """Concatenate the mean of the real words and the mean of the regions, or return one of them.

    Args:
        text_features: (posts, text_len, width), the text encoder's last hidden state.
        attention_mask: (posts, text_len); None means no padding.
        image_features: (posts, channels, height, width), the vision encoder's last feature map.
        modality: "text", "image" or "both". Features of an unused modality may be None.

    Raises:
        ValueError: If the modality is unknown.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality must be one of {', '.join(MODALITIES)}, not {modality!r}.")
    parts = []
    if modality != "image":
        parts.append(masked_mean(text_features, as_mask(attention_mask, text_features[..., 0])))
    if modality != "text":
        parts.append(image_features.mean(dim=(2, 3)))
    return np.concatenate([part.float().cpu().numpy() for part in parts], axis=1)


def fit(
    train: np.ndarray,
    train_labels: Sequence[int],
    validation: np.ndarray,
    validation_labels: Sequence[int],
    choices: Sequence[float] = CHOICES,
) -> Pipeline:
    """Fit one logistic regression per value of C, and return the one with the best accuracy on validation.

    Args:
        train, validation: (posts, width).
        train_labels, validation_labels: Class indices.
        choices: Values of C, the inverse strength of the L2 penalty; the first one wins a tie.

    Returns:
        A pipeline of standardisation and classifier.
    """
    fitted = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in choices]
    for pipeline in fitted:
        pipeline.fit(train, train_labels)
    scores = [pipeline.score(validation, validation_labels) for pipeline in fitted]
    return fitted[int(np.argmax(scores))]
