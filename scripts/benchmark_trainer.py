"""Time whole Trainer runs of the translation demo: MoMo-Adam beside AdamW, in one process in turn.

    python scripts/benchmark_trainer.py configs/translation/demo.yaml --max_steps 300
    python scripts/benchmark_trainer.py configs/translation/demo.yaml --max_steps 300 --pairs 10 --use_cpu False

A pair is a run of each optimizer on the same batches, so that a drift of the machine's speed meets both alike, and every
other pair begins with the other one. The ratios are of a pair: of its wall time, logging included, and of the process's CPU
time, which other processes disturb less. Nothing is evaluated or saved.
"""

import statistics
import time
from dataclasses import dataclass, field


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

from run_translation import DataArguments, ModelArguments, load_model, tokenize
from transformers import DataCollatorForSeq2Seq, set_seed

from momo_hf import MomoSeq2SeqTrainer
from momo_hf.integrations.learning_rate import learning_rate_unset
from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import run_main
from momo_hf.recipes.outputs import Seq2SeqRunArguments
from momo_hf.recipes.run import parse_run
from momo_hf.recipes.translation.data import load_translation


OPTIMIZERS = ("adamw_torch_fused", "momo_adam")


@dataclass
class BenchmarkArguments:
    """How often."""

    pairs: int = field(default=5, metadata={"help": "Counted pairs of runs, after a short one that is not."})


def main(argv: list[str] | None = None) -> None:
    kinds = (BenchmarkArguments, DataArguments, ModelArguments, Seq2SeqRunArguments)
    benchmark, data_args, model_args, args = parse_run(kinds, argv)
    args.eval_strategy = args.save_strategy = "no"
    args.load_best_model_at_end, args.report_to, args.disable_tqdm = False, [], True
    if learning_rate_unset(args):
        args.learning_rate = 1e-3
    data = load_translation(data_args.dataset, data_args.source_lang, data_args.target_lang)
    tokens, steps = None, args.max_steps

    def run(optim: str, max_steps: int) -> tuple[float, float]:
        nonlocal tokens
        set_seed(args.seed)
        tokenizer, model = load_model(model_args, data, data_args.max_length)
        tokens = tokens or tokenize(data, tokenizer, data_args)["train"]
        args.optim, args.max_steps = optim, max_steps
        trainer = MomoSeq2SeqTrainer(
            model=model,
            args=args,
            train_dataset=tokens,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        )
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        return time.perf_counter() - wall, time.process_time() - cpu

    for optim in OPTIMIZERS:
        run(optim, 5)
    ratios: dict[str, list[float]] = {"wall time": [], "CPU time": []}
    for pair in range(benchmark.pairs):
        order = OPTIMIZERS if pair % 2 == 0 else OPTIMIZERS[::-1]
        seconds = {optim: run(optim, steps) for optim in order}
        for name, theirs, ours in zip(ratios, *(seconds[optim] for optim in OPTIMIZERS)):
            ratios[name].append(ours / theirs)
            print(f"pair {pair + 1}, {name}: {ours:.2f} s beside {theirs:.2f} s, {ours / theirs:.3f}", flush=True)
    for name, values in ratios.items():
        low, high = min(values), max(values)
        print(
            f"{name}: {statistics.median(values):.3f} of {OPTIMIZERS[0]} in the median, from {low:.3f} to {high:.3f}"
        )


if __name__ == "__main__":
    end(run_main(main))
