"""DLRM: a recommender of dense features and embedded categories (Naumov et al. 2019, arXiv 1906.00091)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from momo_hf.compat import config_dataclass


@config_dataclass
class DLRMConfig(PretrainedConfig):
    """Options of a DLRM.

    Args:
        num_dense: number of dense features.
        num_tables: number of categorical features.
        table_size: rows of each embedding table.
        embedding_dim: width of the embeddings, and of the bottom MLP's output.
        bottom_mlp: widths of the hidden layers over the dense features.
        top_mlp: widths of the hidden layers over the interactions.
    """

    model_type = "momo_dlrm"

    num_dense: int = 13
    num_tables: int = 26
    table_size: int = 100_000
    embedding_dim: int = 16
    bottom_mlp: list[int] = field(default_factory=lambda: [512, 256, 64])
    top_mlp: list[int] = field(default_factory=lambda: [512, 256])


@dataclass
class ClickOutput(ModelOutput):
    """`loss`: mean binary cross entropy, with labels; `logits`: log-odds of a click, float of shape (batch,)."""

    loss: Tensor | None = None
    logits: Tensor | None = None


def mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for narrow, wide in zip(sizes, sizes[1:]):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers)


class DLRM(PreTrainedModel):
    """Click prediction: a bottom MLP over dense features, one embedding per category, their inner products, a top MLP."""

    config_class = DLRMConfig
    main_input_name = "dense"

    def __init__(self, config: DLRMConfig) -> None:
        super().__init__(config)
        dim, vectors = config.embedding_dim, config.num_tables + 1
        self.bottom = mlp([config.num_dense, *config.bottom_mlp, dim])
        # All tables in one, because one large gradient is cheaper than many small ones.
        self.tables = nn.Embedding(config.num_tables * config.table_size, dim)
        self.top = mlp([dim + vectors * (vectors - 1) // 2, *config.top_mlp])
        self.click = nn.Linear(config.top_mlp[-1], 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            bound = self.config.table_size**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def forward(
        self, dense: Tensor, sparse: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ClickOutput:
        """Predict clicks.

        Args:
            dense: float of shape (batch, num_dense).
            sparse: int64 of shape (batch, num_tables), each below `table_size`.
            labels: 0 or 1, shape (batch,).
            return_dict: for callers that expect the argument; the output is always one object.
        """
        bottom = self.bottom(dense)
        offsets = torch.arange(sparse.shape[1], device=sparse.device) * self.config.table_size
        vectors = torch.cat([bottom[:, None], self.tables(sparse + offsets)], dim=1)
        products = vectors @ vectors.transpose(1, 2)
        first, second = torch.tril_indices(products.shape[1], products.shape[2], offset=-1, device=dense.device)
        logits = self.click(self.top(torch.cat([bottom, products[:, first, second]], dim=1))).squeeze(-1)
        loss = None
        if labels is not None:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return ClickOutput(loss=loss, logits=logits)


AutoConfig.register(DLRMConfig.model_type, DLRMConfig, exist_ok=True)
AutoModel.register(DLRMConfig, DLRM, exist_ok=True)
