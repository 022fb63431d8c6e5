"""Methods of a user for the tests: directions that are not linear in the momentum."""

from momo_hf.optim import Method, MomoOptimizer


class Sign(Method):
    """u = sign(d̂), which does not grow with d̂."""

    ramp_start = 1e-6

    def direction(self, vector, buffers, options):
        return vector.sign()


class Rows(Method):
    """u = d̂ with every row divided by its length: it needs the shape of a parameter, and is taken for dear."""

    whole = costly = True
    ramp_start = 1e-6

    def direction(self, vector, buffers, options):
        rows = vector.reshape(len(vector), -1, vector.shape[-1] if vector.dim() > 1 else 1)
        return (rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-30)).view_as(vector)


class MomoSign(MomoOptimizer):
    methods = {"sign": Sign()}

    def __init__(self, params, lr=1e-2, beta=0.9, weight_decay=0.0, lb=0.0, **options):
        given = {"lr": lr, "beta": beta, "weight_decay": weight_decay, "lb": lb, "bias_correction": True}
        super().__init__(params, given | options)


class MomoRows(MomoSign):
    methods = {"rows": Rows()}
