"""A joint BPE tokenizer, trained on both sides of the data and saved with the model."""

from collections.abc import Iterable

from datasets import are_progress_bars_disabled
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def train_bpe(
    texts: Iterable[str] | Iterable[list[str]], vocab_size: int, max_length: int, number: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a tokenizer that appends `</s>` and takes digits one by one, so that numbers can be copied.

    Args:
        texts: sentences of both languages, one by one or in batches, which is faster.
        vocab_size: upper limit of the vocabulary.
        max_length: tokens of the longest input that a model made with it takes.
        number: of sentences, for the progress bar.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    show = not are_progress_bars_disabled()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS, UNK], show_progress=show)
    tokenizer.train_from_iterator(texts, trainer, number)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],  # what `generate` takes
    )
