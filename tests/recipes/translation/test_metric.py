"""BLEU and chrF without a download."""

import pytest

from momo_hf.recipes.translation.metric import TranslationMetric


def test_metric_is_sacrebleu_without_a_download():
    result = TranslationMetric().compute(predictions=["the cat sat on the mat"], references=["the cat sat on the mat"])
    assert result == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    # Papineni et al.: 2-gram precision 1/1 ... of a shortened sentence is lowered by the brevity penalty exp(1 - 6/5).
    short = TranslationMetric().compute(predictions=["the cat sat on the"], references=["the cat sat on the mat"])
    assert short["bleu"] == pytest.approx(100 * 2.718281828 ** (1 - 6 / 5), rel=1e-6)
