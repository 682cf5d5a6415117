"""The progress of commands that take long: posts per second and the time left."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

SECONDS = 30  # between two lines where the output is no terminal
FORMAT = "{l_bar}{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class Progress(tqdm):
    """A bar of posts, which a terminal redraws in place. A file gets a line of its own every half minute.

    Args:
        total: Number of posts; None if it is unknown.
        desc: What is done with them.
        is_part: Part of something that has a bar. In a file it is left out if it takes less than half a minute.
        **kwargs: As in tqdm.
    """

    def __init__(self, total: int | None, desc: str, is_part: bool = False, **kwargs: Any) -> None:
        file: Any = kwargs.setdefault("file", sys.stderr)
        if not file.isatty():
            kwargs |= {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS if is_part else 0}
        bar = {} if total is None else {"bar_format": FORMAT}
        super().__init__(total=total, desc=desc, leave=not is_part, unit=" posts", dynamic_ncols=True, **bar, **kwargs)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return what prints the bar; tqdm calls this."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(status: str) -> None:
            if status:  # tqdm clears a bar by an empty one
                file.write(f"{status}\n")
                file.flush()

        return print_line
