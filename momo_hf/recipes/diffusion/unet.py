"""A new UNet of any size."""

from collections.abc import Sequence

from diffusers import UNet2DModel


def new_unet(
    resolution: int,
    channels: int,
    block_out_channels: Sequence[int],
    attention_levels: Sequence[int],
    layers_per_block: int,
    norm_num_groups: int,
) -> UNet2DModel:
    """A UNet that predicts noise like its input, with fresh weights.

    Args:
        resolution: side of the images in pixels.
        channels: of the images.
        block_out_channels: of every level, from the finest.
        attention_levels: numbers of the levels with attention, from 0.
        layers_per_block: ResNet layers per level.
        norm_num_groups: groups of the group norm.
    """
    levels = range(len(block_out_channels))
    return UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=layers_per_block,
        block_out_channels=block_out_channels,
        norm_num_groups=norm_num_groups,
        down_block_types=["AttnDownBlock2D" if level in attention_levels else "DownBlock2D" for level in levels],
        up_block_types=["AttnUpBlock2D" if level in attention_levels else "UpBlock2D" for level in reversed(levels)],
    )
