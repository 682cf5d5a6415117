"""Two rows that a table needs beside the systems: the largest class, and scikit-learn on frozen features.

`majority` answers the most frequent class of the training posts to every post. `fit` is a logistic regression on the
frozen encoders' pooled states, of the text, the picture or both, whose C is chosen on the validation posts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from clipcacg.modeling_clipcacg import as_mask, masked_mean

MODALITIES = ("text", "image", "both")
CHOICES = (0.0001, 0.001, 0.01, 0.1, 1.0)
MAJORITY_LABEL = "Majority class"
LABELS = {modality: f"Logistic regression on frozen features ({modality})" for modality in MODALITIES}


def majority(train_labels: Sequence[int], posts: int) -> np.ndarray:
    """The most frequent class, the lower one of a tie, for each of so many posts."""
    return np.full(posts, np.bincount(train_labels).argmax())


def pooled_features(
    text_features: Tensor | None, attention_mask: Tensor | None, image_features: Tensor | None, modality: str = "both"
) -> np.ndarray:
    """The mean of the real words beside the mean of the regions, or one of them.

    Args:
        text_features: (posts, text_len, width), the text encoder's last hidden state.
        attention_mask: (posts, text_len); left out: no padding.
        image_features: (posts, channels, height, width), the vision encoder's.
        modality: "text", "image" or "both"; the other's features may be None.

    Raises:
        ValueError: For another modality.
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
    """Fit one regression a C, and return the one with the best weighted F1 on validation.

    Args:
        train, validation: (posts, width).
        train_labels, validation_labels: Class indices.
        choices: C, the inverse strength of the L2 penalty; of equals the first is taken, which is the strongest.

    Returns:
        A pipeline that standardises, and has `predict` and `predict_proba`.
    """
    fitted = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in choices]
    for pipeline in fitted:
        pipeline.fit(train, train_labels)
    scores = [f1_score(validation_labels, pipeline.predict(validation), average="weighted") for pipeline in fitted]
    return fitted[int(np.argmax(scores))]
