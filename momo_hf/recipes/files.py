"""Reading local files and named datasets: what cannot be read is an `InputError` that names the file, line and fix."""

import codecs
import gzip
import inspect
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import Hasher

from momo_hf.recipes.errors import InputError


GZIP_MAGIC = b"\x1f\x8b"
EMPTY = "the file is empty; remove it, or fetch it again"


def local_path(name: str) -> Path | None:
    """The path that a `dataset` means, with `~` expanded, or None where it is a name on the Hub.

    Raises:
        InputError: it is written as a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.endswith("/"):
        raise InputError(f"dataset={name!r} does not exist (looked for {path.absolute()}).")
    return None


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked if it is gzipped, whatever it is called."""
    try:
        with open(path, "rb") as raw:
            if not raw.peek(1):
                raise InputError(EMPTY, path)
            packed = raw.peek(2)[:2] == GZIP_MAGIC
            if path.suffix == ".gz" and not packed:
                raise InputError("its name ends in .gz, but it is no gzip file; rename it or fetch it again", path)
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"the gzip file is damaged or not whole ({error}); fetch it again", path) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", path) from error


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if it is gzipped.

    Raises:
        InputError: it cannot be read.
    """
    with _open(path) as stream:
        return stream.read()


def read_lines(path: Path) -> Iterator[str]:
    r"""Stream the lines of a UTF-8 text file, gzipped or not; only a line feed, or \r\n, ends a line.

    Raises:
        InputError: the file cannot be read, is empty, or is not UTF-8.
    """
    number = 0
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8; convert the file, "
                    "for example with `iconv -f latin1 -t utf-8`",
                    path,
                    number,
                ) from error
            yield text.removesuffix("\n").removesuffix("\r")
    if number == 0:
        raise InputError(EMPTY, path)


def stream_to_disk(
    rows: Callable[..., Iterator[dict[str, Any]]], features: Features, files: tuple[Path, ...], **options: Any
) -> Dataset:
    """Write rows to datasets' cache as they come, and read them from there: the memory does not grow with the files.

    Args:
        rows: a function of a module that takes `files`, a tuple of paths as text, and yields rows.
        features: their columns.
        files: what is read; a file that has changed since is read again.
        options: further arguments of `rows`; tuples instead of lists, which `datasets` would split among processes.

    Raises:
        InputError: that of `rows`, or there is no row.
    """
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fingerprint = Hasher.hash([inspect.getsource(rows), features, state, options])
    options["files"] = tuple(map(str, files))
    if next(rows(**options), None) is None:
        raise InputError("no row that is more than blank", " and ".join(options["files"]))
    try:
        return Dataset.from_generator(rows, features, gen_kwargs=options, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def load_named(name: str, /, *args: Any, **options: Any) -> Any:
    """`datasets.load_dataset` of a builder or a Hub name.

    Args:
        name: as the user gave it, for the message.
        args: for `load_dataset`.
        options: for `load_dataset`.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return load_dataset(*args, **options)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        looked = (
            "" if Path(name).expanduser().exists() else f"no local path (looked for {Path(name).absolute()}), and "
        )
        raise InputError(f"dataset={name!r}: {looked}datasets says: {type(reason).__name__}: {reason}") from error
