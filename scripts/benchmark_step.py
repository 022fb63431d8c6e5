"""Time one optimizer step: MoMo beside torch's own optimizers and the authors' package, in one process in turn.

    python scripts/benchmark_step.py
    python scripts/benchmark_step.py --shape small --output_dir outputs/benchmark-small
    python scripts/benchmark_step.py --shape resnet --device cuda --output_dir outputs/benchmark-gpu

A step is one of gradients that were clipped together, as Trainer does, so that nobody needs to look whether they are finite;
`--clipped False` is a step of gradients that nobody has looked at. (The clipping itself is not timed.) It needs the `test` extra,
which brings the authors' package.
Every repeat runs all optimizers once, so that a drift of the machine's speed meets all of them alike; the table gives
medians, the spread (first to third quartile), the ratio to AdamW(fused), the peak of temporary memory in a step, and how
many operators and kernels in Triton a step calls, and how many bytes the operators read and write, in units of the parameters'
size; what is compiled is not counted, and what kernels in Triton read and write is in momo_hf/optim/README.md.

With glibc set MALLOC_TRIM_THRESHOLD_=1000000000000 and MALLOC_MMAP_THRESHOLD_=33554432 in the environment: what one optimizer
frees is otherwise given back to the system in the step of another, which takes 5 ms there, in some processes and not in others.
"""

import csv
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import matplotlib
import momo
import torch
from counted import Counted
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from momo_hf import Momo, MomoAdam, MomoOptimizer
from momo_hf.optim.kernels import launch


matplotlib.use("Agg")


@dataclass
class Arguments:
    """What to time and where."""

    shape: str = field(default="gpt2", metadata={"help": "`gpt2`, `small` (85 tensors), `resnet`, `many` (1000)."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, ..."})
    clipped: bool = field(default=True, metadata={"help": "Whether the gradients were clipped together."})
    repeats: int = field(default=20, metadata={"help": "Counted repeats, after 3 that are not."})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "For step.csv and step.png."})


def shapes(name: str) -> list[tuple[int, ...]]:
    if name == "gpt2":  # 8 layers of width 384 and a vocabulary of 16k: 21 M parameters
        return [(16384, 384), (1024, 384), *(8 * layer(384)), (384,), (384,)]
    if name == "small":  # 7 layers of width 128 and a vocabulary of 4k, 1.9 M parameters: what Python does counts
        return [(4096, 128), *(7 * layer(128))]
    if name == "resnet":
        widths = [64, 128, 256, 512]
        return [s for w in widths for s in 4 * [(w, w, 3, 3), (w,), (w,)]]
    if name == "many":
        return 1000 * [(64, 8)]
    raise ValueError(f"`shape` must be gpt2, small, resnet or many, got {name!r}.")


def layer(d: int) -> list[tuple[int, ...]]:
    """The parameters of a layer of GPT-2, of width `d`."""
    return [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]


def optimizers() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    adamw = torch.optim.AdamW
    return {
        "AdamW(fused)": lambda p: adamw(p, weight_decay=0, fused=True),
        "AdamW(foreach)": lambda p: adamw(p, weight_decay=0, foreach=True),
        "AdamW(single)": lambda p: adamw(p, weight_decay=0, foreach=False),
        "momo-opt MomoAdam": lambda p: momo.MomoAdam(p, lr=1e-3),
        "Momo": lambda p: Momo(p, lr=1e-3),
        "MomoAdam": lambda p: MomoAdam(p, lr=1e-3),
        "MomoAdam, decay": lambda p: MomoAdam(p, lr=1e-3, weight_decay=0.1),
        "MomoAdam, use_fstar": lambda p: MomoAdam(p, lr=1e-3, use_fstar=True),
        "MomoAdam, averaging": lambda p: MomoAdam(p, lr=1e-3, averaging=True),
        "MomoAdam, averaging, compiled": lambda p: MomoAdam(p, lr=1e-3, averaging=True, compile=True),
        "MomoAdam, search": lambda p: MomoAdam(p, lr="auto"),
        "MomoAdam, a group each": lambda p: MomoAdam([{"params": [q]} for q in p], lr=1e-3),
        "MomoAdam, compiled": lambda p: MomoAdam(p, lr=1e-3, compile=True),
        "MomoAdam, compiled, decay": lambda p: MomoAdam(p, lr=1e-3, weight_decay=0.1, compile=True),
    }


def stepper(optimizer: torch.optim.Optimizer, device: torch.device, clipped: bool) -> Callable[[], None]:
    loss, factor = torch.ones((), device=device), torch.ones((), device=device)
    if clipped and isinstance(optimizer, MomoOptimizer):
        optimizer.loss_source = lambda *given: (loss, factor, True)
        return optimizer.step
    if "momo" in type(optimizer).__module__:
        return lambda: optimizer.step(loss=loss)
    return optimizer.step


def stay_in_search(optimizer: torch.optim.Optimizer) -> None:
    """Let a search never come to the end of its ramp."""
    for group in optimizer.param_groups:
        if "search_steps" in group:
            group["search_steps"].clamp_(max=2)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(step: Callable[[], None], device: torch.device) -> float:
    """Bytes that a step holds at its peak beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def count(step: Callable[[], None], device: torch.device) -> tuple[int, int]:
    """Operators and kernels in Triton that a step calls, and the bytes that the operators read and write."""
    start = launch.launch

    def launched(*arguments: Any, **constants: Any) -> None:
        counted.launched()
        start(*arguments, **constants)

    with Counted(device.type) as counted, mock.patch.object(launch, "launch", launched):
        step()
    return sum(counted.calls.values()), counted.bytes


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    warnings.filterwarnings("ignore", module="momo")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    values = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes(args.shape)]
    grads = [1e-3 * torch.randn_like(value) for value in values]
    made, steps = {}, {}
    for name, make in optimizers().items():
        parameters = [nn.Parameter(value.clone()) for value in values]
        for p, g in zip(parameters, grads):
            p.grad = g
        made[name] = make(parameters)
        steps[name] = stepper(made[name], device, args.clipped)

    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in tqdm(range(args.repeats + 3), desc="repeats"):
        for name, step in steps.items():
            stay_in_search(made[name])
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if repeat >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))

    size = sum(value.numel() * value.element_size() for value in values)
    base = statistics.median(times["AdamW(fused)"])
    rows = []
    for name, step in steps.items():
        low, median, high = statistics.quantiles(times[name], n=4)
        calls, moved = ("-", "-") if "compiled" in name else count(step, device)
        moved = moved if moved == "-" else round(moved / size, 1)
        rows.append([name, median, low, high, median / base, peak_memory(step, device) / size, calls, moved])

    head = ["optimizer", "median ms", "quartile 1", "quartile 3", "ratio to fused", "peak temporary / parameters"]
    head += ["calls", "bytes / parameters"]
    print(
        f"\n{sum(v.numel() for v in values) / 1e6:.1f} M parameters in {len(values)} tensors, {args.dtype}, {device}, "
        f"{'clipped' if args.clipped else 'not clipped'},"
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print(f"{head[0]:32}" + "".join(f"{h:>16}" for h in head[1:5]) + f"{head[5]:>30}{head[6]:>8}{head[7]:>20}")
    for row in rows:
        print(f"{row[0]:32}" + "".join(f"{v:16.2f}" for v in row[1:5]) + f"{row[5]:30.3f}{row[6]:>8}{row[7]:>20}")
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "step.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    draw(rows, output / "step.png")
    print(f"\nsee {output / 'step.csv'} and {output / 'step.png'}")


def draw(rows: list[list], path: Path) -> None:
    from matplotlib import pyplot as plt

    names, medians, lows, highs = ([row[i] for row in reversed(rows)] for i in range(4))
    errors = [[m - low for m, low in zip(medians, lows)], [h - m for m, h in zip(medians, highs)]]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1))
    colors = ["tab:orange" if name.startswith("Momo") else "tab:gray" for name in names]
    axes.barh(names, medians, xerr=errors, color=colors, capsize=2)
    axes.set_xlabel("one step, ms (median and quartiles)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
