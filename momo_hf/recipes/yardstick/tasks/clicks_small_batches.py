"""The clicks in batches of 40, which pass the data once."""

from momo_hf.recipes.yardstick.tasks.clicks import data, held_out, loss, model


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "clicks, DLRM, batches of 40"
STEPS, BATCH_SIZE = 1000, 40
