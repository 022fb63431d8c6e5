"""The image classifiers of the paper that transformers does not have: an MLP, the CIFAR ResNets, VGG16 for 32 pixels.

Importing this module makes them known to `AutoConfig` and `AutoModelForImageClassification`.
"""

from dataclasses import field

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from momo_hf.compat import config_dataclass
from momo_hf.recipes.errors import InputError


VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")


@config_dataclass
class SmallVisionConfig(PretrainedConfig):
    """Options of the small classifiers.

    Args:
        image_size: side of the images in pixels.
        num_channels: 1 or 3.
        hidden_sizes: MLP: widths of the hidden layers.
        depth: ResNet: 6n + 2 layers, for example 20 or 110.
        batch_norm: VGG: normalise after each convolution.
    """

    image_size: int = 32
    num_channels: int = 3
    hidden_sizes: list[int] = field(default_factory=lambda: [100, 100])
    depth: int = 20
    batch_norm: bool = False


class MLPConfig(SmallVisionConfig):
    model_type = "momo_mlp"


class CifarResNetConfig(SmallVisionConfig):
    model_type = "momo_cifar_resnet"


class VGGConfig(SmallVisionConfig):
    model_type = "momo_vgg"


class SmallVisionModel(PreTrainedModel):
    """An image classifier; a subclass makes `self.network`, from pixels to logits."""

    main_input_name = "pixel_values"

    def __init__(self, config: SmallVisionConfig) -> None:
        super().__init__(config)
        self.network = self.build(config)
        self.post_init()

    @staticmethod
    def build(config: SmallVisionConfig) -> nn.Module:
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initialisation of each layer is the one of the experiments.
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: float of shape (batch, channels, size, size).
            labels: int64 of shape (batch,).
            return_dict: for callers that expect the argument; the output is always one object.

        Returns:
            `logits` of shape (batch, classes), and with labels the mean cross entropy as `loss`.
        """
        logits = self.network(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def head(features: int, config: SmallVisionConfig) -> nn.Linear:
    """The last layer of a classifier, with an output for every class of the config."""
    return nn.Linear(features, len(config.id2label or ()))


class MLPForImageClassification(SmallVisionModel):
    """Fully connected layers with ReLU between them: 784-100-100-10 for MNIST."""

    config_class = MLPConfig

    @staticmethod
    def build(config: SmallVisionConfig) -> nn.Module:
        sizes = [config.num_channels * config.image_size**2, *config.hidden_sizes]
        layers: list[nn.Module] = [nn.Flatten()]
        for narrow, wide in zip(sizes, sizes[1:]):
            layers += [nn.Linear(narrow, wide), nn.ReLU()]
        return nn.Sequential(*layers, head(sizes[-1], config))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels with zeros (He et al. 2016, option A)."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, wide - narrow
        self.body = nn.Sequential(
            nn.Conv2d(narrow, wide, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, 1, 1, bias=False),
            nn.BatchNorm2d(wide),
        )

    def forward(self, x: Tensor) -> Tensor:
        half = self.added // 2
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))
        return torch.relu(self.body(x) + shortcut)


class CifarResNetForImageClassification(SmallVisionModel):
    """The ResNets for 32 pixels with 16, 32 and 64 channels (He et al. 2016, section 4.2)."""

    config_class = CifarResNetConfig

    @staticmethod
    def build(config: SmallVisionConfig) -> nn.Module:
        blocks, rest = divmod(config.depth - 2, 6)
        if rest or blocks < 1:
            raise InputError(f"`depth` must be 6n + 2, got {config.depth}: take 20, 56 or 110.")
        layers: list[nn.Module] = [
            nn.Conv2d(config.num_channels, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
        narrow = 16
        for wide in (16, 32, 64):
            for block in range(blocks):
                layers.append(BasicBlock(narrow, wide, 2 if block == 0 and wide > 16 else 1))
                narrow = wide
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(64, config))


class VGGForImageClassification(SmallVisionModel):
    """VGG16 for 32 pixels: thirteen 3x3 convolutions, one linear layer (Simonyan and Zisserman 2015, column D)."""

    config_class = VGGConfig

    @staticmethod
    def build(config: SmallVisionConfig) -> nn.Module:
        layers: list[nn.Module] = []
        narrow = config.num_channels
        for wide in VGG16:
            if isinstance(wide, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(narrow, wide, 3, padding=1))
            if config.batch_norm:
                layers.append(nn.BatchNorm2d(wide))
            layers.append(nn.ReLU())
            narrow = wide
        if config.image_size < 32:
            raise InputError(f"`image_size` must be 32 or more, got {config.image_size}: VGG16 halves it five times.")
        side = config.image_size // 32
        return nn.Sequential(*layers, nn.Flatten(), head(512 * side**2, config))


OWN_MODELS = {
    "mlp": (MLPConfig, MLPForImageClassification),
    "cifar_resnet": (CifarResNetConfig, CifarResNetForImageClassification),
    "vgg16": (VGGConfig, VGGForImageClassification),
}
for config_class, model_class in OWN_MODELS.values():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForImageClassification.register(config_class, model_class, exist_ok=True)
