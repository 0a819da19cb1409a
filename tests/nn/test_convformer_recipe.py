"""The image that ``former2conv`` reads is made again for its backward: the same gradients, to the bit."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusekern import extensions
from fusekern.nn import bridges
from fusekern.nn.convformer import ConvFormerBlock
from fusekern.ops.former2conv import by_recipe

pytestmark = pytest.mark.skipif(bool(extensions.load("_C")), reason=f"no C++ kernels: {extensions.load('_C')}")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def keeping(monkeypatch):
    """Has ``former2conv`` keep its image from now on."""

    def keep(image, recipe, *arguments, **keywords):
        return by_recipe(image, None, *arguments, **keywords)

    return lambda: monkeypatch.setattr(bridges, "by_recipe", keep)


class Again(TorchDispatchMode):
    """How often an image is made again."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.fusekern.inverted_bottleneck_again.default
        return function(*arguments, **(keywords or {}))


def build(dtype=torch.float32, **options):
    block = ConvFormerBlock(16, bridge_heads=2, text_heads=2, expansion=3, **options).to(dtype)
    block.bottleneck.backend = block.text_to_image.backend = "cpp"  # the text's kernels know no bf16
    with torch.no_grad():
        for vector in (parameter for parameter in block.bottleneck.parameters() if parameter.dim() == 1):
            vector.copy_(torch.randn_like(vector) + 1)
    return block


def inputs(layout=torch.channels_last, dtype=torch.float32, batch=2):
    image = torch.randn(batch, 16, 7, 6, dtype=dtype).contiguous(memory_format=layout)
    return image.requires_grad_(), torch.randn(batch, 5, 16, dtype=dtype, requires_grad=True)


def learn(block, image, text, run=None):
    """Results and gradients."""
    found = (block if run is None else run)(image, text)[:2]
    loss = sum((part.float() * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in found)
    return [*(part.detach() for part in found), *torch.autograd.grad(loss, [image, text, *block.parameters()])]


def same(found, wanted):
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen norms"])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_same_bits(memory, frozen, dtype, layout, keeping):
    block, arguments = build(dtype, memory=memory).train(not frozen), inputs(layout, dtype)
    with Again() as again:
        found = learn(block, *arguments)
    assert again.count == 1
    keeping()
    with Again() as again:
        assert same(found, learn(block, *arguments))
    assert again.count == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_under_autocast(layout, keeping):
    """The bottleneck's skip is the image in bf16, not the one in fp32 that the block gets."""
    block, (image, text) = build(), inputs(layout)

    def run():
        with torch.autocast("cpu", torch.bfloat16), Again() as again:
            found = learn(block, image, text)
        return found, again.count

    found, count = run()
    assert found[0].dtype == torch.bfloat16 and count == 1
    keeping()
    wanted, count = run()
    assert same(found, wanted) and count == 0


def test_same_bits_of_one_block_used_twice(keeping):
    block, (image, text) = build(), inputs()

    def twice(image, text):
        return block(*block(image, text)[:2])

    with Again() as again:
        found = learn(block, image, text, twice)
    assert again.count == 2
    keeping()
    assert same(found, learn(block, image, text, twice))


@pytest.mark.parametrize("reentrant", [False, True])
def test_same_bits_under_checkpointing(reentrant):
    block, arguments = build(), inputs()
    wanted = learn(block, *arguments)
    leaves = [*arguments, *block.parameters()]

    def gradients(run):
        found = run(*arguments)[:2]
        sum((part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in found).backward()
        return [*(part.detach() for part in found), *(leaf.grad for leaf in leaves)]

    with Again() as again:
        found = gradients(lambda *arguments: checkpoint(block, *arguments, use_reentrant=reentrant))
    assert same(found, wanted) and again.count == 1


def test_buffers_may_change_before_the_backward():
    block, arguments = build().eval(), inputs()
    wanted = learn(block, *arguments)

    def then_change(image, text):
        found = block(image, text)
        for buffer in block.bottleneck.buffers():
            buffer.add_(1)
        return found

    assert same(learn(block, *arguments, then_change), wanted)


def test_a_changed_image_is_noticed():
    block, (image, text) = build(), inputs()
    image = image * 1
    result = block(image, text)[0]
    image.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_nothing_is_made_again_where_nothing_is_learned():
    block, (image, text) = build(), inputs()
    with torch.no_grad(), Again() as again:
        assert not block(image, text)[0].requires_grad
    block.requires_grad_(False)
    with Again() as again:  # the text learns, and the image that former2conv reads has no past
        block(image.detach(), text)[0].sum().backward()
    assert text.grad.any() and again.count == 0


def test_no_batch():
    block, (image, text) = build(), inputs(batch=0)
    result = block(image, text)[0]
    result.sum().backward()
    assert image.grad.shape == result.shape == (0, 16, 7, 6)


# Somebody changes what the bottleneck makes


def _in_place(module, arguments, result):
    assert len(arguments) == 1
    with torch.no_grad():
        result.mul_(2)


def _another(module, arguments, result):
    return result * 2


def _look(module, arguments, result):
    assert result.shape == arguments[0].shape


def _hook(block, hook):
    block.bottleneck.register_forward_hook(hook)


def _hook_everything(block, hook):
    """A hook on all modules there are, which only minds this one."""

    def mind(module, arguments, result):
        return hook(module, arguments, result) if module is block.bottleneck else None

    return nn.modules.module.register_module_forward_hook(mind)


def _replace_forward(block, hook):
    """As libraries do that move a module's results."""
    forward = block.bottleneck.forward

    def patched(image, **keywords):
        result = forward(image, **keywords)
        return result if (new := hook(block.bottleneck, (image,), result)) is None else new

    block.bottleneck.forward = patched


class Around(nn.Module):
    """Knows nothing of recipes."""

    def __init__(self, inside, hook):
        super().__init__()
        self.inside, self.hook = inside, hook

    def forward(self, image):
        result = self.inside(image)
        return result if (new := self.hook(self, (image,), result)) is None else new


def _wrap(block, hook):
    block.bottleneck = Around(block.bottleneck, hook)


@pytest.mark.parametrize(
    "way, hook",
    [
        *((way, hook) for way in (_hook, _hook_everything, _wrap) for hook in (_in_place, _another, _look)),
        *((_replace_forward, hook) for hook in (_another, _look)),
    ],
    ids=lambda function: function.__name__[1:],
)
def test_hooks_change_the_image(way, hook, keeping):
    block, arguments = build(), inputs()
    unhooked = learn(block, *arguments)
    handle = way(block, hook)
    try:
        found = learn(block, *arguments)
        keeping()
        wanted = learn(block, *arguments)
    finally:
        if handle is not None:
            handle.remove()
    assert same(found, wanted)
    # With a hook on all modules the children run themselves, which rounds otherwise.
    alike = _close if way is _hook_everything else same
    assert alike(found, unhooked) == (hook is _look)


def _close(found, wanted):
    pairs = zip(found, wanted, strict=True)
    return all((one - other).abs().max() <= 1e-4 * other.abs().max().clamp_min(1) for one, other in pairs)


def test_a_hook_on_the_gradient(keeping):
    block, arguments = build(), inputs()
    plain = learn(block, *arguments)
    block.bottleneck.register_full_backward_hook(lambda module, given, taken: (given[0] * 2,))
    found = learn(block, *arguments)
    keeping()
    assert same(found, learn(block, *arguments)) and not torch.equal(found[2], plain[2])


# Recorded before it runs


def kept_bytes(function):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic, narrow, keeping):
    block, arguments = build(), inputs()

    def run(*arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return block(*arguments)[:2]

    wanted = learn(block, *arguments, run)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    found = learn(block, *arguments, compiled)
    names = ["image", "text", "dimage", "dtext", *(name for name, _ in block.named_parameters())]
    for name, one, other in zip(names, found, wanted, strict=True):
        if narrow and name == "text_to_image.key.bias":
            continue  # no softmax depends on it: all there is of its gradient is bf16's rounding
        close = 1e-2 if narrow else 1e-5
        torch.testing.assert_close(one, other, rtol=close, atol=close * max(1, other.abs().max().item()))
    less = kept_bytes(lambda: compiled(*arguments))
    keeping()
    torch._dynamo.reset()
    more = kept_bytes(lambda: torch.compile(run, backend="aot_eager", fullgraph=True)(*arguments))
    assert more - less == found[0].nbytes


@pytest.mark.parametrize("hook", [_in_place, _another, _look], ids=lambda function: function.__name__[1:])
def test_compiled_with_hooks(hook):
    block, arguments = build(), inputs()
    _hook(block, hook)
    wanted = learn(block, *arguments)
    found = learn(block, *arguments, torch.compile(block, backend="aot_eager", fullgraph=True))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1, other.abs().max().item()))


def test_exported_and_trained():
    block, arguments = build(backend="cpp").eval(), inputs()
    program = torch.export.export(block, inputs())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with Again() as again:
        found = learn(loaded, *arguments)
    assert again.count == 1
    assert same(found, learn(block, *arguments))


def test_copies():
    block, arguments = build(), inputs()
    wanted = learn(block, *arguments)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert same(learn(other, *arguments), wanted)
