"""Models of the paper's experiments that transformers does not have, as `PreTrainedModel`s."""
