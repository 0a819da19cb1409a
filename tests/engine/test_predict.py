"""The test protocol, pixel by pixel."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from toys import CLASSES, Fake, label_of, photo, save_checkpoint

from fusekern.config import EvalConfig
from fusekern.data.transforms import resize_for_test
from fusekern.engine import predict as module
from fusekern.errors import FusekernError

CONFIG = EvalConfig(scale=(64, 48))


def resize(logits, size):
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]


def assert_follows(label, scores):
    """The label is the argmax of the scores [K, H, W], but for ties within float32 rounding."""
    chosen = scores.gather(0, label.long()[None])[0]
    assert ((scores.amax(0) - chosen) <= 1e-5 * scores.abs().amax()).all()
    assert label.dtype == torch.uint8 and (label == scores.argmax(0)).float().mean() > 0.999


def whole(image, scale, flip=False):
    resized = resize_for_test(image, scale)
    with torch.no_grad():
        logits = Fake().eval()((resized.flip(-1) if flip else resized)[None]).logits[0]
    logits = resize(logits, image.shape[1:])
    return logits.flip(-1) if flip else logits


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (1, 1), (3, 200), (64, 48), (301, 97)])
def test_whole(size):
    image = photo(*size)
    assert_follows(label_of(image, CONFIG), whole(image, (64, 48)))


def test_scales_and_flip_average_probabilities():
    image, ratios = photo(), (0.5, 1.0, 1.75)
    views = [whole(image, (64 * r, 48 * r), flip).softmax(0) for r, flip in product(ratios, (False, True))]
    label = label_of(image, replace(CONFIG, ratios=ratios, flip=True))
    assert_follows(label, sum(views) / 6)
    logits = sum(whole(image, (64 * r, 48 * r), flip) for r, flip in product(ratios, (False, True)))
    assert (label != logits.argmax(0)).any()  # an average of logits is another thing
    assert (label != label_of(image, CONFIG)).any()


def test_flip_alone_makes_the_prediction_symmetric():
    image = photo()
    config = replace(CONFIG, flip=True)
    same = label_of(image, config) == label_of(image.flip(-1), config).flip(-1)
    assert same.float().mean() > 0.999  # float32 rounding may turn ties
    assert (label_of(image, CONFIG) != label_of(image.flip(-1), CONFIG).flip(-1)).any()


def mmseg_windows(height, width, crop, stride):
    """The windows of mmseg's slide mode by its formula."""
    rows = max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1
    for row, column in product(range(rows), range(columns)):
        bottom, right = min(row * stride[0] + crop[0], height), min(column * stride[1] + crop[1], width)
        yield max(bottom - crop[0], 0), bottom, max(right - crop[1], 0), right


@pytest.mark.parametrize(
    ("crop", "stride"),
    [((32, 32), (21, 21)), ((16, 40), (16, 13)), ((48, 64), (7, 7)), ((48, 20), (10, 20)), ((100, 24), (50, 8))],
)
def test_slide_averages_logits_over_windows(crop, stride):
    image = photo(60, 80)
    total, hits = torch.zeros(CLASSES, 48, 64), torch.zeros(48, 64)
    for top, bottom, left, right in mmseg_windows(48, 64, crop, stride):
        window = resize_for_test(image, (64, 48))[:, top:bottom, left:right]
        with torch.no_grad():
            total[:, top:bottom, left:right] += resize(Fake().eval()(window[None]).logits[0], window.shape[1:])
        hits[top:bottom, left:right] += 1
    label = label_of(image, replace(CONFIG, mode="slide", crop=crop, stride=stride))
    assert_follows(label, resize(total / hits, (60, 80)))


def test_window_over_all_of_a_small_image_is_the_whole_image():
    seen = []

    class Watched(Fake):
        def forward(self, image):
            seen.append(tuple(image.shape))
            return super().forward(image)

    image = photo(40, 30)
    slid = label_of(image, EvalConfig(mode="slide", scale=(40, 30), crop=(512, 512), stride=(341, 341)), Watched())
    assert seen == [(1, 3, 40, 30)]  # shrunk, not padded
    # Logits are resized once in both: from the model's grid to a size that is also the image's.
    assert torch.equal(slid, label_of(image, EvalConfig(scale=(40, 30))))


def test_bands_of_rows_change_nothing(monkeypatch):
    image, config = photo(83, 61), replace(CONFIG, ratios=(0.5, 1.0))
    expected = label_of(image, config)
    for values in (1, CLASSES * 61 * 7):  # one row, seven rows at a time
        monkeypatch.setattr(module, "_BAND", values)
        assert torch.equal(label_of(image, config), expected)


def test_rows_are_those_of_interpolate():
    logits = torch.randn(4, 9, 13, generator=torch.Generator().manual_seed(0))
    for size in [(9, 13), (40, 31), (4, 5), (1, 1), (100, 13)]:
        for top, bottom in [(0, size[0]), (size[0] // 2, size[0])]:
            found = module._resize_rows(logits, size, top, bottom)
            # Both take their weights from float32 coordinates below 16, so within 2^-20 of each other's, for neighbours
            # that differ by 2 max|logit| at most; the sums themselves round far below that.
            bound = 2**-20 * 2 * logits.abs().max().item()
            torch.testing.assert_close(found, resize(logits, size)[:, top:bottom], rtol=0, atol=bound)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast(precision):
    dtypes = []

    class Watched(Fake):
        def forward(self, image):
            output = super().forward(image)
            dtypes.append(output.logits.dtype)
            return output

    label = label_of(photo(), replace(CONFIG, precision=precision), Watched())
    assert dtypes == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert (label == label_of(photo(), CONFIG)).float().mean() > 0.9  # random logits lie close together
    with torch.autocast("cpu", torch.bfloat16):  # of a caller: does not reach in
        assert torch.equal(label_of(photo(), CONFIG, Watched()), label_of(photo(), CONFIG))
    assert dtypes[1] == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": ()}, "eval.ratios"),
        ({"ratios": (1.0, 0.0)}, "eval.ratios"),
        ({"mode": "slide", "crop": (32, 32), "stride": (33, 16)}, "eval.stride"),
        ({"mode": "slide", "crop": (32, 32), "stride": (0, 16)}, "eval.stride"),
    ],
)
def test_refuses_protocols_without_meaning(change, message):
    with pytest.raises(FusekernError, match=message):
        label_of(photo(), replace(CONFIG, **change))


def test_real_segmenter_agrees_with_its_own_logits(tmp_path):
    model = save_checkpoint(tmp_path, tmp_path)["model"]
    image = photo(100, 130)
    with torch.no_grad():
        logits = model.predict_logits(resize_for_test(image, (260, 200))[None], (100, 130))[0]
    assert_follows(label_of(image, EvalConfig(scale=(260, 200)), model), logits)
