"""BatchNorm's statistics at the averaged weights, in a Trainer.

In training they follow the activations at the point where gradients are taken; the average never ran in train mode, and has
none of its own.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer

from momo_hf.integrations.weights import unwrap_optimizer


logger = logging.getLogger(__name__)

SAID = (
    "This model has BatchNorm. Whenever it is evaluated or saved, its statistics are taken anew at the averaged weights, from {batches} "
    "batches of the training data: as many forward passes each time. MomoCallback(batch_norm_batches=0) among the callbacks leaves them "
    "as training has left them, at other weights."
)


class BatchNormStatistics:
    """Takes the statistics of a model anew, once for every state of its weights.

    Args:
        batches: of training data to take them from; 0 leaves them alone.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._counts: dict[_BatchNorm, int] = {}  # how many batches the layers had seen when training began
        self._taken_at: int | None = None
        self._said = False

    def begin(self, model: nn.Module) -> None:
        """Training begins."""
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm)] if self._batches else []
        self._counts = {m: int(count) for m in layers if (count := m.num_batches_tracked) is not None}
        self._taken_at = None

    def refresh(self, trainer: Trainer) -> None:
        """Take them anew, if the average has none yet; layers that training leaves alone are left alone here too."""
        optimizer, step = unwrap_optimizer(trainer.optimizer), trainer.state.global_step
        if (
            not self._counts
            or optimizer is None
            or not optimizer.averages
            or optimizer.searching
            or step == self._taken_at
        ):
            return
        layers = [layer for layer, count in self._counts.items() if layer.num_batches_tracked != count]
        if not layers or trainer.train_dataset is None:
            return
        if not self._said and trainer.is_world_process_zero():
            logger.warning(SAID.format(batches=self._batches))
        self._said, self._taken_at = True, step
        optimizer.eval()
        model: Any = trainer.model
        modes = {module: module.training for module in model.modules()}
        devices = [trainer.args.device] if trainer.args.device.type not in ("cpu", "mps") else []
        # Neither what is drawn here nor dropout may change what training draws next.
        with torch.random.fork_rng(devices, device_type=trainer.args.device.type if devices else "cuda"):
            update_bn(batches_of(trainer, self._batches), _InTraining(trainer, layers))
        for module, mode in modes.items():
            module.training = mode


class _InTraining(nn.Module):
    """The model of a Trainer as `update_bn` sees it: with the layers to be updated alone, called with a batch, and in train mode but
    for the other BatchNorm layers.
    """

    def __init__(self, trainer: Trainer, layers: list[_BatchNorm]) -> None:
        super().__init__()
        self._trainer, self._layers = trainer, layers

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        return iter(self._layers)

    def train(self, mode: bool = True) -> "_InTraining":
        model: Any = self._trainer.model
        model.train(mode)
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                layer.train(mode and layer in self._layers)
        return self

    def forward(self, batch: Any) -> None:
        trainer: Any = self._trainer
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))


def batches_of(trainer: Trainer, count: int) -> DataLoader:
    """Some batches of the training data, other ones on every process, apart from the loader that training is in the middle of."""
    args = trainer.args
    data: Any = trainer.train_dataset
    rows = count * args.train_batch_size
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        data = list(itertools.islice(data, rows))
    else:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed + args.process_index))
        data = Subset(data, order[:rows].tolist())
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    return DataLoader(data, args.train_batch_size, collate_fn=collate, num_workers=args.dataloader_num_workers)
