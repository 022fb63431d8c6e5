"""Which parameters of a model are tables of embeddings."""

from typing import Any

from torch import nn

from momo_hf.integrations.weights import unwrap_optimizer


def mark_tables(model: nn.Module, optimizer: Any) -> None:
    """Tell an optimizer which of its parameters are tables of embeddings, whose steps are bounded where it averages.

    `Accelerator.prepare`, and so Trainer, does it for the models that it prepares. A loop without them calls this once, before
    the first step. The weights of `nn.Embedding` and `nn.EmbeddingBag` are tables, unless another layer has them too, as a
    tied output layer. What is marked is saved with the state, so that one that was saved without goes on without.

    Args:
        model: the model, before or after sharding.
        optimizer: a MoMo optimizer, prepared by accelerate or not; any other one, and one that does not average or has taken a
            step, is left as it is.

    Example:
        >>> optimizer = MomoAdam(model.parameters(), lr="auto", averaging=True)
        >>> mark_tables(model, optimizer)
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None or not optimizer.averages or optimizer.state:
        return
    tables: dict[int, bool] = {}
    for module in model.modules():
        looked_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for p in module.parameters(recurse=False):
            tables[id(p)] = looked_up and tables.get(id(p), True)
    for group in optimizer.param_groups:
        found = {place for place, p in enumerate(group["params"]) if tables.get(id(p))}
        if found:
            found.update(group.get("tables", ()))  # those of another model
            group["tables"] = tuple(sorted(found))
