"""Random changes of training posts (`--augment`): new in every epoch, or drawn from a few that are stored."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2

from clipcacg.processing_clipcacg import ClipCaCgProcessor, rgb_array
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.images import image_source

WORD_RATE = 0.1


def augment_text(text: str, rate: float = WORD_RATE) -> str:
    """Delete words at random, then swap words at random; at least one word stays.

    Source: random deletion and random swap of Wei and Zou, "EDA", EMNLP-IJCNLP 2019. The rate is our choice: of a post
    of fifteen words about two change, so that the words that carry its sentiment mostly stay.

    Args:
        text: Words that spaces separate.
        rate: Probability that a word is deleted, and that a remaining word changes places with another.
    """
    words = text.split()
    if len(words) < 2:
        return text
    kept = [word for word, draw in zip(words, torch.rand(len(words)).tolist(), strict=True) if draw >= rate]
    kept = kept or [words[int(torch.randint(len(words), ()))]]
    for index, draw in enumerate(torch.rand(len(kept)).tolist()):
        if draw < rate:
            other = int(torch.randint(len(kept), ()))
            kept[index], kept[other] = kept[other], kept[index]
    return " ".join(kept)


def view_name(digest: str, view: int) -> str:
    """The name of the stored output of an augmented post."""
    return f"{digest}-{view}"


@dataclass
class Augmentation:
    """A transform of `datasets.Dataset` that changes texts and images at random.

    Images are resized to the size that the model needs, then changed by torchvision's TrivialAugmentWide: one
    operation of random strength per image. Source: Müller and Hutter, "TrivialAugment", ICCV 2021. It has no strength
    to choose. Its operations move pixels by up to 32, so images are resized first.

    Args:
        processor: Says how large the image must be.
        views: Number of stored versions of each post, from which a digest draws one.
    """

    processor: ClipCaCgProcessor
    views: int = 0

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Change the columns "text" and "image", and draw a view in the columns "text_digest" and "image_digest".

        Only the columns that are there change. Images become PIL images.
        """
        change = {"text": lambda text: augment_text(text or ""), "image": self.augment_image}
        change |= dict.fromkeys(("text_digest", "image_digest"), self.draw_view)
        return {name: [change[name](value) for value in values] for name, values in columns.items()}

    def draw_view(self, digest: str) -> str:
        return view_name(digest, int(torch.randint(self.views, ())))

    def augment_image(self, value: Any) -> Any:
        """Change an image that is not decoded yet. One that cannot be read stays as it is: the collator names it."""
        edge = self.processor.needed_edge({})
        try:
            image = Image.fromarray(rgb_array(image_source(value), None, edge).transpose(1, 2, 0))
        except (InputError, OSError, ValueError):
            return value
        steps = [v2.Resize(edge)] if edge else []
        return v2.Compose([*steps, v2.TrivialAugmentWide()])(image)
