"""How commands end: one sentence for the user's mistakes, a traceback for everything else."""

import pytest
from torch.utils.data import DataLoader

from clipcacg.scripts.data.errors import InputError, as_input_error, one_sentence


def fail(rows: list[int]) -> None:
    try:
        raise OSError("cannot identify image file")
    except OSError as error:
        raise InputError("7.jpg: the image is broken. Replace it.") from error


def test_an_input_error_ends_the_command_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^\S+: 7\.jpg: the image is broken\. Replace it\.$"), one_sentence([]):
        fail([])
    assert "Traceback" not in capsys.readouterr().err


def test_debug_prints_the_traceback_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="Replace it"), one_sentence(["CHECKPOINT", "--debug"]):
        fail([])
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "OSError: cannot identify image file" in printed


def test_an_input_error_of_a_data_loader_worker_is_one_sentence_too() -> None:
    with pytest.raises(SystemExit, match=r"^\S+: 7\.jpg: the image is broken\. Replace it\.$"), one_sentence([]):
        next(iter(DataLoader([1, 2], num_workers=1, collate_fn=fail)))


@pytest.mark.parametrize("kind", [ValueError, OSError, FloatingPointError])
def test_other_exceptions_keep_their_traceback(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="a bug of ours"), one_sentence([]):
        raise kind("a bug of ours")


def test_errors_of_a_library_become_input_errors() -> None:
    with pytest.raises(InputError, match=r"^The checkpoint x cannot be loaded: no such file$"):
        with as_input_error("The checkpoint x cannot be loaded", OSError):
            raise OSError("no such\n   file")
    with pytest.raises(InputError, match="^7.jpg: the image"), as_input_error("x", ValueError):
        fail([])
    with pytest.raises(KeyError), as_input_error("x", OSError):
        raise KeyError("other")
