"""BLEU and chrF as a module of `evaluate` that needs no download."""

from typing import Any

import datasets
import evaluate
import sacrebleu


class TranslationMetric(evaluate.Metric):
    """BLEU and chrF of a corpus, by sacrebleu with its standard settings (13a tokenization, mixed case).

    Use as any metric of `evaluate`: `TranslationMetric().compute(predictions=[...], references=[...])` with one
    reference string per prediction; returns `bleu` and `chrf`, both from 0 to 100.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018",
            inputs_description="predictions and references: lists of strings",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {
            "bleu": sacrebleu.corpus_bleu(predictions, [references]).score,
            "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
        }
