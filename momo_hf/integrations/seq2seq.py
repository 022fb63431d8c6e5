"""`transformers.Seq2SeqTrainer` for MoMo, apart from the rest: its module may be half loaded when the rest is."""

from transformers import Seq2SeqTrainer

from momo_hf.integrations.transformers import MomoTrainerMixin


class MomoSeq2SeqTrainer(MomoTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with nothing to choose; see `MomoTrainerMixin`."""
