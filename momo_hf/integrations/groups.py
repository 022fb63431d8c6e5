"""Which parameters of a model Muon takes, and which are Adam's."""

import math
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.trainer_pt_utils import get_parameter_names

from momo_hf.optim import MomoOptimizer
from momo_hf.optim.checks import check_plain


# The shorter side of a matrix of Muon, and how much longer the other one may be. A matrix that is nearly a vector, as those of
# LoRA, has little to orthogonalise. The kernel of a convolution is the matrix (out, in · height · width).
NARROW, LONG, LONG_KERNEL = 16, 8, 18
# Names of parameters without weight decay, as Trainer has them.
UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Groups = list[dict[str, Any]]


def muon_groups(model: nn.Module, weight_decay: float = 0.0) -> Groups:
    """Make the parameter groups of `MomoMuon`: Muon for hidden matrices and convolution kernels, Adam for everything else.

    Adam gets embeddings; the output layer, tied or not (it is what `get_output_embeddings` names, as in models of transformers, and
    otherwise the last matrix); biases, norms and everything else with one dimension; LoRA's matrices, all matrices with a side
    below 16, and those more than 8 times as long as wide (kernels: 18 times); and parameters with three or more dimensions that
    do not belong to a convolution, such as the stacked experts of a mixture. Frozen parameters are left out.

    Args:
        model: the model, before or after sharding.
        weight_decay: the weight decay of the parameters that decay under Trainer, that is, not of biases and norms. Default 0.

    Returns:
        Parameter groups with `params`, `method` and `weight_decay`, none of them empty.

    Raises:
        ValueError: a trainable parameter has a dtype that MoMo does not support, such as complex or float8, or packs its
            elements, as a quantized weight does.

    Example:
        >>> optimizer = MomoMuon(muon_groups(model, weight_decay=0.1), lr="auto", averaging=True)
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if p.dtype not in DTYPES:
            raise ValueError(
                f"{name} is to be trained and has dtype {p.dtype}, which MoMo does not take: freeze it by requires_grad_(False), or "
                "build it in float32 or bfloat16."
            )
    check_plain(trained)
    decayed = set(get_parameter_names(model, [nn.LayerNorm], UNDECAYED))
    groups = [
        {"params": [p for name, p in trained.items() if (name in decayed) == decays], "weight_decay": own}
        for decays, own in ((True, weight_decay), (False, 0.0))
    ]
    return by_method(model, groups)


def by_method(model: nn.Module, groups: Groups) -> Groups:
    """Divide parameter groups into those of Muon and those of Adam, with all other options as they are; without empty ones.

    Args:
        model: that the parameters are of, wrapped for several processes or not.
        groups: parameter groups.
    """
    model = extract_model_from_parallel(model)
    apart, divided = _ends_of(model), []
    for group in groups:
        of: dict[str, list[nn.Parameter]] = {"muon": [], "adam": []}
        for p in group["params"]:
            of["muon" if id(p) not in apart and _is_matrix(p) else "adam"].append(p)
        divided += [{**group, "params": params, "method": method} for method, params in of.items() if params]
    return divided


def methods_in_words(optimizer: MomoOptimizer) -> str:
    """How many parameters each method of an optimizer has; empty where it knows one alone."""
    if len(optimizer.methods) == 1:
        return ""
    sizes = dict.fromkeys(optimizer.methods, 0)
    for group in optimizer.param_groups:
        sizes[group["method"]] += sum(p.numel() for p in group["params"])
    return ", ".join(
        f"{type(optimizer.methods[name]).__name__} for {size:,} parameters" for name, size in sizes.items()
    )


def _ends_of(model: nn.Module) -> set[int]:
    """The identities of the parameters that are Adam's for what they are: of embeddings, output layer and LoRA, and stacks."""
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    ends = {id(m.weight) for m in embeddings} | {id(p) for name, p in model.named_parameters() if "lora_" in name}
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
    ends |= {id(p) for p in model.parameters() if p.dim() > 2 and id(p) not in kernels}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:  # one layer, or a list of them
        return ends | {id(p) for p in output.parameters()}
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return ends | {id(matrices[-1])} if matrices else ends


def _is_matrix(param: nn.Parameter) -> bool:
    if param.dim() < 2:
        return False
    narrow, wide = sorted((param.shape[0], math.prod(param.shape[1:])))
    return narrow >= NARROW and wide <= (LONG if param.dim() == 2 else LONG_KERNEL) * narrow
