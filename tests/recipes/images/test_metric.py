"""Accuracy without a download."""

from momo_hf.recipes.images.metric import Accuracy


def test_accuracy(tmp_path):
    metric = Accuracy(cache_dir=str(tmp_path))
    assert metric.compute(predictions=[1, 2, 3, 3], references=[1, 2, 0, 3]) == {"accuracy": 0.75}
