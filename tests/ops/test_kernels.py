"""What every kernel behind an op promises, on every backend that runs here: C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import fusekern.ops.flops  # noqa: F401
from fusekern import FusekernError, backends, ops, use_backend
from fusekern.backends import BACKENDS, resolve, why_not
from fusekern.ops.conv2former import conv2former_reference
from fusekern.ops.downsample import downsample_reference, downsampled_size
from fusekern.ops.former import former_reference
from fusekern.ops.former2conv import former2conv_reference
from fusekern.ops.inverted_bottleneck import inverted_bottleneck_reference
from fusekern.ops.score_map import score_map_reference
from fusekern.ops.text_path import text_path_reference
from fusekern.testing import assert_parity

CUDA = torch.cuda.is_available()
BACKENDS_HERE = [
    pytest.param("cpp", marks=pytest.mark.skipif(bool(BACKENDS["cpp"].missing), reason=BACKENDS["cpp"].missing)),
    pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS_HERE)


def _of_tensors(block):
    """inverted_bottleneck as a function of tensors alone: with the norms' weights and biases, to the new image."""

    def function(image, expand, depthwise, project, *vectors, batch=True, backend=None):
        norms = []
        for weight, bias in zip(vectors[::2], vectors[1::2], strict=True):
            norms.append(ops.BatchNorm(weight, bias, torch.zeros_like(bias), torch.ones_like(bias), 1e-5, batch))
        # Its kernels on a GPU are half CUDA, half Triton.
        keywords = {"backend": "cuda" if backend == "triton" else backend} if backend else {}
        return block(image, expand, depthwise, project, tuple(norms), **keywords)[0]

    return function


def _of_pairs(block):
    """former as a function of tensors alone: with the weights and biases one after the other."""

    def function(tokens, *parts, heads=2, backend=None):
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        return block(tokens, *pairs, heads=heads, **({"backend": backend} if backend else {}))

    return function


def _of_path(block):
    """text_path likewise, its four results side by side."""

    def function(tokens, gathered, *parts, heads=2, backend=None):
        entry, norm, *former, key, value, query = (parts[i : i + 2] for i in range(0, len(parts), 2))
        keywords = {"heads": heads, **({"backend": backend} if backend else {})}
        return torch.cat(block(tokens, gathered, entry, norm, tuple(former), key, value, query, **keywords), 2)

    return function


OPS = {
    "text_path": (_of_path(ops.text_path), _of_path(text_path_reference)),
    "former": (_of_pairs(ops.former), _of_pairs(former_reference)),
    "conv2former": (ops.conv2former, conv2former_reference),
    "former2conv": (ops.former2conv, former2conv_reference),
    "score_map": (ops.score_map, score_map_reference),
    "downsample": (ops.downsample, downsample_reference),
    "inverted_bottleneck": (_of_tensors(ops.inverted_bottleneck), _of_tensors(inverted_bottleneck_reference)),
}
every_op = pytest.mark.parametrize("op", OPS)
CHAINS = ("former", "text_path", "inverted_bottleneck")
# The bottleneck has kinks and means over the whole batch: its parity is in test_inverted_bottleneck_parity.py. Former
# is a chain, whose roundings on the way the rule has to count together: see tests/kernels/interpreted_former.py.
every_smooth_op = pytest.mark.parametrize("op", [op for op in OPS if op not in CHAINS])
LAYOUTS = ("plain", "permuted", "sliced", "expanded")


@pytest.fixture(autouse=True)
def _of_kernels_that_there_are(request):
    asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if asked.get("backend") == "cpp" and asked.get("op") in OPS and "cpp" not in backends._kernels[asked["op"]]:
        pytest.skip(f"{asked['op']} has no C++ kernel")


def device_of(backend):
    return BACKENDS[backend].device


def dtypes_of(backend):
    return [torch.float32, torch.bfloat16] + ([torch.float16] if backend == "triton" else [])


def make(op, *, batch=2, tokens=19, heads=2, width=32, height=7, breadth=6, device="cpu", dtype=torch.float32):
    """Arguments and keywords of an op."""
    channels = heads * width
    image, text = (batch, channels, height, breadth), (batch, tokens, channels)
    former = [
        *((3 * channels, channels), (3 * channels,), (channels, channels), *[(channels,)] * 3),
        *((2 * channels, channels), (2 * channels,), (channels, 2 * channels), *[(channels,)] * 3),
    ]
    square = [(channels, channels), (channels,)]
    shapes = {
        "former": [text, *former],
        "text_path": [text, text, *square, (channels,), (channels,), *former, *square * 3],
        "conv2former": [text, image],
        "former2conv": [image, text, text],
        "score_map": [image, text],
        "downsample": [image, (channels, channels, 3, 3), (channels,)],
        "inverted_bottleneck": [
            *(image, (2 * channels, channels, 1, 1), (2 * channels, 1, 3, 3), (channels, 2 * channels, 1, 1)),
            *((2 * channels,) for _ in range(4)),
            *((channels,) for _ in range(2)),
        ],
    }[op]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if op in ("downsample", "inverted_bottleneck"):
        tensors[1] /= 3 * channels**0.5
    if op in ("former", "text_path"):
        linears = [tensor / channels**0.5 if tensor.dim() == 2 else tensor for tensor in tensors[1:]]
        tensors[1:] = [(v + 1).bfloat16().double() if v.dim() == 1 else v for v in linears]  # as below
    if op == "inverted_bottleneck":
        tensors[4:] = [(vector + 1).bfloat16().double() for vector in tensors[4:]]  # under autocast they keep fp32
    keywords = {"heads": heads} if op in ("conv2former", "former", "former2conv", "text_path") else {}
    return [tensor.to(device, dtype) for tensor in tensors], keywords


def result_and_gradients(function, tensors, cotangent, **keywords):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = function(*leaves, **keywords)
    return [result.detach(), *torch.autograd.grad(result, leaves, cotangent.to(result.dtype))]


def with_sdpa(op, tensors, heads, scale=None):
    """PyTorch's fused attention in place of the reference's products."""
    if op == "conv2former":
        query, tokens = tensors
        q = query.unflatten(2, (heads, -1)).transpose(1, 2)
        x = tokens.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, x, x, scale=scale).transpose(1, 2).flatten(2)
    image, key, value = tensors
    x = image.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = (text.unflatten(2, (heads, -1)).transpose(1, 2) for text in (key, value))
    gathered = F.scaled_dot_product_attention(x, k, v, scale=scale).transpose(1, 2).flatten(2)
    return image + gathered.transpose(1, 2).unflatten(2, image.shape[2:])


def check(op, backend, tensors, **keywords):
    """Result and gradients by the rule, against float64 and PyTorch's own in both layouts."""
    function, reference = OPS[op]
    with torch.no_grad():
        shape = reference(*tensors, **keywords).shape
    cotangent = torch.randn(shape, dtype=torch.float64).to(tensors[0])
    found = result_and_gradients(function, tensors, cotangent, backend=backend, **keywords)
    truth = result_and_gradients(reference, [tensor.double() for tensor in tensors], cotangent.double(), **keywords)
    dense = [tensor.contiguous() for tensor in tensors]
    last = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous() for t in tensors]
    peers = [result_and_gradients(reference, peer, cotangent, **keywords) for peer in (dense, last)]
    if op in ("conv2former", "former2conv"):
        peers.append(result_and_gradients(lambda *t, **kw: with_sdpa(op, t, **kw), last, cotangent, **keywords))
    for index, (mine, right) in enumerate(zip(found, truth, strict=True)):
        assert mine.dtype == tensors[0].dtype
        assert_parity(mine, [peer[index] for peer in peers], right, gradient=index > 0)


@contextmanager
def poisoned():
    """New memory holds NaN, so that an element which a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_backend
@every_smooth_op
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parity_over_shapes_strides_and_dtypes(op, backend, lay_out, data):
    """The rule compares errors, so what is exactly zero in the truth must be left out: the gradients of a softmax over
    one key. So must a result that is one number many times over, where one lucky peer is the worst: that of a weight
    expanded over the outputs. ``test_the_smallest_shapes`` and ``test_a_bound_without_peers`` have these."""
    if BACKENDS[backend].device == "cuda" and not CUDA:
        pytest.skip("needs a CUDA device")
    tensors, keywords = make(
        op,
        batch=data.draw(st.integers(1, 3), "batch"),
        tokens=data.draw(st.sampled_from([2, 3, 19, 33, 64, 65, 150, 161]), "tokens"),
        heads=data.draw(st.integers(1, 3), "heads"),
        width=data.draw(st.sampled_from([8, 16, 24, 32, 40, 64]), "width"),
        height=data.draw(st.integers(1, 9), "height"),
        breadth=data.draw(st.integers(2, 9), "breadth"),
        device=device_of(backend),
        dtype=data.draw(st.sampled_from(dtypes_of(backend)), "dtype"),
    )
    layouts = [data.draw(st.sampled_from(LAYOUTS), "layout") for _ in tensors]
    if op == "downsample" and layouts[1] == "expanded":
        layouts[1] = "sliced"
    tensors = [lay_out(layout, tensor) for layout, tensor in zip(layouts, tensors, strict=True)]
    if op == "score_map":
        keywords = {"normalize": data.draw(st.booleans(), "normalize"), "concat": data.draw(st.booleans(), "concat")}
    if op == "downsample":
        keywords = {"pad": data.draw(st.sampled_from(["floor", "ceil"]), "pad")}
        tensors[2:] = tensors[2:] if data.draw(st.booleans(), "bias") else []
    if op in ("conv2former", "former2conv"):
        keywords["scale"] = data.draw(st.sampled_from([None, 0.05, 0.5]), "scale")
    with poisoned():
        check(op, backend, tensors, **keywords)


@every_backend
@every_smooth_op
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 2), (5, 2, 1)])
def test_the_smallest_shapes(op, backend, size):
    """Too few elements for the rule; no sum here has more than 45 terms, of which none is above 9 in size."""
    channels, height, breadth = size
    tensors, _ = make(op, tokens=1, heads=1, width=channels, height=height, breadth=breadth, device=device_of(backend))
    tensors = [tensor.clamp(-3, 3) for tensor in tensors]
    keywords = {"heads": 1} if op in ("conv2former", "former2conv") else {}
    cotangent = torch.ones_like(OPS[op][1](*tensors, **keywords))
    found = result_and_gradients(OPS[op][0], tensors, cotangent, backend=backend, **keywords)
    doubles = [tensor.double() for tensor in tensors]
    for mine, right in zip(
        found, result_and_gradients(OPS[op][1], doubles, cotangent.double(), **keywords), strict=True
    ):
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=45 * 9 * 2**-24)


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bound_without_peers(backend, layout, lay_out):
    """A sum of n products in fp32 is off by at most n 2^-24 times the sum of their sizes, in any order."""
    tensors, _ = make("downsample", device=device_of(backend))
    image, weight, bias = (lay_out(layout, tensor) for tensor in tensors)
    cotangent = torch.randn(downsample_reference(image, weight, bias).shape, dtype=torch.float64).to(image)
    found = result_and_gradients(ops.downsample, [image, weight, bias], cotangent, backend=backend)
    doubles = [tensor.double() for tensor in (image, weight, bias)]
    truth = result_and_gradients(downsample_reference, doubles, cotangent.double())
    sizes = result_and_gradients(downsample_reference, [t.abs() for t in doubles], cotangent.double().abs())
    channels, patches = image.shape[1], cotangent.numel() // image.shape[1]
    for mine, right, size, terms in zip(
        found, truth, sizes, (9 * channels + 1, channels, patches, patches), strict=True
    ):
        assert ((mine.double() - right).abs() <= terms * 2**-24 * size).all()


@every_backend
@pytest.mark.parametrize("op", ["conv2former", "former2conv"])
@pytest.mark.parametrize("tokens", [19, 150, 847])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_parity_at_the_sizes_that_count(op, backend, tokens, width):
    for dtype in dtypes_of(backend):
        tensors, keywords = make(
            op, batch=1, tokens=tokens, width=width, height=11, breadth=13, device=device_of(backend), dtype=dtype
        )
        tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        check(op, backend, tensors, **keywords)


@every_backend
@every_op
def test_registrations_are_sound(op, backend):
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors, keywords = make(op, device=device_of(backend))
        tensors = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in tensors]
        permuted = [t.mT.contiguous().mT if t.dim() > 2 else t for t in tensors]
        for variant in (tensors, permuted):
            leaves = [tensor.detach().requires_grad_() for tensor in variant]
            extra = {
                "former": (2, 1e-5, backend),
                "text_path": (2, 1e-5, backend),
                "conv2former": (2, 0.2, backend),
                "former2conv": (2, 0.2, backend),
                "score_map": (True, True, backend),
                "downsample": (*downsampled_size(7, 6, "ceil"), backend),
                "inverted_bottleneck": ([1e-5] * 3, [True] * 3, 1, True, True, False, "", backend),
            }[op]
            if op == "inverted_bottleneck":  # no running statistics
                leaves[4:] = [part for i in (4, 6, 8) for part in (*leaves[i : i + 2], None, None)]
            torch.library.opcheck(getattr(torch.ops.fusekern, op).default, (*leaves, *extra))


@every_backend
@every_op
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_for_all_sizes(op, backend, mode):
    torch._dynamo.reset()
    function = OPS[op][0]
    sizes = [
        dict(batch=2, height=7, breadth=6),
        dict(batch=3, height=9, breadth=12),
        dict(batch=5, height=8, breadth=7),
    ]
    _, keywords = make(op)
    compiled = torch.compile(
        lambda *t: function(*t, backend=backend, **keywords).sin(), fullgraph=True, dynamic=True, backend=mode
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in sizes:
            tensors, _ = make(op, device=device_of(backend), **size)
            leaves = [tensor.requires_grad_() for tensor in tensors]
            result = compiled(*leaves)
            wanted = function(*leaves, backend=backend, **keywords).sin()
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)
            weight = torch.randn_like(wanted)
            for gradient, right in zip(
                torch.autograd.grad(result, leaves, weight), torch.autograd.grad(wanted, leaves, weight), strict=True
            ):
                torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5 * max(1, right.abs().max()))


class _Module(torch.nn.Module):
    def __init__(self, function, **keywords):
        super().__init__()
        self.function, self.keywords = function, keywords

    def forward(self, *tensors):
        return self.function(*tensors, **self.keywords)


@every_backend
@every_op
def test_export_keeps_a_backend_asked_for_and_takes_the_reference_otherwise(op, backend):
    tensors, keywords = make(op, device=device_of(backend))
    for asked, held in ((backend, True), ("auto", False)):
        module = _Module(OPS[op][0], backend=asked, **keywords)
        program = torch.export.export(module, tuple(tensors))
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any(name.startswith("fusekern.") for name in names) is held
        torch.testing.assert_close(program.module()(*tensors), module(*tensors), rtol=1e-4, atol=1e-5)


@every_backend
@every_op
def test_autocast_decides_the_dtype(op, backend):
    tensors, keywords = make(op, device=device_of(backend))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        result = OPS[op][0](*leaves, backend=backend, **keywords)
        same = OPS[op][0](*leaves, backend="reference", **keywords)
        loss = result.float().square().mean()
        loss.backward()  # inside, as some training loops have it
    assert result.dtype == same.dtype == torch.bfloat16
    low = [tensor.detach().bfloat16() for tensor in tensors]
    assert torch.equal(result, OPS[op][0](*low, backend=backend, **keywords))
    for leaf in leaves:
        assert leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() and leaf.grad.any()


@every_backend
@every_smooth_op
@pytest.mark.parametrize("size", [dict(batch=0), dict(height=0), dict(batch=0, height=0)])
def test_nothing_in_nothing_out(op, backend, size):
    tensors, keywords = make(op, device=device_of(backend), **size)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    result = OPS[op][0](*leaves, backend=backend, **keywords)
    wanted = OPS[op][0](*leaves, backend="reference", **keywords)
    torch.testing.assert_close(result, wanted)
    result.sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


@every_backend
@every_op
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(op, backend, value):
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors, keywords = make(op, height=9, breadth=9, device=device_of(backend))
        if op == "inverted_bottleneck":
            keywords = {"batch": False}  # a mean over the batch has it everywhere
        picture = 1 if op == "conv2former" else 0
        if op not in ("former", "text_path"):
            tensors[picture] = tensors[picture].contiguous(memory_format=layout)
        tensors[picture][(1, 3, 4, 5)[: tensors[picture].dim()]] = value
        result = OPS[op][0](*tensors, backend=backend, **keywords)
        wanted = OPS[op][1](*tensors, **keywords)
        assert torch.equal(result.isfinite(), wanted.isfinite())
        assert not wanted.isfinite().all() and wanted.isfinite().any()


@every_backend
@every_op
def test_two_runs_give_equal_bits_on_any_number_of_threads(op, backend):
    def run(tensors):
        cotangent = torch.ones_like(OPS[op][0](*tensors, backend=backend, **keywords))
        return result_and_gradients(OPS[op][0], tensors, cotangent.cumsum(1), backend=backend, **keywords)

    tensors, keywords = make(op, batch=2, tokens=40, height=30, breadth=30, device=device_of(backend))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(tensors)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, run(tensors)))
    finally:
        torch.set_num_threads(threads)
    # The comparison can fail: the last bit of one value shows.
    tensors[0].view(-1)[0] = torch.nextafter(tensors[0].view(-1)[0], tensors[0].new_tensor(9.0))
    assert not all(map(torch.equal, first, run(tensors)))


@every_backend
@every_op
def test_a_second_derivative_is_an_error_by_name(op, backend):
    tensors, keywords = make(op, device=device_of(backend))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    result = OPS[op][0](*leaves, backend=backend, **keywords)
    (gradient,) = torch.autograd.grad(result.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op} has no second derivative"):
        gradient.sum().backward()


@every_backend
@every_op
def test_functional_transforms_take_the_reference(op, backend):
    tensors, keywords = make(op, device=device_of(backend))

    def loss(*t, backend="auto"):
        return OPS[op][0](*t, backend=backend, **keywords).square().sum()

    gradient = torch.func.grad(loss)(*tensors)
    torch.testing.assert_close(gradient, torch.func.grad(lambda *t: loss(*t, backend="reference"))(*tensors))
    with pytest.raises(FusekernError, match=f"cannot run {op}: it does not work under torch.func transforms"):
        torch.func.grad(lambda *t: loss(*t, backend=backend))(*tensors)


@every_backend
@every_op
def test_operations_are_counted_by_hand(op, backend):
    batch, tokens, heads, width, height, breadth = 2, 5, 2, 8, 6, 9
    channels, pixels = heads * width, height * breadth
    tensors, keywords = make(
        op, batch=batch, tokens=tokens, width=width, height=height, breadth=breadth, device=device_of(backend)
    )
    former = 2 * batch * tokens * 8 * channels * channels + 4 * batch * tokens * tokens * channels
    forward = {
        "former": former,
        "text_path": former + 4 * 2 * batch * tokens * channels * channels,
        "conv2former": 4 * batch * pixels * tokens * channels,
        "former2conv": 4 * batch * pixels * tokens * channels,
        "score_map": 2 * batch * pixels * tokens * channels,
        "downsample": 2 * batch * 2 * 3 * 9 * channels * channels,
        "inverted_bottleneck": 2 * batch * pixels * 2 * channels * (2 * channels + 9),
    }[op]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with FlopCounterMode(display=False) as counter:
        result = OPS[op][0](*leaves, backend=backend, **keywords)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        result.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@every_backend
@every_op
def test_offsets_beyond_32_bits(op, backend):
    """Two images more than 2^31 elements apart in one storage, of which only their own pages are ever touched."""
    tensors, keywords = make(op, device=device_of(backend), dtype=torch.bfloat16)
    picture = 1 if op == "conv2former" else 0
    image = tensors[picture]
    storage = torch.empty(2**31 + image.numel(), dtype=image.dtype, device=image.device)
    far = storage.as_strided(image.shape, (2**31 - 5, *image.stride()[1:]), 5)
    far.copy_(image)
    wanted = OPS[op][0](*tensors, backend=backend, **keywords)
    found = OPS[op][0](*tensors[:picture], far, *tensors[picture + 1 :], backend=backend, **keywords)
    assert torch.equal(found, wanted)


@every_backend
def test_a_kernel_that_cannot_run_says_why(backend, caplog):
    tensors, keywords = make("former2conv", device=device_of(backend))
    doubles = [tensor.double() for tensor in tensors]
    with pytest.raises(FusekernError, match="float64, it takes float32, bfloat16"):
        ops.former2conv(*doubles, backend=backend, **keywords)
    with caplog.at_level(logging.DEBUG, "fusekern"), use_backend("auto"):
        ops.former2conv(*doubles, **keywords)
    assert any(f"not on {backend}: float64" in line for line in caplog.messages)


@every_backend
@every_op
def test_auto_never_takes_a_kernel_that_cannot_run(op, backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensors, keywords = make(op, device=device_of(backend), dtype=dtype)
        pairs = [tensors[i : i + 2] for i in range(len(tensors) % 2 or 2, len(tensors), 2)]
        arguments = {
            "former": (tensors[0], *pairs, 2, 1e-5),
            "text_path": (*tensors[:2], *pairs[:2], pairs[2:8], *pairs[8:], 2, 1e-5),
            "conv2former": (*tensors, 2, None),
            "former2conv": (*tensors, 2, None),
            "score_map": (*tensors, True, False),
            "downsample": (*tensors, "floor"),
            "inverted_bottleneck": (*tensors[:4], (), 1, ""),
        }[op]
        chosen = resolve(op, "auto", *arguments)
        assert chosen == "reference" or not why_not(op, chosen, *arguments)
        assert OPS[op][0](*tensors, **keywords).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@every_op
def test_graph_capture_and_another_stream(op):
    tensors, keywords = make(op, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def step():
        result = OPS[op][0](*leaves, backend="triton", **keywords)
        return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.add_(0.5)  # a factor would leave cosines as they are
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], wanted[0])
    for found, right in zip(captured, step(), strict=True):
        assert torch.equal(found, right)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_op
def test_a_device_that_is_not_the_current_one(op):
    tensors, keywords = make(op, device="cuda:0")
    wanted = OPS[op][0](*tensors, backend="triton", **keywords)
    found = OPS[op][0](*(tensor.to("cuda:1") for tensor in tensors), backend="triton", **keywords)
    assert found.device.index == 1 and torch.equal(found.cpu(), wanted.cpu())
