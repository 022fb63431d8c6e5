"""Train or fine-tune an image classifier with MoMo.

    python scripts/run_image_classification.py configs/image_classification/demo.yaml
    accelerate launch --config_file configs/accelerate/ddp.yaml \
        scripts/run_image_classification.py configs/image_classification/cifar10_resnet20.yaml

A config file holds any argument of the dataclasses below and of transformers' TrainingArguments; the command line goes
on top.
"""

import json
import logging
import time
from dataclasses import dataclass, field


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import tqdm
from torch.utils.data import StackDataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    set_seed,
)

from momo_hf import MomoTrainer
from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import InputError, run_main
from momo_hf.recipes.images.data import load_images
from momo_hf.recipes.images.models import OWN_MODELS
from momo_hf.recipes.images.transforms import ImageTransform
from momo_hf.recipes.outputs import RunArguments, WholeCheckpoints, prepare_output
from momo_hf.recipes.run import parse_run, write_results


logger = logging.getLogger(__name__)

# Images up to this size in all are prepared once, when nothing about them is random.
IN_MEMORY = 1 << 30


@dataclass
class DataArguments:
    """What to classify."""

    dataset: str = field(
        metadata={"help": "`demo`, a folder of idx files (MNIST) or of images, or a Hub name."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: the first column with images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the first column with classes."})
    resolution: int = field(default=32, metadata={"help": "Side of the images in pixels."})
    image_channels: int = field(default=3, metadata={"help": "1 (grey) or 3 (RGB)."})
    image_mean: list[float] = field(default_factory=lambda: [0.5], metadata={"help": "One, or one per channel."})
    image_std: list[float] = field(default_factory=lambda: [0.5], metadata={"help": "One, or one per channel."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror every second training image."})
    random_padding: int = field(default=0, metadata={"help": "Pad and cut out a random window (CIFAR)."})
    random_resized_crop: bool = field(default=False, metadata={"help": "A random window of any size (ImageNet)."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many held-out images."})


@dataclass
class ModelArguments:
    """A checkpoint to fine-tune, or a new model."""

    model: str = field(
        metadata={
            "help": f"New: {', '.join(OWN_MODELS)} or a model type of transformers (`vit`, `resnet`, ...); otherwise a "
            "checkpoint, by folder or Hub name."
        }
    )
    model_options: str = field(default="{}", metadata={"help": "Options of the model's config, as JSON."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})


def load_model(args: ModelArguments, data: DataArguments, labels: list[str]) -> PreTrainedModel:
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    try:
        given = json.loads(args.model_options)
    except json.JSONDecodeError as error:
        raise InputError(f"model_options={args.model_options!r} is not JSON: {error}") from error
    options = {"num_channels": data.image_channels, "image_size": data.resolution, **given}
    if args.model in OWN_MODELS:
        config_class, model_class = OWN_MODELS[args.model]
        return model_class(config_class(**names, **options))
    try:
        config = AutoConfig.for_model(args.model, **names, **options)
    except ValueError:
        return AutoModelForImageClassification.from_pretrained(
            args.model, **names, ignore_mismatched_sizes=True, trust_remote_code=args.trust_remote_code
        )
    return AutoModelForImageClassification.from_config(config)


def prepare(data: Dataset, transform: ImageTransform, limit: int | None) -> Dataset | StackDataset:
    data = data if limit is None else data.select(range(min(limit, len(data))))
    random = transform.flip or transform.padding or transform.resized_crop
    if random or 4 * len(data) * transform.channels * transform.size**2 > IN_MEMORY:
        return data.with_transform(transform.rows(labels="label"))
    pixels = torch.empty(len(data), transform.channels, transform.size, transform.size)
    for number, image in enumerate(tqdm(data["image"], desc="Images")):
        pixels[number] = transform(image)
    return StackDataset(pixel_values=pixels, labels=torch.tensor(data["label"][:]))


class ClassificationTrainer(WholeCheckpoints, MomoTrainer):
    """MomoTrainer whose checkpoints are whole even if the run is killed."""


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    data_args, model_args, args = parse_run((DataArguments, ModelArguments, RunArguments), argv)
    prepare_output(args)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.WARNING, format="%(message)s")
    args.remove_unused_columns = False  # the images become the columns of the model only when they are read
    set_seed(args.seed)

    data = load_images(data_args.dataset, data_args.image_column, data_args.label_column)
    labels = data["train"].features["label"].names if "label" in data["train"].features else []
    if len(labels) < 2:
        raise InputError(
            f"dataset={data_args.dataset!r} has {len(labels) or 'no'} class: give every class a folder of its own "
            "(train/cat, train/dog), or name a column of classes with --label_column."
        )
    still = ImageTransform(
        data_args.resolution, data_args.image_channels, tuple(data_args.image_mean), tuple(data_args.image_std)
    )
    augmented = ImageTransform(
        still.size,
        still.channels,
        still.mean,
        still.std,
        data_args.random_flip,
        data_args.random_padding,
        data_args.random_resized_crop,
    )
    model = load_model(model_args, data_args, labels)
    logger.info(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(labels)} classes, images: {data.num_rows}")

    def compute_metrics(prediction) -> dict[str, float]:
        from momo_hf.recipes.images.metric import Accuracy  # late, so that training begins sooner

        metric = Accuracy(cache_dir=args.output_dir)
        return metric.compute(predictions=np.argmax(prediction.predictions, -1), references=prediction.label_ids)

    trainer = ClassificationTrainer(
        model=model,
        args=args,
        train_dataset=prepare(data["train"], augmented, data_args.max_train_samples),
        eval_dataset=prepare(data["validation"], still, data_args.max_eval_samples),
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
    metrics = {"train_loss": trained.training_loss, **predicted.metrics}
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        seconds = time.perf_counter() - start
        history = trainer.state.log_history
        path = write_results(args.output_dir, metrics, seconds, data_args, model_args, args, history=history)
        from momo_hf.recipes.images.figures import plot_confusion

        plot_confusion(predicted.label_ids, np.argmax(predicted.predictions, -1), labels, args.output_dir)
        print(
            f"Top-1 accuracy {metrics['eval_accuracy']:.3f} after {seconds:.0f} s; see {path}, training.png and "
            f"confusion.png beside it. The model is {saved}."
        )


if __name__ == "__main__":
    end(run_main(main))
