"""The scores of click predictions as a module of `evaluate` that needs no download."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import log_loss, roc_auc_score


class ClickMetric(evaluate.Metric):
    """AUC, log loss and normalised entropy of click predictions.

    `ClickMetric().compute(predictions=[...], references=[...])` with probabilities and labels 0 or 1 returns `auc`,
    `log_loss` in nats, and `normalized_entropy`: the log loss over that of the constant base rate (He et al. 2014). All
    are NaN if a prediction is.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014",
            inputs_description="predictions: probabilities; references: labels 0 or 1",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        if not np.isfinite(predictions).all():
            return dict.fromkeys(("auc", "log_loss", "normalized_entropy"), float("nan"))
        loss, rate = log_loss(references, predictions, labels=[0, 1]), np.mean(references)
        both = 0 < rate < 1  # with one class alone there is nothing to rank, and the base rate is certain
        return {
            "auc": float(roc_auc_score(references, predictions)) if both else float("nan"),
            "log_loss": float(loss),
            "normalized_entropy": float(loss / log_loss([0, 1], [rate, rate], sample_weight=[1 - rate, rate]))
            if both
            else float("nan"),
        }
