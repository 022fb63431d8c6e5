"""Which parameters of a model are embeddings."""

from typing import Any

from torch import nn

from momo_hf.integrations.weights import unwrap_optimizer
from momo_hf.optim.steps.averaged import others_share_of


# The part of all trained parameters from which on embeddings count as such. In the tasks that showed it they are 0.4 to 0.84; nobody
# has looked at a few, as the classes of a U-Net.
LARGE = 0.1


def mark_tables(model: nn.Module, optimizer: Any) -> None:
    """Tell an optimizer that averages which of its parameters are embeddings.

    `Accelerator.prepare`, and so Trainer, does it for the models that it prepares. A loop without them calls this once, before
    the first step. The weights of `nn.Embedding` and `nn.EmbeddingBag` are embeddings: with Adam, where they learn and are a tenth
    of all trained parameters at least, they have longer steps than the layers beside them after a search for the cap. Where no
    other layer has them too, as a tied output layer, they are tables that are only looked up, and their steps are bounded. See
    `momo_hf.optim.steps.averaged`. What is marked is saved with the state, so that one that was saved without goes on without.

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
    inside: set[int] = set()
    outside: set[int] = set()
    for module in model.modules():
        looked_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        (inside if looked_up else outside).update(map(id, module.parameters(recurse=False)))
    kinds = {"tables": inside - outside}
    trained = {id(p): p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    learns = sum(trained.get(one, 0) for one in inside) >= LARGE * sum(trained.values())
    if learns and others_share_of(optimizer.methods) != 1:
        kinds["embeddings"] = inside
    for name, kind in kinds.items():
        for group in optimizer.param_groups:
            found = {place for place, p in enumerate(group["params"]) if id(p) in kind}
            if found:
                found.update(group.get(name, ()))  # those of another model
                group[name] = tuple(sorted(found))
