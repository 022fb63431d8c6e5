"""What a task is given, folders to read from and to keep things in; and what it gives, rows to train on and others."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock


class Data(NamedTuple):
    """The rows of a task.

    Attributes:
        train: rows to train on, anything with `len` and numbers from 0: a list, a `torch.utils.data.Dataset`, ...
        held_out: what the task's `held_out` measures on, of any kind.
        parts: what else the model is made of, such as a tokenizer, or a folder with weights.
        collate: makes a batch of a list of rows; None: as torch's DataLoader does it.
    """

    train: Any
    held_out: Any
    parts: Any = None
    collate: Callable[[list], Any] | None = None


@dataclass(frozen=True)
class Places:
    """Where a task finds its data, and keeps what it has made.

    Args:
        data: the folder with one folder a data set, or None.
        prepared: folder for what is made once and used by many runs, such as a pretrained model.
    """

    data: Path | None
    prepared: Path

    def folder(self, name: str) -> Path:
        """The folder of a data set that the task names in `DATA`."""
        assert self.data is not None  # such tasks are left out without --data
        return self.data / name

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder that `make` fills, once; whoever comes meanwhile waits for it.

        Args:
            name: of the folder; it must change with what `make` does, see `source.fingerprint`.
            make: is given the folder, which is there and empty.
        """
        folder = self.prepared / name
        self.prepared.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not folder.is_dir():
                beside = folder.with_name(f"{name}.unfinished")
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                make(beside)
                beside.rename(folder)
        return folder
