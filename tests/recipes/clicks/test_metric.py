"""The scores of clicks without a download, against scikit-learn and by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from momo_hf.recipes.clicks.metric import ClickMetric


def test_clicks(tmp_path):
    metric = ClickMetric(cache_dir=str(tmp_path))
    rng = np.random.default_rng(0)
    p, labels = rng.uniform(0.01, 0.99, 200), (rng.random(200) < 0.3).astype(float)
    found = metric.compute(predictions=p, references=labels)
    rate = labels.mean()
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, p))
    assert found["log_loss"] == pytest.approx(log_loss(labels, p))
    assert found["normalized_entropy"] == pytest.approx(found["log_loss"] / entropy)
    # The base rate itself has a normalised entropy of 1; NaN stays NaN instead of ending the run.
    found = metric.compute(predictions=np.full(200, rate), references=labels)
    assert found["normalized_entropy"] == pytest.approx(1) and found["auc"] == 0.5
    found = metric.compute(predictions=[float("nan"), 0.5], references=[0, 1])
    assert all(math.isnan(value) for value in found.values())
