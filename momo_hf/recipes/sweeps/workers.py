"""Workers are processes of their own: starting them, and waiting for them with a bar."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm


def run_workers(
    command: list[str], workers: int, folder: str | Path, threads: int, progress: Callable[[], tuple[int, int]]
) -> list[Path]:
    """Start workers, where there is something to run, and wait until all is done or no worker is left.

    Args:
        command: of a worker, without python; `--worker NUMBER` is added.
        workers: how many.
        folder: of their logs, `worker-NUMBER.log`.
        threads: of each, unless OMP_NUM_THREADS says otherwise.
        progress: how many runs are done, and of how many.

    Returns:
        The logs of the workers that broke down before all was done.
    """
    done, total = progress()
    if done == total:
        return []
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    logs = [Path(folder) / f"worker-{worker}.log" for worker in range(workers)]
    processes = []
    for worker, log in enumerate(logs):
        with log.open("a") as file:
            words = [sys.executable, *command, "--worker", str(worker)]
            processes.append(subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        with tqdm(unit="run") as bar:
            while True:
                running = any(process.poll() is None for process in processes)
                done, total = progress()
                if total != bar.total:
                    bar.total = total
                    bar.refresh()
                bar.update(done - bar.n)
                if not running or done == total:
                    break
                time.sleep(1)
    finally:
        for process in processes:
            process.terminate()
    codes = [process.wait() for process in processes]
    return [log for log, code in zip(logs, codes) if code != 0 and done < total]
