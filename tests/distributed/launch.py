"""Real worker processes on gloo: start a function on every rank and collect what it returns."""

import importlib
import os
import sys
from pathlib import Path

import torch

from tests.processes.start import free_port, start, wait


def run_workers(target, world_size, folder, *args, environment=None, check=True):
    """Run `module:function(folder, *args)` on `world_size` ranks.

    Args:
        target: `module:function`.
        world_size: number of processes.
        folder: for files of the run; the function gets it first.
        args: strings for the function.
        environment: more variables for the workers.
        check: raise if a worker fails.

    Returns:
        What the function returned, one entry per rank (None for a worker that failed or was killed).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "ACCELERATE_USE_CPU": "true"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **(environment or {})}
    workers, logs = [], [folder / f"rank{rank}.log" for rank in range(world_size)]
    for rank, path in enumerate(logs):
        variables = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = ["-m", "tests.distributed.launch", target, folder, *args]
        with path.open("w") as log:
            workers.append(start(*command, environment=variables, stdout=log, stderr=log))
    wait(workers, logs, all_or_none=check)
    results = []
    for rank, worker in enumerate(workers):
        if check and worker.returncode != 0:
            shown = "\n".join(f"==== rank {rank}\n{log.read_text()[-6000:]}" for rank, log in enumerate(logs))
            raise RuntimeError(f"{target}, rank {rank} ended with {worker.returncode}\n{shown}")
        path = folder / f"rank{rank}.pt"
        results.append(torch.load(path, weights_only=True) if path.exists() else None)
        path.unlink(missing_ok=True)
    return results


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    result = getattr(importlib.import_module(module), name)(*sys.argv[2:])
    torch.save(result, Path(sys.argv[2]) / f"rank{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # The result is saved. gloo's threads now and then abort an interpreter that shuts down in the ordinary way.
    sys.stdout.flush()
    os._exit(0)
