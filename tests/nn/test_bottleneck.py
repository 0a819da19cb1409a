"""The inverted bottleneck as a module: batch norms that behave as torch's do."""

import copy

import pytest
import torch
from torch import nn

from fusekern.nn import InvertedBottleneck


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Plain(nn.Module):
    """The same block, its children running themselves."""

    def __init__(self, block):
        super().__init__()
        self.block = copy.deepcopy(block)

    def forward(self, image):
        block = self.block
        hidden = nn.functional.relu6(block.norm1(block.expand(image)))
        hidden = nn.functional.relu6(block.norm2(block.depthwise(hidden)))
        return image + block.norm3(block.project(hidden))


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_trains_as_the_modules_of_torch(momentum, options):
    block = InvertedBottleneck(4, 3)
    for name, width in (("norm1", 12), ("norm2", 12), ("norm3", 4)):
        setattr(block, name, nn.BatchNorm2d(width, momentum=momentum, **options))
    block = block.double()
    plain = Plain(block)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (block, plain)]
    for step in range(4):
        image = torch.randn(2, 4, 5, 6, dtype=torch.float64) + step
        results = [model(image) for model in (block, plain)]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
        for result, optimizer in zip(results, optimizers, strict=True):
            optimizer.zero_grad()
            result.square().mean().backward()
            optimizer.step()
    wanted = plain.block.state_dict()
    assert (("norm1.running_mean" in wanted), options) == (options != {"track_running_stats": False}, options)
    for name, value in block.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block.eval()(image), plain.eval()(image), rtol=1e-10, atol=1e-10)


def test_evaluation_changes_no_buffer():
    block = InvertedBottleneck(4).eval()
    before = copy.deepcopy(block.state_dict())
    block(torch.randn(2, 4, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_frozen_norm_in_training():
    block = InvertedBottleneck(4)
    block.norm2.eval()
    plain = Plain(block)
    image = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(image), plain(image))
    assert block.norm2.num_batches_tracked == 0
    assert block.norm1.num_batches_tracked == 1


def test_an_empty_batch_counts_as_in_torch():
    block = InvertedBottleneck(4)
    plain = Plain(block)
    for model in (block, plain):
        model(torch.zeros(0, 4, 5, 5))
    for name, value in block.state_dict().items():
        assert torch.equal(value, plain.block.state_dict()[name])


def test_one_pixel_in_training_raises_as_in_torch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        InvertedBottleneck(4)(torch.zeros(1, 4, 1, 1))


class Counting(nn.BatchNorm2d):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_a_child_that_is_no_plain_batch_norm_runs_itself():
    block = InvertedBottleneck(4, 2)
    image = torch.randn(2, 4, 5, 5)
    expected = copy.deepcopy(block)(image)
    state = block.norm2.state_dict()
    block.norm2 = Counting(8)
    block.norm2.load_state_dict(state)
    torch.testing.assert_close(block(image), expected)
    assert block.norm2.calls == 1
    assert block.norm1.num_batches_tracked == 1


def test_sync_batch_norm_in_evaluation():
    block = InvertedBottleneck(4, 2)
    block(torch.randn(2, 4, 5, 5))
    image = torch.randn(2, 4, 5, 5)
    expected = block.eval()(image)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert isinstance(synced.norm1, nn.SyncBatchNorm)
    torch.testing.assert_close(synced(image), expected)


def test_hooks_and_parametrizations_of_children_take_effect():
    block = InvertedBottleneck(4, 2).eval()
    image = torch.randn(2, 4, 5, 5)
    expected = block(image)
    seen = []
    handle = block.depthwise.register_forward_hook(lambda module, arguments, result: seen.append(result.shape))
    torch.testing.assert_close(block(image), expected)
    assert seen == [(2, 8, 5, 5)]
    handle.remove()
    nn.utils.parametrizations.weight_norm(block.project)
    torch.testing.assert_close(block(image), expected)
    block.project.parametrizations.weight.original0.data.mul_(2)
    assert not torch.allclose(block(image), expected)


def test_removed_norms():
    """What is left after folding the norms into the convolutions runs too."""
    block = InvertedBottleneck(4, 2).eval()
    image = torch.randn(2, 4, 5, 5)
    expected = block(image)
    for convolution, norm in (("expand", "norm1"), ("depthwise", "norm2"), ("project", "norm3")):
        folded = nn.utils.fusion.fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm))
        setattr(block, convolution, folded)
        setattr(block, norm, nn.Identity())
    torch.testing.assert_close(block(image), expected)
