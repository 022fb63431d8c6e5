"""What the scalar side of a step is given, whatever its kind."""

from typing import NamedTuple

from torch import Tensor

from momo_hf.optim.record import Group, beta_of


class Given(NamedTuple):
    """What a step is given.

    Attributes:
        loss: f_k, 0-dim, in the dtype of the scalars.
        clip_factor: κ, 0-dim, at most 1; or None.
        whole_norm: whether κ comes from the norm of all gradients as they are, so that it says whether they are finite.
        lr: the caps α_g, shape (groups,), or with one for the embeddings of each group and one for its other parameters,
            shape (2 groups,); see `cap.shares`.
        weight_decay: λ_g, likewise.
        dropped: whether the gradients are known not to be finite.
    """

    loss: Tensor
    clip_factor: Tensor | None
    whole_norm: bool
    lr: Tensor
    weight_decay: Tensor
    dropped: bool = False


class Settings(NamedTuple):
    """The options that all groups share.

    Attributes:
        lb: the user's lower bound of the loss; f* never falls below it.
        beta: β of the averages.
        bias_correction: whether ρ_k = 1-β^k (averages start at 0) or 1 (they start at the first sample).
        use_fstar: whether f* is estimated online, by the paper's rule (section 4).
        divide: whether the decay is proximal, `/ (1 + a)`, or AdamW's, `(1 - a) x`.
    """

    lb: float
    beta: float
    bias_correction: bool
    use_fstar: bool
    divide: bool


def settings_of(group: Group) -> Settings:
    """Those of a parameter group."""
    return Settings(group["lb"], beta_of(group), group["bias_correction"], group["use_fstar"], group["divide"])


class Beginning(NamedTuple):
    """What is known before the first pass; 0-dim tensors, or Python's numbers, see `arithmetic`.

    Attributes:
        step: k.
        weight: 1-β_k, the weight of its sample in the averages.
        inputs_valid: whether the step can be taken, as far as its inputs say; see `model.acceptable`.
    """

    step: Tensor
    weight: Tensor
    inputs_valid: Tensor
