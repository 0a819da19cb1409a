"""What training keeps of a whole layer, beside the same layer out of torch's modules."""

import pytest
import torch
from by_torch import block_by_torch

from fusekern import ConvFormer, extensions

pytestmark = pytest.mark.skipif(bool(extensions.load("_C")), reason=f"no C++ kernels: {extensions.load('_C')}")


def kept_bytes(function, layer):
    """What a forward keeps for its backward, parameters and buffers left out."""
    kept = {}
    skip = {tensor.untyped_storage().data_ptr() for tensor in layer.state_dict(keep_vars=True).values()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(size for where, size in kept.items() if where not in skip)


def by_torch(layer, image, text):
    for block in layer.blocks:
        image, text = block_by_torch(block, image, text)
    return image


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "expansion, memory, most", [(6, "default", 0.37), (2, "default", 0.40), (6, "low", 0.22), (2, "low", 0.28)]
)
def test_what_six_blocks_keep(expansion, memory, most, compiled):
    """Where ``former2conv`` keeps its image too, the shares are 0.38, 0.45, 0.23 and 0.33."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    options = {"channels": 32, "bridge_heads": 2, "text_heads": 2, "expansion": expansion}
    layer = ConvFormer(memory=memory, **options)
    image = torch.randn(2, 32, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    text = torch.randn(2, 5, 32)

    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    ours = kept_bytes(lambda: run(image, text).image, layer)
    eager = kept_bytes(lambda: by_torch(layer, image, text), layer)
    assert ours <= most * eager, f"{ours / eager:.3f} of {eager / 1e6:.1f} MB"
    assert ours >= 6 * 3 * image.nbytes  # the measure sees what each block must keep


def test_low_memory_trains_alike():
    """The same losses and gradients: what is not kept is computed again."""
    torch.manual_seed(0)
    options = {"channels": 16, "blocks": 2, "bridge_heads": 2, "text_heads": 2, "expansion": 3}
    layer, low = ConvFormer(**options), ConvFormer(memory="low", **options)
    low.load_state_dict(layer.state_dict())
    image, text = torch.randn(2, 16, 9, 8), torch.randn(2, 5, 16)
    for one in (layer, low):
        out = one(image, text)
        (out.image.square().mean() + out.score.square().mean()).backward()
    assert torch.equal(layer(image, text).score, low(image, text).score)
    for (name, one), other in zip(layer.named_parameters(), low.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_of_six_blocks_in_training():
    torch.manual_seed(0)
    layer = ConvFormer(512).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    image = torch.randn(16, 512, 32, 32, device="cuda", dtype=torch.bfloat16)
    image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
    text = torch.randn(16, 150, 512, device="cuda", dtype=torch.bfloat16)

    def peak(run):
        """Bytes beyond those that are there before, of a forward and backward."""
        leaves, grad = [image, *layer.parameters()], torch.ones_like(image)
        for _ in range(2):  # the first compiles, and tries out what there is to choose from
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(run(), leaves, grad, allow_unused=True)
            found = torch.cuda.max_memory_allocated() - before
        return found

    ours, eager = peak(lambda: layer(image, text).image), peak(lambda: by_torch(layer, image, text))
    assert ours <= 0.45 * eager, f"{ours / eager:.3f} of {eager / 1e6:.0f} MB"
