"""The launchers of kernels/score_map.py against the reference; see test_interpreter.py for how it is run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fusekern.kernels import score_map as kernels
from fusekern.kernels.score_map import SETTINGS, compile_cases, score_map_bwd, score_map_fwd, setting_of, view
from spy import Launches, short
from where import DEVICE, DTYPES

from fusekern.ops._kernel import empty_image, empty_tokens
from fusekern.ops.score_map import score_map_reference
from fusekern.testing import assert_parity, check_parity

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LAST = torch.channels_last
NAN = float("nan")


def sizes(channels, tokens, *, batch=1, height=3, breadth=5, last=True):
    return SimpleNamespace(image=(batch, channels, height, breadth), text=(batch, tokens, channels), last=last)


def lay(tensor, last):
    return tensor.contiguous(memory_format=LAST if last else torch.contiguous_format)


def make(sizes, dtype, concat, seed=0):
    """Image, text and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, breadth = sizes.image
    result = (batch, sizes.text[1] + (channels if concat else 0), height, breadth)
    image, text, grad = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in (sizes.image, sizes.text, result)
    )
    return lay(image, sizes.last), text, lay(grad, sizes.last)


def launched(image, text, grad, normalize, concat):
    """Result, gradient of the image and of the text, all of which held NaN before."""
    channels = text.shape[1] + (image.shape[1] if concat else 0)
    out, dimage, dtext = empty_image(image, channels), empty_image(image), empty_tokens(text)
    for tensor in (out, dimage, dtext):
        tensor.fill_(NAN)
    score_map_fwd(image, text, normalize, concat, out)
    score_map_bwd(grad, image, text, normalize, concat, dimage, dtext)
    return out, dimage, dtext


def referred(image, text, grad, normalize, concat):
    leaves = [image.detach().clone().requires_grad_(), text.detach().clone().requires_grad_()]
    out = score_map_reference(*leaves, normalize=normalize, concat=concat)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_right(found, image, text, grad, normalize, concat):
    truth = referred(image.double(), text.double(), grad.double(), normalize, concat)
    peers = [referred(lay(image, last), text, lay(grad, last), normalize, concat) for last in (True, False)]
    for i, (result, expected) in enumerate(zip(found, truth, strict=True)):
        assert_parity(result, [peer[i] for peer in peers], expected, gradient=i > 0)


@pytest.fixture
def processor(monkeypatch):
    """Sets the architecture for which settings are chosen, and how many processors must not be idle."""

    def change(arch, processors):
        monkeypatch.setattr(kernels, "_processor", lambda index: (arch, processors))

    return change


@every_dtype
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "unit"])
@pytest.mark.parametrize("concat", [False, True], ids=["alone", "concat"])
@pytest.mark.parametrize(
    "sizes",
    [
        sizes(24, 1, batch=2),
        sizes(64, 19, height=9, breadth=9),
        sizes(70, 33, batch=2, last=False),
        sizes(40, 65, last=False),
        sizes(130, 8, height=1, breadth=1),
    ],
    ids=lambda sizes: f"{sizes.image}-{sizes.text[1]}-{'channels_last' if sizes.last else 'nchw'}",
)
def test_as_good_as_the_reference(sizes, normalize, concat, dtype):
    image, text, grad = make(sizes, dtype, concat)
    found = launched(image, text, grad, normalize, concat)
    assert_right(found, image, text, grad, normalize, concat)
    if concat:
        assert torch.equal(found[0][:, : image.shape[1]], image)


# With one processor none is idle: large tiles, and one program sums over all pixels.
@every_dtype
@pytest.mark.parametrize("arch, processors", [(80, 132), (90, 132), (90, 1)])
@pytest.mark.parametrize(
    "tokens, normalize, last", [(33, True, False), (64, False, True), (100, False, False), (161, False, True)]
)
def test_every_size_of_tile(tokens, normalize, last, arch, processors, dtype, processor):
    processor(arch, processors)
    image, text, grad = make(sizes(72, tokens, height=9, breadth=15, last=last), dtype, True)
    assert_right(launched(image, text, grad, normalize, True), image, text, grad, normalize, True)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize(
    "tokens, processors, normalize, of_text, forward, backward",
    [
        (33, 132, True, "plain", "fwd", "unit bwd_image bwd_text bwd_sum"),
        (33, 132, False, "plain", "fwd", "bwd_image bwd_text bwd_sum"),
        (33, 1, False, "plain", "fwd", "bwd_image bwd_text"),
        (33, 1, True, "plain", "fwd", "unit bwd_image bwd_text bwd_sum"),
        (161, 1, False, "permuted", "copy fwd", "copy bwd_image bwd_text"),
    ],
)
def test_launches_are_those_planned(
    tokens, processors, normalize, of_text, forward, backward, last, processor, monkeypatch
):
    processor(90, processors)
    image, text, grad = make(sizes(72, tokens, height=9, breadth=15, last=last), torch.float16, True)
    text = text if of_text == "plain" else text.mT.contiguous().mT
    plan = kernels.launches(image, text, normalize, True, grad)
    out, dimage, dtext = empty_image(image, 72 + tokens), empty_image(image), empty_tokens(text)
    with Launches(kernels, monkeypatch) as launches:
        score_map_fwd(image, text, normalize, True, out)
        found = {"fwd": launches.taken()}
        score_map_bwd(grad, image, text, normalize, True, dimage, dtext)
        found["bwd"] = launches.taken()
    assert found == plan and short("score_map", plan) == {"fwd": forward, "bwd": backward}
    # The processor can be given: then the tensors may be anywhere.
    elsewhere = (tensor.to("meta") for tensor in (image, text))
    processor(80, 7)
    assert kernels.launches(*elsewhere, normalize, True, grad.to("meta"), (90, processors)) == plan


@every_dtype
@pytest.mark.parametrize("tokens, processors", [(150, 1), (200, 2)])
def test_many_tokens_normalised(tokens, processors, dtype, processor):
    processor(90, processors)
    image, text, grad = make(sizes(72, tokens, height=5, breadth=7), dtype, True)
    assert_right(launched(image, text, grad, True, True), image, text, grad, True, True)


@every_dtype
def test_more_channels_than_a_block(dtype):
    image, text, grad = make(sizes(530, 2, height=1, breadth=2), dtype, False)
    assert_right(launched(image, text, grad, True, False), image, text, grad, True, False)


def slices(shape, dtype, generator):
    batch, channels, height, breadth = shape
    larger = torch.randn(batch + 1, channels + 3, height + 2, breadth + 1, generator=generator).to(DEVICE, dtype)
    return larger[1:, 2:-1, 1:-1, :-1]


def rows(shape, dtype, generator):
    """Every second row of a channels_last image."""
    batch, channels, height, breadth = shape
    larger = torch.randn(batch, 2 * height, breadth, channels, generator=generator).to(DEVICE, dtype)
    return larger.permute(0, 3, 1, 2)[:, :, ::2]


def turned(shape, dtype, generator):
    return torch.randn(*shape[:2], *shape[:1:-1], generator=generator).to(DEVICE, dtype).transpose(2, 3)


def expanded(shape, dtype, generator):
    return torch.randn(1, shape[1], 1, 1, generator=generator).to(DEVICE, dtype).expand(shape)


def alike(shape, dtype, generator):
    return torch.randn(shape[0], 1, *shape[2:], generator=generator).to(DEVICE, dtype).expand(shape)


def channels(shape, dtype, generator):
    """Some channels of a channels_last image: pixels lie apart, as in the concatenated result."""
    batch, count, height, breadth = shape
    larger = torch.randn(batch, height, breadth, count + 19, generator=generator).to(DEVICE, dtype)
    return larger.permute(0, 3, 1, 2)[:, :count]


@every_dtype
@pytest.mark.parametrize(
    "of_image, of_grad",
    [
        (slices, rows),
        (rows, expanded),
        (turned, alike),
        (expanded, slices),
        (alike, channels),
        (channels, turned),
    ],
    ids=lambda function: function.__name__,
)
def test_any_strides(of_image, of_grad, dtype):
    generator = torch.Generator().manual_seed(0)
    image, grad = of_image((2, 24, 5, 6), dtype, generator), of_grad((2, 24 + 9, 5, 6), dtype, generator)
    larger = torch.randn(3, 12, 30, generator=generator).to(DEVICE, dtype)
    for text in (larger[1:, 2:11, 3:27], larger[:2, :9, :24].transpose(1, 2).contiguous().transpose(1, 2)):
        assert_right(launched(image, text, grad, True, True), image, text, grad, True, True)


@pytest.mark.parametrize(
    "strides",
    [(1 << 31, 1, 160, 32), (1 << 12, 1, 1 << 31, 32), (1 << 12, 1, 5 << 28, 1 << 28), (64, 380_000_000, 5, 1)],
    ids=["batch", "row", "pixel", "channel"],
)
def test_offsets_beyond_32_bits(strides):
    storage = torch.empty(5 << 29, dtype=torch.float16, device=DEVICE)  # of which next to nothing is touched
    generator = torch.Generator().manual_seed(0)
    image, grad = (storage[start:].as_strided((2, 8, 2, 5), strides) for start in (0, 16))
    for tensor in (image, grad):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    text = torch.randn(2, 8, 8, generator=generator).to(DEVICE, torch.float16)
    assert_right(launched(image, text, grad, True, False), image, text, grad, True, False)


@every_dtype
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("normalize, tokens", [(True, 35), (False, 150)])
def test_a_bad_pixel_spoils_itself(value, normalize, tokens, dtype, processor):
    processor(90, 1)
    image, text, grad = make(sizes(32, tokens, height=8, breadth=9), dtype, True)
    good = launched(image, text, grad, normalize, True)
    bad = image.clone()
    bad[:, 5, 3, 4] = value
    found = launched(bad, text, grad, normalize, True)
    truth = referred(bad.double(), text.double(), grad.double(), normalize, True)
    for result, expected, before in zip(found, truth, good, strict=True):
        if result.dim() == 4:
            spoilt = torch.zeros_like(result, dtype=torch.bool)
            spoilt[..., 3, 4] = True
            assert torch.equal(result[~spoilt], before[~spoilt])
        assert torch.equal(result.isfinite(), expected.isfinite())


@every_dtype
def test_a_bad_token_spoils_its_scores(dtype):
    image, text, grad = make(sizes(32, 35, height=4, breadth=9), dtype, True)
    good = launched(image, text, grad, True, True)
    text[:, 7, 3] = NAN
    found = launched(image, text, grad, True, True)
    others = [channel for channel in range(32 + 35) if channel != 32 + 7]
    assert torch.equal(found[0][:, others], good[0][:, others])
    assert found[0][:, 32 + 7].isnan().all()
    assert found[1].isnan().all()
    others = [token for token in range(35) if token != 7]
    assert torch.equal(found[2][:, others], good[2][:, others])
    assert found[2][:, 7].isnan().all()


@every_dtype
@pytest.mark.parametrize("length", [0.0, 1e-4])
def test_vectors_of_no_length(length, dtype):
    """Of length 0, and in fp32 and bf16 of less than the floor, below which the norm is a constant."""
    image, text, grad = make(sizes(32, 9, height=4, breadth=9), dtype, False)
    image[..., 1:3, :] *= length
    text[:, 3:6] *= length
    if length and dtype != torch.float16:
        image[..., 1:2, :] *= 1e-10
        text[:, 3:5] *= 1e-10
    found = launched(image, text, grad, True, False)
    truth = referred(image.double(), text.double(), grad.double(), True, False)
    peer = referred(image, text, grad, True, False)
    # Gradients of short vectors are larger by orders of magnitude: those of a length are judged together.
    for pixels in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)):
        for i in range(2):
            assert_parity(found[i][:, :, pixels], [peer[i][:, :, pixels]], truth[i][:, :, pixels], gradient=i > 0)
    for tokens in (slice(0, 3), slice(3, 5), slice(5, 6), slice(6, 9)):
        assert_parity(found[2][:, tokens], [peer[2][:, tokens]], truth[2][:, tokens], gradient=True)
    if not length:
        assert (found[0][:, :, 1:3] == 0).all() and (found[0][:, 3:6] == 0).all()


@every_dtype
def test_equal_bits_run_to_run(dtype):
    image, text, grad = make(sizes(48, 21, height=13, breadth=7), dtype, True)
    first, second = (launched(image, text, grad, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # The order of the sums shows: mirrored, the pixels add to the same up to rounding.
    mirrored = launched(image.flip(2, 3), text, grad.flip(2, 3), True, True)
    if dtype == torch.float32:
        assert not torch.equal(mirrored[2], first[2])
    torch.testing.assert_close(mirrored[2], first[2], rtol=0.1, atol=0.02)


def test_what_an_access_can_take():
    image = torch.empty(2, 16, 4, 6, dtype=torch.float16)
    assert view(image) == (kernels.NCHW.value, 1, (16 * 24, 24, 0, 1))
    last = image.contiguous(memory_format=LAST)
    assert view(last) == (kernels.CHANNELS_LAST.value, 8, (16 * 24 // 8, 1, 0, 2))
    assert view(last, 150, 512).vec == 2
    assert view(last.float()).vec == 4
    assert view(last[:, :, ::2]).layout == kernels.STRIDED.value
    assert view(last[:, :, :1]) == (kernels.CHANNELS_LAST.value, 8, (48, 1, 0, 2))
    assert view(image[:1, :, :, :1]) == (kernels.STRIDED.value, 1, (0, 24, 6, 0))


def test_every_setting_is_compiled_ahead_of_time():
    compiled = {
        (case.kernel.__name__, case.constexprs["PRECISION"], access, arch, *(case.constexprs[n] for n in kernels.TILE))
        for case in compile_cases()
        if "PRECISION" in case.constexprs
        for access in ("narrow", "wide", "strided")
        if access in case.name or (access == "wide" and ("nchw" in case.name or "aligned" in case.name))
        for arch in case.archs
    }
    names = {"fwd": "score_map_fwd_kernel", "image": "score_map_bwd_image_kernel", "text": "score_map_bwd_text_kernel"}
    for kernel, kind in SETTINGS:
        for tokens in range(1, 400):
            for arch in (80, 90, 100):
                for access in ("narrow", "wide", "strided"):
                    for idle in (False, True):
                        setting = setting_of(kernel, kind, tokens, arch, access, idle)
                        precision = "tf32" if kind == "tf32" else "ieee"
                        assert (names[kernel], precision, access, arch, *setting[:4]) in compiled


def test_the_check_can_fail():
    image, text, grad = make(sizes(64, 19, height=9, breadth=9), DTYPES[1], True)
    found = launched(image, text, grad, True, True)
    truth = referred(image.double(), text.double(), grad.double(), True, True)
    peers = referred(image, text, grad, True, True)
    for i in range(3):
        wrong = found[i].clone()
        wrong[0, 1, 2] *= 1.25
        assert check_parity(wrong, [peers[i]], truth[i], gradient=i > 0)
