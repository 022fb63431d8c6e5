"""Train or fine-tune a translation model with MoMo.

    python scripts/run_translation.py configs/translation/demo.yaml
    python scripts/run_translation.py configs/translation/demo.yaml --optim adamw_torch --learning_rate 1e-3
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/run_translation.py configs/translation/iwslt14.yaml

A config file holds any argument of the dataclasses below and of transformers' Seq2SeqTrainingArguments; the command
line goes on top.
"""

import logging
import sys
import time
from dataclasses import dataclass, field


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import numpy as np
from datasets import DatasetDict
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    set_seed,
)

from momo_hf import MomoSeq2SeqTrainer
from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import run_main
from momo_hf.recipes.outputs import Seq2SeqRunArguments, WholeCheckpoints, prepare_output
from momo_hf.recipes.run import parse_run, write_results
from momo_hf.recipes.translation.bpe import train_bpe
from momo_hf.recipes.translation.cldr import LANGUAGE
from momo_hf.recipes.translation.data import load_translation
from momo_hf.recipes.translation.marian import new_marian


logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """What to translate."""

    dataset: str = field(
        metadata={"help": "`demo`, `iwslt14`, a local folder, or a Hub name with a `translation` column."}
    )
    source_lang: str = field(default="de", metadata={"help": "Language code of the source side."})
    target_lang: str = field(default="en", metadata={"help": "Language code of the target side."})
    source_prefix: str = field(default="", metadata={"help": "Text before every source sentence (T5)."})
    max_length: int = field(default=128, metadata={"help": "Tokens kept of a sentence."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training pairs."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only so many pairs to evaluate and test."}
    )
    samples: int = field(default=8, metadata={"help": "Translations to show at the end."})


@dataclass
class ModelArguments:
    """A checkpoint to fine-tune, or the size of a new Marian model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Seq2seq checkpoint; without it, from scratch."}
    )
    source_code: str | None = field(
        default=None, metadata={"help": "Source language as the checkpoint's tokenizer has it."}
    )
    target_code: str | None = field(
        default=None, metadata={"help": "Target language as the checkpoint's tokenizer has it."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})
    vocab_size: int = field(default=10000, metadata={"help": "Joint BPE vocabulary."})
    d_model: int = field(default=512, metadata={"help": "Width."})
    layers: int = field(default=6, metadata={"help": "Encoder layers, and decoder layers."})
    attention_heads: int = field(default=4, metadata={"help": "Attention heads."})
    ffn_dim: int = field(default=1024, metadata={"help": "Width of the feed-forward layers."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout."})


def load_model(args: ModelArguments, data: DatasetDict, max_length: int):
    """The tokenizer and the model: of a checkpoint, or new and sized by the arguments."""
    if args.model_name_or_path is None:
        train = data["train"]
        texts = (batch[side] for side in ("source", "target") for batch in train.select_columns(side).iter(1000))
        tokenizer = train_bpe(texts, args.vocab_size, max_length, 2 * len(train))
        size = (args.d_model, args.layers, args.attention_heads, args.ffn_dim, args.dropout)
        return tokenizer, new_marian(tokenizer, max_length, *size)
    options = {"trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, **options)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path, **options)
    if args.source_code and args.target_code:
        tokenizer.src_lang, tokenizer.tgt_lang = args.source_code, args.target_code
        model.generation_config.forced_bos_token_id = tokenizer.convert_tokens_to_ids(args.target_code)
    return tokenizer, model


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> DatasetDict:
    def convert(batch):
        sources = [args.source_prefix + text for text in batch["source"]]
        ids = tokenizer(sources, text_target=batch["target"], max_length=args.max_length, truncation=True)
        lengths = [len(row) for row in ids["input_ids"]]
        return {
            "input_ids": ids["input_ids"],
            "attention_mask": ids["attention_mask"],
            "labels": ids["labels"],
            "length": lengths,
        }

    return data.map(convert, batched=True, remove_columns=["source", "target"])


def shorten(data: DatasetDict, args: DataArguments) -> DatasetDict:
    limits = {split: args.max_train_samples if split == "train" else args.max_eval_samples for split in data}
    return DatasetDict(
        {s: d if limits[s] is None else d.select(range(min(limits[s], len(d)))) for s, d in data.items()}
    )


class TranslationTrainer(WholeCheckpoints, MomoSeq2SeqTrainer):
    """MomoSeq2SeqTrainer whose checkpoints are whole even if the run is killed."""


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    data_args, model_args, args = parse_run((DataArguments, ModelArguments, Seq2SeqRunArguments), argv)
    prepare_output(args)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.WARNING, format="%(message)s")
    set_seed(args.seed)

    if data_args.dataset == "demo":
        logger.info(LANGUAGE)
    data = shorten(load_translation(data_args.dataset, data_args.source_lang, data_args.target_lang), data_args)
    tokenizer, model = load_model(model_args, data, data_args.max_length)
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize  # T5 has no limit
    if positions < data_args.max_length:
        logger.warning(
            f"max_length={data_args.max_length} is more than the {positions} tokens the model takes; so {positions}."
        )
        data_args.max_length = positions
    args.generation_max_length = min(positions, args.generation_max_length or data_args.max_length)
    # What the evaluation uses is saved with the model; without it `generate` stops after 20 tokens.
    model.generation_config.max_length = args.generation_max_length
    model.generation_config.num_beams = args.generation_num_beams or model.generation_config.num_beams
    tokens = tokenize(data, tokenizer, data_args)
    logger.info(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens, pairs: {data.num_rows}")

    def decode(ids: np.ndarray) -> list[str]:
        ids = np.where(ids == -100, tokenizer.pad_token_id, ids)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def compute_metrics(prediction) -> dict[str, float]:
        from momo_hf.recipes.translation.metric import TranslationMetric  # late, so that training begins sooner

        metric = TranslationMetric(cache_dir=args.output_dir)
        return metric.compute(predictions=decode(prediction.predictions), references=decode(prediction.label_ids))

    trainer = TranslationTrainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics,
    )
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {"train_loss": trained.training_loss, "last_logged_loss": logged[-1] if logged else None}
    metrics.update(trainer.evaluate())
    split = "test" if "test" in tokens else "validation"
    # Grouping by length would also reorder the test set, and the samples below must stand beside their sources.
    sampling, args.train_sampling_strategy = args.train_sampling_strategy, "random"
    predicted = trainer.predict(tokens[split], metric_key_prefix="test")
    args.train_sampling_strategy = sampling
    metrics.update(predicted.metrics)
    shown = slice(data_args.samples)
    samples = [
        {"source": source, "reference": reference, "translation": translation}
        for source, reference, translation in zip(
            data[split][shown]["source"], decode(predicted.label_ids[shown]), decode(predicted.predictions[shown])
        )
    ]
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        for sample in samples:
            print(f"\n  {sample['source']}\n= {sample['reference']}\n> {sample['translation']}")
        seconds = time.perf_counter() - start
        more = {"samples": samples, "history": trainer.state.log_history}
        path = write_results(args.output_dir, metrics, seconds, data_args, model_args, args, **more)
        print(
            f"\nBLEU {metrics['test_bleu']:.1f}, chrF {metrics['test_chrf']:.1f} on {split} after {seconds:.0f} s; see {path} "
            f"and training.png beside it. The model is in {args.output_dir}."
        )
        if data_args.dataset == "demo":
            print(LANGUAGE)


if __name__ == "__main__":
    end(run_main(main))
