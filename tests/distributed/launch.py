"""Real worker processes on gloo: start a function on every rank and collect what it returns."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment_for(**variables):
    """The environment of a worker: this checkout first, one thread, no network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


def run_workers(target, world_size, folder, *args, environment=None, check=True, timeout=300):
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
    port = free_port()
    workers = []
    for rank in range(world_size):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        variables = environment_for(
            **{name: str(value) for name, value in ranks.items()},
            **{
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
                **(environment or {}),
            },
        )
        command = [sys.executable, "-m", "tests.distributed.launch", target, str(folder), *map(str, args)]
        log = (folder / f"rank{rank}.log").open("w")
        workers.append((subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log), log))
    results = []
    for rank, (worker, log) in enumerate(workers):
        try:
            worker.wait(timeout)
        except subprocess.TimeoutExpired:
            for other, _ in workers:
                other.kill()
            raise
        log.close()
        path = folder / f"rank{rank}.pt"
        if check and worker.returncode != 0:
            for other, _ in workers:
                other.kill()
            raise RuntimeError(f"{target}, rank {rank}:\n{(folder / f'rank{rank}.log').read_text()[-6000:]}")
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
