"""What a user can mend is one line and exit status 2, Ctrl-C one line and 130; all else keeps its traceback."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path


logger = logging.getLogger(__name__)

INTERRUPTED = 130  # what shells make of a program that Ctrl-C ended: 128 + SIGINT


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
    missing, a folder that cannot be written, a full disk). Ctrl-C is one line too, with status 130. With logging at DEBUG
    the traceback is there as well.
    """
    try:
        return main() or 0
    except (Exception, KeyboardInterrupt) as error:
        if _interrupted(error):
            line, status = "interrupted; checkpoints that were made before are whole", INTERRUPTED
        else:
            line, status = f"error: {_mendable(error)}", 2
            if _mendable(error) is None:
                raise
        logger.debug("The error below was raised here.", exc_info=True)
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {line}\n")
        return status


def _interrupted(error: BaseException | None) -> bool:
    # torch's writer fails in its turn while an interrupt passes through it.
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


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
