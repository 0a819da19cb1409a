"""The training transforms: pure functions of (seed, step, index), with the semantics of mmsegmentation's."""

import colorsys
import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusekern.config import DataConfig
from fusekern.data.folder import Sample
from fusekern.data.transforms import TrainTransform, _distort, fit, resize_for_test

PLAIN = DataConfig(scale=(64, 48), ratio=(1, 1), crop=(48, 64), cat_max_ratio=1, flip=0, photometric=False)


def noise(height=48, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    return Sample(image, torch.randint(0, 5, (height, width), dtype=torch.uint8, generator=generator), "x")


def apply(sample, slot=0, step=0, seed=0, **changes):
    return TrainTransform(dataclasses.replace(PLAIN, **changes))(sample, seed=seed, step=step, slot=slot)


def test_fitted_sizes():
    assert fit((480, 640), (2048, 512)) == (512, 683)
    assert fit((640, 480), (512, 2048)) == (683, 512)
    assert fit((480, 640), (2048, 512), 0.5) == (256, 341)
    assert fit((100, 1000), (2048, 512)) == (205, 2048)  # the long side binds
    assert fit((1, 3000), (300, 100)) == (1, 300)


def test_without_randomness_it_is_the_test_resize():
    sample = noise(33, 59)
    image, label = apply(sample)
    expected = resize_for_test(sample.image, PLAIN.scale)
    assert expected.shape == (3, 36, 64) and image.dtype == expected.dtype == torch.float32
    assert torch.equal(image[:, :36], expected) and label.dtype == torch.int64


@pytest.mark.parametrize("size", [(30, 41), (97, 130)])
def test_resize_is_pillows_antialiased_bilinear(size):
    sample = noise(*size)
    found = resize_for_test(sample.image, (64, 48))
    picture = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    expected = np.array(picture.resize(found.shape[:0:-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    # One grey level: both round their fixed-point weights, and not alike.
    assert np.abs(found.numpy() * 255 - expected).max() <= 1.001


def test_padding_vanishes_in_the_model():
    sample = noise(24, 32)
    image, label = apply(sample, scale=(32, 24), crop=(40, 50), mean=(0.1, 0.2, 0.3))
    assert image.shape == (3, 40, 50) and label.shape == (40, 50)
    assert torch.equal(image[:, :24, :32], sample.image / 255) and (label[:24, :32] == sample.label).all()
    outside = torch.ones(40, 50, dtype=torch.bool)
    outside[:24, :32] = False
    assert (label[outside] == 255).all()
    assert torch.equal(image[:, outside], torch.tensor([0.1, 0.2, 0.3])[:, None].expand(3, int(outside.sum())))


def test_flip_mirrors_image_and_label():
    image, label = apply(noise())
    mirrored, mirrored_label = apply(noise(), flip=1)
    assert torch.equal(mirrored, image.flip(2)) and torch.equal(mirrored_label, label.flip(1))
    flipped = [not torch.equal(apply(noise(), index, flip=0.5)[0], image) for index in range(200)]
    assert 70 <= sum(flipped) <= 130  # more than four standard deviations from 100


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(40, 90), st.integers(40, 90)),
    crop=st.tuples(st.integers(8, 70), st.integers(8, 70)),
    slot=st.integers(0, 100),
)
def test_image_and_label_stay_together(size, crop, slot):
    y, x = torch.arange(size[0])[:, None].expand(size), torch.arange(size[1])[None].expand(size)
    blocks = (y // 10 * 16 + x // 10).to(torch.uint8)
    places = torch.stack([y * 2, x * 2, x * 0]).to(torch.uint8)
    image, label = apply(Sample(places, blocks, "x"), slot, ratio=(0.5, 2), crop=crop, flip=0.5, cat_max_ratio=0.75)
    assert image.shape == (3, *crop) and label.shape == crop
    known = label != 255
    found_y, found_x = image[0][known] * 127.5, image[1][known] * 127.5
    # The image's colour says where a pixel comes from, the label the block of 10 x 10 around that place. They may part
    # by half a pixel of nearest against bilinear, half of rounding, and two where the filter meets the picture's edge.
    for place, block in ((found_y, label[known] // 16), (found_x, label[known] % 16)):
        assert (place >= block * 10 - 3).all() and (place <= block * 10 + 9 + 3).all()


def test_label_is_resized_to_the_nearest_pixel():
    label = torch.tensor([[0, 3], [3, 1]], dtype=torch.uint8)
    sample = Sample(torch.zeros(3, 2, 2, dtype=torch.uint8), label, "x")
    _, large = apply(sample, scale=(8, 8), crop=(8, 8))
    assert torch.equal(large, label.long().repeat_interleave(4, 0).repeat_interleave(4, 1))
    sample = Sample(torch.zeros(3, 6, 6, dtype=torch.uint8), torch.arange(36, dtype=torch.uint8).view(6, 6), "x")
    assert apply(sample, scale=(2, 2), crop=(2, 2))[1].tolist() == [[7, 10], [25, 28]]  # the centres of 3 x 3 pixels


def test_same_arguments_give_the_same_bits():
    sample, data = noise(), DataConfig(scale=(64, 48), crop=(40, 40))
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    outputs = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]:
        seed, step, slot = key
        first, second = (TrainTransform(data)(sample, seed=seed, step=step, slot=slot) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        outputs[key] = first[0].numpy().tobytes()
        torch.rand(1)
    assert len(set(outputs.values())) == len(outputs)
    torch.set_rng_state(state[0])
    apply(sample, ratio=(0.5, 2), flip=0.5, photometric=True)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert random.getstate() == state[2]


def test_ratio_covers_its_range():
    sample, sizes = noise(), []
    for index in range(100):
        _, label = apply(sample, index, ratio=(0.5, 2), crop=(200, 200))
        sizes.append((label[:, 0] != 255).sum().item())
    assert min(sizes) in range(24, 29) and max(sizes) in range(92, 97)
    assert 51 <= np.mean(sizes) <= 69  # uniform on 24 to 96: 60, standard error 2.1


def test_crops_reach_every_corner():
    sample = noise(48, 64)
    sample.label.copy_(torch.arange(48)[:, None] // 12 * 16 + torch.arange(64)[None] // 4)
    seen = torch.cat([apply(sample, index, crop=(12, 16))[1].flatten() for index in range(300)])
    assert set(seen.tolist()) == set(sample.label.flatten().tolist())


def test_no_class_fills_the_crop_if_that_can_be_helped():
    label = torch.zeros(48, 64, dtype=torch.uint8)
    label[:, 32:] = 1
    label[:8] = 255  # ignored pixels do not count
    sample = Sample(torch.zeros(3, 48, 64, dtype=torch.uint8), label, "x")

    def share_of_mixed(limit):
        mixed = 0
        for index in range(100):
            _, cropped = apply(sample, index, crop=(20, 20), cat_max_ratio=limit)
            counts = torch.bincount(cropped.flatten(), minlength=256)[:255]
            mixed += bool(counts.max() < 0.75 * counts.sum())
        return mixed

    # A single try succeeds at about a fifth of the places, ten tries with 1 - 0.8**10 = 0.9.
    assert share_of_mixed(1.0) < 40 and share_of_mixed(0.75) > 70


@pytest.mark.parametrize("value", [0, 255])
def test_label_of_one_value_ends_the_tries(value):
    sample = Sample(torch.zeros(3, 48, 64, dtype=torch.uint8), torch.full((48, 64), value, dtype=torch.uint8), "x")
    assert (apply(sample, crop=(20, 20), cat_max_ratio=0.75)[1] == value).all()


class Script:
    """Stands in for the generator: which parts happen, in which order, and where in its range each number lies."""

    def __init__(self, parts, contrast_first, place):
        self.draws = [np.where(parts, 0.1, 0.9), 0.1 if contrast_first else 0.9]
        self.place = place

    def random(self, size=None):
        return self.draws.pop(0)

    def uniform(self, low, high):
        return low + (high - low) * self.place


def distort_pixel(pixel, parts, contrast_first, place):
    brightness, contrast, saturation, hue = parts
    gain = 0.5 + place
    if brightness:
        pixel = np.clip(pixel + (64 * place - 32) / 255, 0, 1)
    if contrast and contrast_first:
        pixel = np.clip(pixel * gain, 0, 1)
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    if saturation:
        s = min(s * gain, 1)
    if hue:
        h = (h + (36 * place - 18) / 180) % 1
    pixel = np.array(colorsys.hsv_to_rgb(h, s, v))
    return np.clip(pixel * gain, 0, 1) if contrast and not contrast_first else pixel


@pytest.mark.parametrize("place", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize("parts", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0)])
def test_photometric_distortion_pixel_by_pixel(parts, contrast_first, place):
    pixels = np.random.default_rng(0).random((40, 3))
    pixels[0], pixels[1], pixels[2], pixels[3] = 0, 1, 0.5, (1, 0, 0)
    found = _distort(torch.from_numpy(pixels.T[:, :, None]).float(), Script(parts, contrast_first, place))
    expected = [distort_pixel(pixel, parts, contrast_first, place) for pixel in pixels]
    # float32 against float64, through a division by the smallest saturation in the sample
    assert np.abs(found[..., 0].numpy().T - expected).max() < 2e-5


def test_each_distortion_happens_half_of_the_time():
    grey = Sample(torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8), "x")
    values = [255 * apply(grey, k, scale=(4, 4), crop=(4, 4), photometric=True)[0][0, 0, 0].item() for k in range(400)]
    unchanged = sum(abs(value - 100) < 1e-3 for value in values)
    assert 65 <= unchanged <= 135  # neither brightness nor contrast, a quarter of 400, four standard deviations
    assert min(values) >= 34 - 1e-3 and max(values) <= 198 + 1e-3  # (100 - 32) * 0.5 and (100 + 32) * 1.5
