"""The C++ kernel of former itself, below what the op checks, allocates and chooses."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import run_again
from walls import empty, walls_stand

from fusekern.extensions import load
from fusekern.ops.former import former_reference
from fusekern.ops.text_path import text_path_reference
from fusekern.testing import assert_parity

if load("_C"):
    pytest.skip(f"the C++ module is not there: {load('_C')}", allow_module_level=True)

import fusekern._C as extension

kernels = torch.ops.fusekern_cpp
EPS = 1e-3
# texts, tokens, channels, hidden, heads: odd on every vector's width, more rows than a block, heads of one channel,
# more terms than a block and, of these, more rows
SHAPES = [
    (1, 1, 4, 4, 1),
    (2, 5, 16, 32, 2),
    (3, 7, 21, 33, 3),
    (2, 37, 40, 80, 40),
    (1, 150, 64, 128, 4),
    (4, 160, 24, 50, 1),
    (1, 130, 22, 2101, 2),
]


def make(batch, count, channels, hidden, offset=0.0):
    def parameters(*size):
        return torch.randn(size) * size[-1] ** -0.5, 0.1 * torch.randn(size[0])

    def norm():
        return 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)

    tokens = torch.randn(batch, count, channels) + offset
    linears = ((3 * channels, channels), (channels, channels), (hidden, channels), (channels, hidden))
    qkv, out, up, down = (parameters(*size) for size in linears)
    return tokens, [*qkv, *out, *norm(), *up, *down, *norm()], torch.randn(batch, count, channels)


def run_all(tokens, parts, grad, heads):
    """What the forward fills and all gradients, each between walls."""
    batch, count, channels = tokens.shape
    hidden, dtype = parts[6].shape[0], tokens.dtype
    sizes = (channels, 3 * channels, channels, None, channels, hidden, channels)
    saved = [
        empty((batch, heads, count), torch.float32) if size is None else empty((batch, count, size), dtype)
        for size in sizes
    ]
    saved.append(empty((4, batch * count), torch.float32))
    kernels.former_fwd(tokens, *parts, heads, EPS, *saved)
    gradients = [empty(tensor.shape, tensor.dtype) for tensor in (tokens, *parts)]
    qkv, _, out, _, gain1, shift1, up, _, down, _, gain2, _ = parts
    kernels.former_bwd(grad, tokens, qkv, out, gain1, shift1, up, down, gain2, *saved[1:], heads, *gradients)
    for tensor in (*saved, *gradients):
        assert walls_stand(tensor)
    return saved, gradients


def run(*arguments):
    """The output and all gradients."""
    saved, gradients = run_all(*arguments)
    return saved[0], *gradients


def reference(tokens, parts, grad, heads, dtype):
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (tokens, *parts)]
    pairs = list(zip(leaves[1::2], leaves[2::2], strict=True))
    out = former_reference(leaves[0], *pairs, heads=heads, eps=EPS)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))


def judge(tokens, parts, grad, heads):
    peers = [reference(tokens, parts, grad, heads, torch.float32)]
    truth = reference(tokens, parts, grad, heads, torch.float64)
    for i, (found, peer, right) in enumerate(zip(run(tokens, parts, grad, heads), *peers, truth, strict=True)):
        assert_parity(found, [peer], right, gradient=i > 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape):
    torch.manual_seed(0)
    *sizes, heads = shape
    judge(*make(*sizes), heads)


def in_bf16(tokens, parts, vectors=torch.bfloat16):
    return tokens.bfloat16(), [part.to(torch.bfloat16 if part.dim() > 1 else vectors) for part in parts]


@pytest.mark.parametrize("vectors", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [*SHAPES[1:], (2, 19, 256, 512, 4)], ids=str)
def test_parity_in_bf16(shape, vectors):
    """Over several draws at once, as of text_path below. Under autocast vectors are in fp32; PyTorch rounds them."""
    torch.manual_seed(0)
    *sizes, heads = shape
    found, peers, truth = [], [], []
    for _ in range(8):
        tokens, parts, grad = make(*sizes)
        tokens, parts = in_bf16(tokens, parts, vectors)
        found.append(run(tokens, parts, grad.bfloat16(), heads))
        peers.append(reference(tokens, parts, grad.bfloat16(), heads, torch.bfloat16))
        truth.append(reference(tokens, parts, grad.bfloat16(), heads, torch.float64))
    judge_draws(found, peers, truth, results=1)


def judge_draws(found, peers, truth, results):
    for i, (mine, other, right) in enumerate(
        zip(*(zip(*draws, strict=True) for draws in (found, peers, truth)), strict=True)
    ):
        assert_parity(torch.stack(mine), [torch.stack(other)], torch.stack(right), gradient=i >= results)


def test_strides_in_bf16():
    torch.manual_seed(0)
    tokens, parts, grad = make(4, 9, 32, 24)
    tokens, parts = in_bf16(tokens, parts)
    tokens, grad = tokens[1:, 2:8], grad.bfloat16()[1:, 2:8]
    found, right = run(tokens, parts, grad, 4), run(tokens.contiguous(), parts, grad.contiguous(), 4)
    assert all(map(torch.equal, found, right))


def test_a_nan_of_bf16_stays_in_its_text():
    torch.manual_seed(0)
    tokens, parts, grad = make(2, 9, 32, 24)
    (tokens, parts), grad = in_bf16(tokens, parts), grad.bfloat16()
    clean = run(tokens, parts, grad, 4)
    tokens[1, 3, 5] = torch.nan
    out, dtokens, *rest = run(tokens, parts, grad, 4)
    assert torch.equal(out[0], clean[0][0]) and torch.equal(dtokens[0], clean[1][0])
    assert out[1].isnan().all() and dtokens[1].isnan().all()
    assert rest[0].isnan().any()


@pytest.mark.parametrize("layout", ["expanded", "sliced", "transposed"])
def test_strides(layout):
    """Tokens that are no dense matrix give, bit for bit, what their copy gives."""
    torch.manual_seed(0)
    tokens, parts, grad = make(3, 6, 20, 24)
    if layout == "expanded":
        tokens, grad = tokens[:1].expand(3, -1, -1), grad[:, :1].expand(-1, 6, -1)
    elif layout == "sliced":
        tokens = torch.randn(4, 9, 30)[1:, 2:8, 5:25]
    else:
        tokens, grad = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (tokens, grad))
    for found, right in zip(
        run(tokens, parts, grad, 4), run(tokens.contiguous(), parts, grad.contiguous(), 4), strict=True
    ):
        assert torch.equal(found, right)


def test_large_scores_and_far_means():
    torch.manual_seed(0)
    tokens, parts, grad = make(2, 9, 16, 32, offset=30.0)
    parts[0] = parts[0] * 8  # nearly one token takes all the weight
    out, *gradients = run(tokens, parts, grad, 2)
    right = reference(tokens, parts, grad, 2, torch.float64)
    plain = reference(tokens, parts, grad, 2, torch.float32)
    for found, peer, exact in zip((out, *gradients), plain, right, strict=True):
        assert (found - exact).norm() <= 3 * (peer - exact).norm() + 1e-6 * exact.norm()


def test_the_whole_range_of_gelu():
    """Behind zeros and a weight that is the identity GELU and its slope are seen alone."""
    x = torch.cat([torch.linspace(-14, 14, 505), torch.tensor([0.0, -0.0, 1.0, -1.0, 0.99999994, 1e-30, -1e-3])])
    n, zeros = len(x), torch.zeros(len(x))
    parts = [torch.zeros(3 * n, n), torch.zeros(3 * n), torch.zeros(n, n), zeros, zeros, zeros]
    parts += [torch.zeros(n, n), x, torch.eye(n), zeros, zeros + 1, zeros]
    saved, gradients = run_all(torch.zeros(1, 1, n), parts, torch.randn(1, 1, n), 1)
    exact = x.double().requires_grad_()
    right = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(right.sum(), exact)
    found = saved[6].flatten()
    assert (found - right).abs().max() <= 4e-7 and ((found - right).abs() <= 2e-7 * right.abs() + 2e-7 * x.abs()).all()
    dhidden, dsums = gradients[8].double(), gradients[10].double()
    assert ((dhidden - slope * dsums).abs() <= 4e-7 * dsums.abs().max()).all()


def test_a_nan_stays_in_its_text():
    torch.manual_seed(0)
    tokens, parts, grad = make(2, 6, 16, 32)
    tokens[0, 3, 5] = float("nan")
    out, dtokens, *rest = run(tokens, parts, grad, 2)
    assert out[0].isnan().all() and dtokens[0].isnan().all()
    assert out[1].isfinite().all() and dtokens[1].isfinite().all()
    assert rest[0].isnan().any()


def test_bits_do_not_depend_on_threads():
    torch.manual_seed(0)
    tokens, parts, grad = make(5, 150, 48, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(tokens, parts, grad, 3)
        torch.set_num_threads(2)
        two = run(tokens, parts, grad, 3)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [20, 150])
def test_bits_do_not_depend_on_other_texts(count):
    torch.manual_seed(0)
    tokens, parts, grad = make(9, count, 48, 300)
    together = run(tokens, parts, grad, 3)[0]
    for i in range(9):
        alone = run(tokens[i : i + 1], parts, grad[i : i + 1], 3)[0]
        assert torch.equal(together[i : i + 1], alone)


def test_refuses_what_does_not_fit():
    tokens, parts, grad = make(1, 4, 8, 16)
    parts[6] = parts[6].t().contiguous().t()
    with pytest.raises(RuntimeError, match="up_weight must be contiguous"):
        run(tokens, parts, grad, 2)
    tokens, parts, grad = make(1, 4, 8, 16)
    with pytest.raises(RuntimeError, match="heads must divide C"):
        run(tokens, parts, grad, 3)
    with pytest.raises(RuntimeError, match="the dtype must be float32 or bfloat16"):
        run(tokens.double(), parts, grad, 2)
    with pytest.raises(RuntimeError, match="qkv_weight has another dtype"):
        run(tokens.bfloat16(), parts, grad.bfloat16(), 2)
    parts[0] = parts[0].bfloat16()
    with pytest.raises(RuntimeError, match="qkv_weight has another dtype"):
        run(tokens, parts, grad, 2)
    low, parts = in_bf16(tokens, parts)
    with pytest.raises(RuntimeError, match="grad has another dtype"):
        run(low, parts, grad, 2)


@pytest.mark.parametrize("isa", extension.build_info()["isas"])
def test_other_instruction_sets(isa):
    run_again(__file__, isa)


def run_path(tensors, grads, heads, query):
    """What text_path's forward fills and all its gradients, each between walls."""
    batch, count, channels = tensors[0].shape
    hidden, dtype = tensors[12].shape[0], tensors[0].dtype
    none = [] if query else [None, None]
    sizes = (channels,) * 5 + (3 * channels, channels, None, channels, hidden, channels)
    saved = [
        empty((batch, heads, count), torch.float32) if size is None else empty((batch, count, size), dtype)
        for size in sizes
    ]
    saved.append(empty((6, batch * count), torch.float32))
    kernels.text_path_fwd(*tensors, *none, heads, EPS, *saved)
    gradients = [empty(tensor.shape, tensor.dtype) for tensor in tensors]
    weights = [tensors[i] for i in (1, 2, 4, 5, 6, 8, 10, 11, 12, 14, 16, 18, 20)] + [tensors[22] if query else None]
    grads = [*grads[:3], grads[3] if query else None]
    kernels.text_path_bwd(*grads, *weights, saved[0], *saved[4:], heads, *gradients, *none)
    for tensor in (*saved, *gradients):
        assert walls_stand(tensor)
    return [*saved[: 4 if query else 3], *gradients]


def reference_path(tensors, grads, heads, query, dtype):
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    entry, norm, *rest = zip(leaves[2::2], leaves[3::2], strict=True)
    last = rest[6:] if query else (*rest[6:], None)
    outs = text_path_reference(*leaves[:2], entry, norm, tuple(rest[:6]), *last, heads=heads, eps=EPS)
    outs = [out for out in outs if out is not None]
    grads = [grad.to(dtype) for grad in grads[: len(outs)]]
    return [out.detach() for out in outs] + list(torch.autograd.grad(outs, leaves, grads))


def make_path(shape, query):
    batch, count, channels, hidden, _ = shape
    tokens, parts, _ = make(batch, count, channels, hidden)

    def linear():
        return torch.randn(channels, channels) * channels**-0.5, 0.1 * torch.randn(channels)

    norm = 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)
    exits = [part for _ in range(3 if query else 2) for part in linear()]
    grads = [torch.randn_like(tokens) for _ in range(4)]
    return [tokens, torch.randn_like(tokens), *linear(), *norm, *parts, *exits], grads


@pytest.mark.parametrize("query", [True, False], ids=["query", "last"])
@pytest.mark.parametrize("shape", [(1, 1, 32, 8, 2), *SHAPES[1:]], ids=str)
def test_text_path(shape, query):
    """Over several draws at once: behind three norms the error of a few numbers is luck, ours and PyTorch's. A norm of
    four channels is left out, which now and then has next to no variance: one draw then decides all."""
    torch.manual_seed(0)
    found, peers, truth = [], [], []
    for _ in range(8):
        tensors, grads = make_path(shape, query)
        found.append(run_path(tensors, grads, shape[4], query))
        peers.append(reference_path(tensors, grads, shape[4], query, torch.float32))
        truth.append(reference_path(tensors, grads, shape[4], query, torch.float64))
    judge_draws(found, peers, truth, results=4 if query else 3)


def test_a_query_weight_without_a_gradient_of_its_query_is_refused():
    tensors, grads = make_path(SHAPES[1], True)
    with pytest.raises(RuntimeError, match="query_weight, dquery, dquery_weight and dquery_bias come together"):
        run_path(tensors, [*grads[:3], None], 2, True)


@pytest.mark.parametrize("query", [True, False], ids=["query", "last"])
def test_strides_of_a_text_path(query):
    torch.manual_seed(0)
    tensors, grads = make_path(SHAPES[2], query)
    turned = [tensor.mT.contiguous().mT for tensor in tensors[:2]]
    found = run_path(tensors, grads, 3, query)
    again = run_path([*turned, *tensors[2:]], [grad.mT.contiguous().mT for grad in grads], 3, query)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("query", [True, False], ids=["query", "last"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_text_path_in_bf16(shape, query):
    torch.manual_seed(0)
    found, peers, truth = [], [], []
    for _ in range(8):
        tensors, grads = make_path(shape, query)
        tensors, grads = ([tensor.bfloat16() for tensor in some] for some in (tensors, grads))
        found.append(run_path(tensors, grads, shape[4], query))
        peers.append(reference_path(tensors, grads, shape[4], query, torch.bfloat16))
        truth.append(reference_path(tensors, grads, shape[4], query, torch.float64))
    judge_draws(found, peers, truth, results=4 if query else 3)
