"""The DLRM by its definition, saved and loaded."""

import torch
from transformers import AutoModel

from momo_hf.recipes.clicks.dlrm import DLRM, DLRMConfig


def test_dlrm(tmp_path):
    config = DLRMConfig(num_dense=3, num_tables=2, table_size=5, embedding_dim=4, bottom_mlp=[6], top_mlp=[7])
    model = DLRM(config)
    dense, sparse = torch.randn(8, 3), torch.randint(5, (8, 2))
    labels = torch.randint(2, (8,)).float()
    output = model(dense, sparse, labels)
    # By its definition: the bottom vector, and the inner products of all pairs of vectors.
    bottom = model.bottom(dense)
    first, second = model.tables.weight[:5][sparse[:, 0]], model.tables.weight[5:][sparse[:, 1]]
    pairs = [(first * bottom).sum(1), (second * bottom).sum(1), (second * first).sum(1)]
    logits = model.click(model.top(torch.cat([bottom, torch.stack(pairs, 1)], 1))).squeeze(1)
    torch.testing.assert_close(output.logits, logits)
    expected = -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean()
    torch.testing.assert_close(output.loss, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(dense, sparse).logits, model(dense, sparse).logits)
