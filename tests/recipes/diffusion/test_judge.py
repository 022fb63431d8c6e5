"""The judge of digits takes real ones and leaves what is none."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from momo_hf.recipes.diffusion.judge import NONE, DigitJudge, has_loop, is_legible
from momo_hf.recipes.images.data import load_images


@pytest.mark.parametrize("size, width", [(16, 2), (64, 6)])
def test_a_ring_is_a_loop_and_an_arc_is_none(size, width):
    for end, expected in ((360, True), (250, False)):
        image = Image.new("RGB", (size, size))
        ImageDraw.Draw(image).arc((2, 2, size - 3, size - 3), 0, end, "white", width)
        assert has_loop(image) == expected
        assert [is_legible(image, digit) for digit in (9, 7, 4)] == [expected, not expected, True]
    assert not has_loop(Image.new("L", (8, 8)))


def test_real_digits_are_taken_and_mixtures_and_noise_are_not():
    judge, held_out = DigitJudge(), load_images("demo")["validation"]
    labels, images = np.array(held_out["label"][:]), held_out["image"][:]
    found = judge.digits(images)
    taken = found != NONE
    assert taken.mean() > 0.8 and (found == labels)[taken].mean() > 0.99

    rng = np.random.default_rng(0)
    pairs = rng.permutation(len(images)).reshape(-1, 2)
    mixed = [Image.blend(images[i], images[j], 0.5) for i, j in pairs if labels[i] != labels[j]]
    noise = [Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)) for _ in range(100)]
    assert (judge.digits(noise) == NONE).all()
    assert (judge.digits(mixed) == NONE).mean() > 0.9
