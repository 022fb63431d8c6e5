"""`pipeline("translation", FOLDER)` for transformers 5, which no longer has that task.

Importing this module registers the task in transformers' registry, unless transformers has it.
"""

from typing import Any

from transformers import AutoModelForSeq2SeqLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from momo_hf.compat import removed_pipeline_tasks


class TranslationPipeline(Pipeline):
    """Translates strings with a seq2seq model; generation arguments go into the call."""

    # The types of the base class have no `generate`, no fast tokenizer, and nothing but None for what is to be loaded.
    model: Any
    tokenizer: Any
    _load_tokenizer: Any = True
    _pipeline_calls_generate = True

    def _sanitize_parameters(self, **generate_kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, generate_kwargs, {}

    def preprocess(self, input_: str, **parameters: Any) -> dict[str, Any]:
        inputs = self.tokenizer(input_, return_tensors="pt", truncation=True)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _forward(self, input_tensors: dict[str, Any], **generate_kwargs: Any) -> Any:
        return self.model.generate(**input_tensors, **generate_kwargs)

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list[dict[str, str]]:
        texts = self.tokenizer.batch_decode(model_outputs, skip_special_tokens=True)
        return [{"translation_text": text} for text in texts]


# transformers refuses the names it removed, even where another package has registered them.
removed_pipeline_tasks().pop("translation", None)
if "translation" not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline("translation", TranslationPipeline, pt_model=AutoModelForSeq2SeqLM)
