"""A run that is killed again and again and goes on by itself, beside one that is left alone.

    python -m tests.soak FOLDER --steps 20000 --every 15 -- scripts/run_image_classification.py CONFIG [arguments]

prints kills, memory and the greatest difference of the logged losses as JSON. The script must log and save.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from tests.processes.progress import Progress
from tests.processes.start import start


def memory(pid):
    """Resident memory of a process in MiB, or None if it has just ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if fields else None


def last_step(folder):
    """The last step of which there is a checkpoint, or 0."""
    return max((int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*")), default=0)


def run_with_kills(command, folder, every, seed=0, kills=None):
    """One command for start and resume, killed at a random moment after each progress, until it comes through.

    Args:
        command: script and arguments, without output folder.
        folder: the output folder.
        every: seconds; it is killed within so many after its first new checkpoint.
        seed: of the moments.
        kills: at most so many.

    Returns:
        For every kill the last step of which a checkpoint is there.
    """
    chance, steps = random.Random(seed), []
    again = ["--output_dir", folder, "--resume_from_checkpoint", "True", "--overwrite_output_dir", "True"]
    with Path(f"{folder}.log").open("w") as log:
        while True:
            before, process = last_step(folder), start(*command, *again, stdout=log, stderr=log)
            progress = Progress()
            while process.poll() is None and (last_step(folder) == before or len(steps) == kills):
                progress.check([log.name])
                time.sleep(0.02)
            try:
                process.wait(every * chance.random())
            except subprocess.TimeoutExpired:
                process.kill()
            if process.wait() == 0:
                return steps
            assert process.returncode == -signal.SIGKILL, Path(f"{folder}.log").read_text()[-3000:]
            steps.append(last_step(folder))


def losses(folder):
    """Step and loss of everything that was logged, by the results of a run."""
    history = json.loads((Path(folder) / "results.json").read_text())["history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--every", type=float, default=60, help="kill within so many seconds after a checkpoint")
    parser.add_argument("command", nargs="+", help="script, config and arguments after --")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    command = [*args.command, "--max_steps", args.steps]
    start = time.monotonic()
    with (args.folder / "once.log").open("w") as log:
        process, seen = start(*command, "--output_dir", args.folder / "once", cold=True, stdout=log, stderr=log), []
        while process.poll() is None:
            seen.append(memory(process.pid))
            time.sleep(1)
    assert process.returncode == 0, (args.folder / "once.log").read_text()[-3000:]
    seen = [size for size in seen if size is not None]
    middle = time.monotonic()
    steps = run_with_kills(command, args.folder / "killed", args.every)
    expected, found = losses(args.folder / "once"), losses(args.folder / "killed")
    assert [step for step, _ in expected] == [step for step, _ in found]
    report = {
        "steps": args.steps,
        "kills": len(steps),
        "last checkpoint at each kill": steps,
        "losses compared": len(found),
        "greatest difference": max(abs(a - b) for (_, a), (_, b) in zip(expected, found)),
        "seconds": [round(middle - start), round(time.monotonic() - middle)],
        "MiB at a quarter, half, three quarters and the end": [
            round(seen[int(q * (len(seen) - 1))], 1) for q in (0.25, 0.5, 0.75, 1)
        ],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
