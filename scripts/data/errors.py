"""The project's one exception class, how commands end on it, and their log.

A command's `main` looks like this:

    def main(argv: list[str] | None = None) -> None:
        set_up_logging()
        with one_sentence(argv):
            parser = HfArgumentParser((DataArguments, PredictArguments))
            add_debug_flag(parser)
            data, arguments, rest = parse_flags(parser, argv)

`one_sentence` looks for `--debug` among the words of the command line itself, so the flag also works for errors that
parsing raises. `add_debug_flag` makes it known to the parser; HfArgumentParser returns it in the last namespace.

Raise `InputError` for what the user can mend: name the file, field or value, and say what to do. Where the user's
input enters another library, turn that library's error into an `InputError` close by:

    with as_input_error(f"The checkpoint {name} cannot be loaded", OSError, ValueError):
        model = ClipCaCgForSequenceClassification.from_pretrained(name)
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipcacg.configuration_clipcacg import did_you_mean


class InputError(ValueError):
    """Something that the user can mend; the message says what is wrong and what to do."""


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--debug`, which every command has."""
    parser.add_argument("--debug", action="store_true", help="Print the traceback of an error in the input too.")


@contextmanager
def one_sentence(argv: Sequence[str] | None = None) -> Iterator[None]:
    """End the command with one sentence on an `InputError`; every other exception keeps its traceback.

    Args:
        argv: The words of the command line, None for `sys.argv`. With `--debug` among them the traceback of an
            `InputError` is printed too.

    Raises:
        SystemExit: In place of an `InputError`.
    """
    try:
        yield
    except InputError as error:
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        message = str(error)
        if message.startswith("Caught InputError in DataLoader worker"):
            # A worker process sends its whole traceback as the message; its end is the original message.
            message = message.rpartition(f"{InputError.__name__}: ")[2].rstrip()
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")


@contextmanager
def as_input_error(subject: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of another library into an `InputError` of one line.

    Args:
        subject: What the message starts with: the file, flag or value, and what could not be done with it.
        kinds: Exception classes by which the library reports a bad input. An `InputError` passes unchanged.

    Raises:
        InputError: In place of one of `kinds`.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{subject}: {reason}") from error


def parse_flags(parser: Any, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """Parse a command line with an `HfArgumentParser`.

    Args:
        parser: The parser.
        argv: Words of the command line; None for those of this process.

    Returns:
        What `parse_args_into_dataclasses` returns.

    Raises:
        InputError: If a word is no flag or a value does not fit. The message has the nearest flag.
    """
    with as_input_error("The flags cannot be used", ValueError, ImportError, OSError):
        *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = did_you_mean(unknown[0].partition("=")[0], flags)
        raise InputError(f"Unknown argument {unknown[0]}.{hint or ' --help lists the flags.'}")
    return tuple(parsed)


def set_up_logging(is_main: bool = True) -> None:
    """Log the project's progress and all libraries' warnings in the main process, and errors alone in the others."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if is_main else logging.ERROR)
    logging.getLogger("clipcacg").setLevel(logging.INFO if is_main else logging.ERROR)
