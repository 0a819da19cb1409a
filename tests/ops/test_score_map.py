import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekern.ops import score_map


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(0, 2),
    channels=st.integers(1, 6),
    count=st.integers(1, 5),
    height=st.integers(0, 5),
    breadth=st.integers(0, 5),
    normalize=st.booleans(),
    concat=st.booleans(),
)
def test_equals_the_equation(batch, channels, count, height, breadth, normalize, concat):
    image = torch.randn(batch, channels, height, breadth, dtype=torch.float64)
    text = torch.randn(batch, count, channels, dtype=torch.float64)
    score = torch.einsum("bchw,bkc->bkhw", image, text)
    if normalize:
        score = score / image.square().sum(1).sqrt()[:, None] / text.square().sum(2).sqrt()[:, :, None, None]
    expected = torch.cat([image, score], dim=1) if concat else score
    result = score_map(image, text, normalize=normalize, concat=concat)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_as_good_as_torch(dtype, normalize, assert_as_good_as):
    image, text = torch.randn(2, 64, 7, 6, dtype=dtype), torch.randn(2, 19, 64, dtype=dtype)

    def peer(image, text):
        if normalize:
            image, text = F.normalize(image, dim=1), F.normalize(text, dim=2)
        return torch.einsum("bchw,bkc->bkhw", image, text)

    truth = peer(image.double(), text.double())
    assert_as_good_as(score_map(image, text, normalize=normalize), peer(image, text), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_score_zero(dtype):
    image, text = torch.randn(1, 8, 2, 2).to(dtype), torch.randn(1, 3, 8).to(dtype)
    image[..., 0, 0] = 0
    text[:, 1] = 0
    score = score_map(image, text)
    assert score.isfinite().all()
    assert (score[..., 0, 0] == 0).all()
    assert (score[:, 1] == 0).all()


def test_cosine_ignores_lengths_that_fp16_cannot_square():
    image = torch.full((1, 64, 1, 1), 1000.0, dtype=torch.float16)
    score = score_map(image, torch.full((1, 1, 64), 0.001, dtype=torch.float16))
    assert abs(score.item() - 1) < 4 * torch.finfo(torch.float16).eps  # two roundings of unit vectors, one of the sum


def test_errors_name_the_argument():
    image, text = torch.zeros(2, 8, 3, 3), torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match=r"image must be \[B, C, H, W\]; got shape \[8, 3, 3\]"):
        score_map(image[0], text)
    with pytest.raises(ValueError, match=r"text must be \[B, K, C\] with B = 2, C = 8; got shape \[2, 5, 4\]"):
        score_map(image, text[..., :4])
    with pytest.raises(ValueError, match="text must have at least one token"):
        score_map(image, text[:, :0])
