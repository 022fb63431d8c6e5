"""What a user can mend is one line and exit status 2; everything else keeps its traceback."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path


logger = logging.getLogger(__name__)


class InputError(ValueError):
    """A file or an argument that the user can mend.

    Args:
        problem: what is wrong, the value that was found, and the fix.
        path: the file that it is in.
        line: its line there, from 1.
    """

    def __init__(self, problem: str, path: str | Path | None = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if not line else f"{path}, line {line}: "
        super().__init__(where + problem)


def run_main(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and return its exit status: 2, with one line on stderr, for what the user can mend.

    That is an `InputError`, also where a library has wrapped it, and what the operating system refuses (a file that is
    missing, a folder that cannot be written, a full disk). With logging at DEBUG the traceback is there too.
    """
    try:
        return main() or 0
    except Exception as error:
        message = _mendable(error)
        if message is None:
            raise
        logger.debug("The error below was raised here.", exc_info=True)
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
        return 2


def _mendable(error: BaseException) -> str | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    if cause is None:
        return f"{type(error).__name__}: {_one_line(error)}" if isinstance(error, OSError) else None
    # A DataLoader's worker hands its error over as a traceback in one string.
    return _one_line(cause).rsplit(f"{InputError.__module__}.{InputError.__qualname__}: ", 1)[-1]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
