"""Train a DLRM click model with MoMo.

    python scripts/run_recommendation.py configs/recommendation/demo.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml \
        scripts/run_recommendation.py configs/recommendation/criteo.yaml --dataset train.txt.gz

A config file holds any argument of the dataclasses below and of transformers' TrainingArguments; the command line goes
on top.
"""

import logging
import time
from dataclasses import dataclass, field


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from scipy.special import expit
from torch.utils.data import StackDataset
from transformers import set_seed

from momo_hf import MomoTrainer
from momo_hf.recipes.clicks.data import SHUFFLE_BUFFER, load_clicks
from momo_hf.recipes.clicks.dlrm import DLRM, DLRMConfig
from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import InputError, run_main
from momo_hf.recipes.outputs import RunArguments, WholeCheckpoints, prepare_output
from momo_hf.recipes.run import parse_run, write_results


logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Which click log."""

    dataset: str = field(metadata={"help": "`demo`, Criteo's train.txt (or .gz), a .csv, or a Hub name."})
    max_eval_samples: int = field(default=100_000, metadata={"help": "Held-out rows to use."})


@dataclass
class ModelArguments:
    """The sizes of the DLRM."""

    table_size: int = field(default=100_000, metadata={"help": "Rows of each embedding table; categories are hashed."})
    embedding_dim: int = field(default=16, metadata={"help": "Width of the embeddings."})
    bottom_mlp: list[int] = field(default_factory=lambda: [512, 256, 64], metadata={"help": "Over the numbers."})
    top_mlp: list[int] = field(default_factory=lambda: [512, 256], metadata={"help": "Over the interactions."})


def in_memory(data: Dataset) -> StackDataset:
    """The whole log as tensors; reading rows one by one would take longer than training on them."""
    columns = data.with_format("numpy")[:]
    return StackDataset(**{name: torch.from_numpy(np.array(column)) for name, column in columns.items()})


def probabilities(logits: np.ndarray) -> np.ndarray:
    return expit(logits.astype(np.float64))


class ClickTrainer(WholeCheckpoints, MomoTrainer):
    """MomoTrainer whose checkpoints are whole even if the run is killed."""


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    data_args, model_args, args = parse_run((DataArguments, ModelArguments, RunArguments), argv)
    prepare_output(args)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.WARNING, format="%(message)s")
    args.label_names = ["labels"]
    set_seed(args.seed)

    clicks = load_clicks(data_args.dataset, model_args.table_size, data_args.max_eval_samples)
    train = clicks.train
    if isinstance(train, IterableDataset):
        if args.max_steps <= 0:
            raise InputError("A click log is streamed, so its length is unknown: give --max_steps.")
        train = train.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER)
    else:
        train = in_memory(train)
    model = DLRM(
        DLRMConfig(
            table_size=model_args.table_size,
            embedding_dim=model_args.embedding_dim,
            bottom_mlp=model_args.bottom_mlp,
            top_mlp=model_args.top_mlp,
        )
    )
    logger.info(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(clicks.validation)} held-out rows")

    def compute_metrics(prediction) -> dict[str, float]:
        from momo_hf.recipes.clicks.metric import ClickMetric  # late, so that training begins sooner

        metric = ClickMetric(cache_dir=args.output_dir)
        return metric.compute(predictions=probabilities(prediction.predictions), references=prediction.label_ids)

    trainer = ClickTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=in_memory(clicks.validation),
        compute_metrics=compute_metrics,
    )
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    saved = "not saved (save_strategy: no)"
    if args.save_strategy != "no":
        trainer.save_model()
        trainer.save_state()
        saved = f"in {args.output_dir}"
    predicted = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    trainer.log(predicted.metrics)
    metrics = {"train_loss": trained.training_loss, **predicted.metrics, "best_log_loss": clicks.best_log_loss}
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        seconds = time.perf_counter() - start
        history = trainer.state.log_history
        path = write_results(args.output_dir, metrics, seconds, data_args, model_args, args, history=history)
        from momo_hf.recipes.clicks.figures import plot_calibration

        plot_calibration(predicted.label_ids, probabilities(predicted.predictions), args.output_dir)
        best = "" if clicks.best_log_loss is None else f" (best reachable {clicks.best_log_loss:.4f})"
        print(
            f"Log loss {metrics['eval_log_loss']:.4f}{best}, AUC {metrics['eval_auc']:.4f}, normalised entropy "
            f"{metrics['eval_normalized_entropy']:.4f} after {seconds:.0f} s; see {path}, training.png and calibration.png "
            f"beside it. The model is {saved}."
        )


if __name__ == "__main__":
    end(run_main(main))
