"""The classifiers of the package: sizes of the papers, saving and loading, and what every config builds."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.images.models import OWN_MODELS
from momo_hf.recipes.run import parse_run


# Parameters as published: He et al. 2016 give 0.27 M and 1.7 M; the MLP and VGG16 by their layers.
SIZES = [
    ("mlp", {"image_size": 28, "num_channels": 1}, 784 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10),
    ("cifar_resnet", {"depth": 20}, 269_722),
    ("cifar_resnet", {"depth": 110}, 1_727_962),
    ("vgg16", {}, 14_714_688 + 512 * 10 + 10),
]


@pytest.mark.parametrize("name, options, expected", SIZES)
def test_sizes_and_saving(name, options, expected, tmp_path):
    config_class, model_class = OWN_MODELS[name]
    config = config_class(num_labels=10, **options)
    model = model_class(config).eval()
    assert model.num_parameters() == expected
    pixels = torch.randn(2, config.num_channels, config.image_size, config.image_size)
    output = model(pixel_values=pixels, labels=torch.tensor([1, 2]))
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([1, 2])))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels).logits, output.logits)


@pytest.mark.parametrize(
    "name, options, message",
    [("cifar_resnet", {"depth": 21}, "6n \\+ 2, got 21"), ("vgg16", {"image_size": 16}, "32 or more, got 16")],
)
def test_impossible_sizes_are_named(name, options, message):
    config_class, model_class = OWN_MODELS[name]
    with pytest.raises(InputError, match=message):
        model_class(config_class(**options))


# ResNet18 and ViT-B/16 as published have 11.7 M and 86.6 M parameters.
CONFIGS = {
    "cifar100_resnet110": (100, 1_733_812), "cifar10_resnet20": (10, 269_722), "cifar10_vgg16": (10, 14_719_818),
    "cifar10_vit": (10, 9_532_938), "demo": (10, 17_610), "imagenet32_resnet18": (1000, 11_689_512),
    "imagenet_vit": (1000, 86_567_656), "mnist_mlp": (10, 89_610),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_its_model(name):
    classes, expected = CONFIGS[name]
    script = runpy.run_path("scripts/run_image_classification.py")
    types = [script[kind] for kind in ("DataArguments", "ModelArguments", "RunArguments")]
    data, model_args, _ = parse_run(types, [f"configs/image_classification/{name}.yaml", "--use_cpu=True"])
    with torch.device("meta"):
        model = script["load_model"](model_args, data, [str(i) for i in range(classes)])
    pixels = torch.zeros(2, data.image_channels, data.resolution, data.resolution, device="meta")
    assert model(pixel_values=pixels).logits.shape == (2, classes) and model.num_parameters() == expected


def test_every_config_of_the_classifiers_is_here():
    assert sorted(CONFIGS) == sorted(path.stem for path in Path("configs/image_classification").glob("*.yaml"))
