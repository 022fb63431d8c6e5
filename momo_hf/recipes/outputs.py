"""The output folder of a run: whose it is, where a run goes on, and files that are there whole or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import find_tied_parameters
from safetensors import SafetensorError
from torch import nn
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    TrainOutput,
    _re_checkpoint,
    get_last_checkpoint,
)

from momo_hf.compat import sort_checkpoints
from momo_hf.recipes.errors import InputError


UNFINISHED = "unfinished"
# What a new run would overwrite or mix with its own. A log of the shell or a data cache may lie there.
TRACES = (f"{PREFIX_CHECKPOINT_DIR}-*", "*.json", "*.safetensors", "*.bin", "run", "runs", "samples", "search.png")


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments, and what becomes of an output folder that is in use."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Remove checkpoints, logs and results of an earlier run from output_dir. With "
            "resume_from_checkpoint=True only where there is no checkpoint to go on from."
        },
    )


@dataclass
class Seq2SeqRunArguments(RunArguments, Seq2SeqTrainingArguments):
    """The same with the arguments of the Seq2SeqTrainer."""


# ---- Whose folder it is ----


def folder_of(args: TrainingArguments) -> Path:
    """`output_dir` as a path; it is not None, whatever its type says."""
    return Path(args.output_dir or "")


def prepare_output(args: RunArguments) -> None:
    """Find `output_dir` ready, or refuse it, before anything is read; every script calls it first.

    `resume_from_checkpoint` becomes the path of a checkpoint, or None. What `overwrite_output_dir` gives up is still
    there afterwards, see `remove_old_run`.

    Args:
        args: with `output_dir`, `resume_from_checkpoint` (a path, or "True" for the last one in `output_dir`) and
            `overwrite_output_dir`.

    Raises:
        InputError: there is no checkpoint to resume from.
        FileExistsError: the folder holds another run.
        OSError: the folder cannot be written.
    """
    folder, given = folder_of(args), str(args.resume_from_checkpoint or "False")
    given = given.capitalize() if given.lower() in ("true", "false") else given
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    checkpoint = {"False": None, "True": last}.get(given, os.path.expanduser(given))
    if given == "True" and last is None and not args.overwrite_output_dir:
        raise InputError(
            f"resume_from_checkpoint=True, but {folder} holds no checkpoint. Leave it out to start, or add "
            "--overwrite_output_dir True to start over wherever there is none."
        )
    if checkpoint is not None:
        _check(checkpoint)
    with args.main_process_first(local=args.save_on_each_node, desc="the output folder"):
        if args.should_save:
            _claim(folder, free=checkpoint is not None or args.overwrite_output_dir)
    args.resume_from_checkpoint = checkpoint


def _check(checkpoint: str) -> None:
    if not Path(checkpoint).is_dir():
        raise InputError(f"resume_from_checkpoint={checkpoint!r} is not a folder.")
    inside = get_last_checkpoint(checkpoint)
    if inside is not None:
        raise InputError(
            f"resume_from_checkpoint={checkpoint!r} is the folder of a run; name a checkpoint in it, such as {inside}."
        )


def _traces(folder: Path) -> list[str]:
    return sorted(path.name for trace in TRACES for path in folder.glob(trace))


def _claim(folder: Path, free: bool) -> None:
    found = _traces(folder)
    if found and not free:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise FileExistsError(
            f"output_dir={folder} holds another run ({shown}). Take another folder, go on with "
            "--resume_from_checkpoint True, or start over with --overwrite_output_dir True."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output_dir={folder} cannot be written: {error.strerror}.") from error


def remove_old_run(args: RunArguments) -> None:
    """Remove what `overwrite_output_dir` gives up: where the first step is next, so that a typo in the data costs nothing.

    Args:
        args: of a run that starts from nothing, after `prepare_output`.
    """
    folder = folder_of(args)
    with args.main_process_first(local=args.save_on_each_node, desc="the output folder"):
        if not args.should_save:
            return
        for path in map(folder.joinpath, (*(_traces(folder) if args.overwrite_output_dir else ()), UNFINISHED)):
            if path.name in (UNFINISHED, "run", "runs", "samples") or _re_checkpoint.search(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name in ("results.json", "search.json", "search.png", TRAINER_STATE_NAME):
                path.unlink()


# ---- Files that are whole ----


@contextmanager
def write_errors_named(path: Path) -> Iterator[None]:
    """What Python, torch and safetensors say of a full disk becomes one line with the path and the way on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        said = str(error).strip().splitlines()[0]
        # torch's writer raises what its C++ stream says.
        if isinstance(error, RuntimeError) and "inline_container" not in said and "iostream" not in said:
            raise
        there = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(there).free / 2**20
        raise OSError(
            f"{path} could not be written ({said}; {free:.0f} MB are free there). Checkpoints made before are untouched: "
            "make room, and go on with --resume_from_checkpoint True."
        ) from error


@contextmanager
def whole_folder(folder: Path, saves: bool) -> Iterator[Path]:
    """Fill a checkpoint beside its place; it gets its name when all processes are done.

    Args:
        folder: what it is to be; one that is there is replaced.
        saves: whether this process makes and renames folders, `TrainingArguments.should_save`.

    Yields:
        The folder to write into.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    beside = folder.parent / UNFINISHED / folder.name
    state = PartialState()
    try:
        with write_errors_named(folder):
            if saves:
                shutil.rmtree(beside.parent, ignore_errors=True)
                beside.mkdir(parents=True)
            state.wait_for_everyone()
            yield beside
            state.wait_for_everyone()
            if saves:
                if folder.exists():
                    folder.rename(beside.parent / "replaced")
                beside.rename(folder)
    finally:
        if saves:
            shutil.rmtree(beside.parent, ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None = None) -> None:
    """Remove the checkpoints that were written first, beyond `limit`, but neither the newest nor the best one.

    Unlike transformers' `rotate_checkpoints` it leaves folders such as `checkpoint-best` alone.

    Args:
        folder: with the checkpoints; those of an earlier run, whatever their step, are the oldest.
        limit: how many stay; None and 0: all.
        best: path of the best one.
    """
    found = [p for p in sort_checkpoints(str(folder)) if _re_checkpoint.search(Path(p).name)]
    kept = set(found[-1:]) | ({str(Path(best))} & set(found) if best else set())
    others = [path for path in found if path not in kept]
    stay = max(0, limit - len(kept)) if limit else len(others)
    for old in others[: len(others) - stay]:
        shutil.rmtree(old, ignore_errors=True)


class WholeCheckpoints(Trainer):
    """For a Trainer class: `class MyTrainer(WholeCheckpoints, MomoTrainer)`. A checkpoint has its name when it is whole.

    Its arguments are `RunArguments`. A run that is killed, or finds the disk full, while it saves goes on from the
    checkpoint before; one that had done all its steps does no more.
    """

    args: RunArguments
    model: nn.Module
    _run_dir: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if not resume_from_checkpoint:
            remove_old_run(self.args)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # the Trainer asks only after one more step
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        saves = self.args.should_save
        with whole_folder(folder, saves) as beside:
            self._run_dir = str(beside.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._run_dir = None
            if self.state.best_model_checkpoint == str(beside):
                self.state.best_model_checkpoint = str(folder)
            self._write_state(beside)
        if saves:
            rotate(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # a part of a checkpoint
            return super().save_model(output_dir, _internal_call)
        with write_errors_named(Path(output_dir or folder_of(self.args))):
            super().save_model(output_dir)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A file holds a tied weight under one of its names and leaves out what the model says; the Trainer looks for all.
        missing = set(load_result.missing_keys)
        left_out = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        for names in find_tied_parameters(self.model):
            left_out |= set(names) if set(names) - missing else set()
        super()._issue_warnings_after_load(load_result._replace(missing_keys=sorted(missing - left_out)))

    def save_state(self) -> None:
        self._write_state(folder_of(self.args))

    def _write_state(self, folder: Path) -> None:
        # The Trainer would write a bare NaN for a loss that is not a number.
        if self.args.should_save:
            write_json(folder / TRAINER_STATE_NAME, asdict(self.state))


def write_json(path: Path, values: Any) -> None:
    """Write JSON that any reader takes, in one piece: a number that is not finite becomes null."""
    beside = path.with_name(f".{path.name}")
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(values), indent=2, default=str, ensure_ascii=False, allow_nan=False)
        beside.write_text(text + "\n", "utf-8")
        beside.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
