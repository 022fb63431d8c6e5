"""Synthetic clicks of known structure: a DLRM, batches of 128."""

from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from momo_hf.recipes.clicks.data import load_clicks
from momo_hf.recipes.clicks.dlrm import DLRM, DLRMConfig
from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.measures import held_out_batches


TITLE = "clicks, DLRM, batches of 128"
STEPS, BATCH_SIZE = 1000, 128

TABLE_SIZE = 100


def data(places: Places) -> Data:
    def tensors(rows: Dataset) -> TensorDataset:
        columns = rows.with_format("torch")[:]
        return TensorDataset(columns["dense"], columns["sparse"], columns["labels"])

    clicks = load_clicks("demo", TABLE_SIZE)
    return Data(tensors(clicks.train), tensors(clicks.validation))


def model(data: Data) -> DLRM:
    return DLRM(DLRMConfig(table_size=TABLE_SIZE, embedding_dim=8, bottom_mlp=[32], top_mlp=[64, 32]))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return model(*batch).loss


def held_out(model: nn.Module, data: Data) -> dict[str, float]:
    losses = [(len(batch[0]), loss(model, batch).item()) for batch in held_out_batches(data)]
    return {"loss": sum(number * value for number, value in losses) / len(data.held_out)}
