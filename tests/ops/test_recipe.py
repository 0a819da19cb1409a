"""What ``inverted_bottleneck`` makes can be made again, and ``former2conv`` need not keep it."""

import pytest
import torch
import torch.distributed as dist

from fusekern.backends import BACKENDS
from fusekern.ops import BatchNorm, former2conv
from fusekern.ops.former2conv import by_recipe
from fusekern.ops.inverted_bottleneck import made_again, with_recipe

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SKIPPED = {"stride": 1, "residual": True, "memory": "default", "group": "", "backend": "cpp"}
STRIDED = {**SKIPPED, "stride": 2, "residual": False, "memory": "low"}

pytestmark = pytest.mark.skipif(bool(BACKENDS["cpp"].missing), reason=BACKENDS["cpp"].missing)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make(layout=torch.channels_last, dtype=torch.float32, size=(2, 8, 6, 5), batch=(True,) * 3):
    """Arguments of ``inverted_bottleneck``, all of which learn."""
    image = torch.randn(size, dtype=dtype).contiguous(memory_format=layout)
    weights = [torch.randn(shape, dtype=dtype) for shape in ((24, 8, 1, 1), (24, 1, 3, 3), (8, 24, 1, 1))]
    norms = tuple(
        BatchNorm(*(torch.randn(2, c) + 1).requires_grad_(), torch.randn(c), torch.rand(c) + 0.5, 0.1, on)
        for c, on in zip((24, 24, 8), batch, strict=True)
    )
    return *(tensor.requires_grad_() for tensor in (image, *weights)), norms


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [(True,) * 3, (False,) * 3], ids=["training", "frozen"])
@pytest.mark.parametrize("settings", [SKIPPED, STRIDED], ids=["skip", "stride 2"])
def test_same_bits(settings, batch, dtype, layout):
    result, _, recipe = with_recipe(*make(layout, dtype, batch=batch), **settings)
    again = made_again(*recipe[1:])
    assert recipe.result is result and again.stride() == result.stride()
    assert torch.equal(again, result)


def test_same_bits_in_a_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        settings = {**SKIPPED, "group": dist.group.WORLD.group_name}
        result, _, recipe = with_recipe(*make(), **settings)
        assert torch.equal(made_again(*recipe[1:]), result)
        result, _, recipe = with_recipe(*make(size=(0, 8, 6, 5)), **settings)
        assert made_again(*recipe[1:]).shape == result.shape == (0, 8, 6, 5)
    finally:
        dist.destroy_process_group()


def test_no_recipe():
    arguments = make()
    with torch.no_grad():
        assert with_recipe(*arguments, **SKIPPED)[2] is None
    assert with_recipe(*arguments, **{**SKIPPED, "backend": "reference"})[2] is None
    assert with_recipe(*make(size=(0, 8, 6, 5)), **SKIPPED)[2] is None
    frozen = tuple(norm._replace(weight=None, bias=None) for norm in arguments[4])
    assert with_recipe(*(tensor.detach() for tensor in arguments[:4]), frozen, **SKIPPED)[2] is None


@every_layout
@pytest.mark.parametrize("settings", [SKIPPED, STRIDED], ids=["skip", "stride 2"])
def test_registrations_are_sound(settings, layout):
    result, _, recipe = with_recipe(*make(layout), **settings)
    within_a_backward = (part if isinstance(part, str | None) else part.detach() for part in recipe[1:])
    torch.library.opcheck(torch.ops.fusekern.inverted_bottleneck_again.default, tuple(within_a_backward))
    key, value = torch.randn(2, 2, 5, 8)
    leaves = [tensor.detach().requires_grad_() for tensor in (result, key, value)]
    torch.library.opcheck(torch.ops.fusekern.former2conv.default, (*leaves, 2, 0.5, "cpp", *recipe[1:]))


def gradients(call, image, key, value):
    out = call(image)
    return torch.autograd.grad(out, (key, value, image), torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_former2conv(backend, narrow):
    """Autocast casts the image: then it is not what the recipe makes."""
    image, _, recipe = with_recipe(*make(), **SKIPPED)
    key, value = (text.requires_grad_() for text in torch.randn(2, 2, 5, 8))
    rest = {"heads": 2, "scale": None, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        found = gradients(lambda image: by_recipe(image, recipe, key, value, **rest), image, key, value)
        wanted = gradients(lambda image: former2conv(image, key, value, **rest), image, key, value)
    assert all(map(torch.equal, found, wanted))


def test_the_backward_reads_what_the_recipe_makes():
    """The comparisons above can fail: another recipe gives other gradients."""
    image, _, recipe = with_recipe(*make(), **SKIPPED)
    key, value = (text.requires_grad_() for text in torch.randn(2, 2, 5, 8))
    rest = {"heads": 2, "scale": None, "backend": "cpp"}
    found = gradients(
        lambda image: by_recipe(image, recipe._replace(y3=recipe.y3 + 1), key, value, **rest), image, key, value
    )
    wanted = gradients(lambda image: former2conv(image, key, value, **rest), image, key, value)
    assert not any(map(torch.equal, found[::2], wanted[::2]))


def test_a_second_derivative_is_refused_by_name():
    image, _, recipe = with_recipe(*make(), **SKIPPED)
    key, value = (text.requires_grad_() for text in torch.randn(2, 2, 5, 8))
    out = by_recipe(image, recipe, key, value, heads=2, scale=None, backend="cpp")
    (first,) = torch.autograd.grad(out.square().sum(), key, create_graph=True)
    with pytest.raises(NotImplementedError, match="former2conv has no second derivative"):
        first.sum().backward()
