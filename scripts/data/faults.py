"""Bad rows of any source: stop at them, or leave them out, count them and name the first."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
from accelerate.utils import gather_object

from clipcacg.scripts.data.errors import InputError

logger = logging.getLogger(__name__)

NAMED = 10  # bad rows that a message names
ALLOWED_SHARE = 0.1  # of bad rows; more of them are a fault of the data or of the flags
# What to do about many rows of one fault, by how its description starts.
ADVICE = {
    "it has no image": "use --image_column, or a model trained with --modality_dropout 0.1, which needs no image",
    "it has no text": "use --text_column, or a model trained with --modality_dropout 0.1, which needs no text",
    "it has no label": "use --label_column to name the labels, or add them",
    "missing image": "paths of images start from the folder of their table; --image_column names their column",
}


@dataclass
class Faults:
    """What a command does with bad rows, and those that it has left out.

    Args:
        on_error: "raise" stops at bad rows, "skip" leaves them out.
        left_out: Name of each row that was left out, such as "row 3 of posts.csv", to the reason.
        num_rows: Number of rows that were read, the bad ones among them.
    """

    on_error: str = "raise"
    left_out: dict[str, str] = field(default_factory=dict)
    num_rows: int = 0

    def leave_out(self, dataset: datasets.Dataset, reasons: Mapping[int, str], source: str) -> datasets.Dataset:
        """Leave out bad rows.

        Args:
            dataset: Rows of one split, with the column row, their numbers in the source, or else with the column id.
            reasons: Index of each bad row in `dataset` to what is wrong with it.
            source: File or data set for the message.

        Raises:
            InputError: With `on_error="raise"`, if there is a bad row.
        """
        if not reasons:
            return dataset
        kind, column = ("row", "row") if "row" in dataset.column_names else ("post", "id")
        names = dataset[column][:]
        bad = {f"{kind} {names[index]} of {source}": reason for index, reason in sorted(reasons.items())}
        if self.on_error == "raise":
            too_many = len(bad) > ALLOWED_SHARE * len(dataset)
            raise InputError(
                report(bad, advice(map(kind_of, bad.values())) if too_many else "--on_error skip leaves bad rows out")
            )
        logger.warning(report(bad, "left out"))
        self.left_out |= bad
        return dataset.select([index for index in range(len(dataset)) if index not in reasons])

    def add(self, bad: Mapping[str, str]) -> None:
        """Count posts that were replaced in a training batch, each once; see `PostCollator`.

        Args:
            bad: ID of each to what is wrong with it.

        Raises:
            InputError: If more than a tenth of the rows are bad now.
        """
        new = {f"post {post_id}": reason for post_id, reason in bad.items()}
        new = {name: reason for name, reason in new.items() if name not in self.left_out}
        if new:
            logger.warning(report(new, "replaced by other posts of their batches"))
            self.left_out |= new
            self.check_share()

    def gather(self) -> None:
        """Take over what the other processes of a run have left out."""
        for row in gather_object(list(self.left_out.items())):
            self.left_out.setdefault(*row)

    def check_share(self) -> None:
        """Refuse data of which too much was left out.

        Raises:
            InputError: If more than a tenth of the rows are bad.
        """
        if len(self.left_out) > ALLOWED_SHARE * self.num_rows:
            share = f"more than a tenth of the {self.num_rows} rows"
            raise InputError(report(self.left_out, f"{share}: {advice(map(kind_of, self.left_out.values()))}"))

    def summary(self) -> dict[str, Any]:
        """What `all_results.json` says of the rows that were left out; nothing if there are none."""
        if not self.left_out:
            return {}
        return {"skipped_posts": len(self.left_out), "skipped_first": _first(self.left_out)}


def kind_of(reason: str) -> str:
    """The start of a description by which `ADVICE` knows the fault; empty if it does not."""
    return next((start for start in ADVICE if reason.startswith(start)), "")


def advice(kinds: Iterable[str]) -> str:
    """What to do about many bad rows, judged by the most frequent of their kinds."""
    return ADVICE.get(Counter(kinds).most_common(1)[0][0], "mend the data")


def report(bad: Mapping[str, str], consequence: str) -> str:
    """Count bad rows, say what follows, and name the first."""
    count = "1 bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
    more = [f"and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
    return "\n  ".join([f"{count}, {consequence}. Row 1 is the first post, below any header:", *_first(bad), *more])


def _first(bad: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in list(bad.items())[:NAMED]]
