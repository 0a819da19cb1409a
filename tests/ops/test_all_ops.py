"""What every op promises, whatever it computes."""

from __future__ import annotations

import pytest
import torch

from fusekern import FusekernError, ops, use_backend
from fusekern.backends import OPS

C, E, K, H, W, HEADS = 6, 12, 5, 7, 6, 2


def _former(tokens, *rest, **keywords):
    pairs = [(rest[i], rest[i + 1]) for i in range(0, 12, 2)]
    return ops.former(tokens, *pairs, heads=HEADS, **keywords)


def _text_path(tokens, gathered, *rest, **keywords):
    pairs = [(rest[i], rest[i + 1]) for i in range(0, 22, 2)]
    entry, norm0, *former, key, value, query = pairs
    path = ops.text_path(tokens, gathered, entry, norm0, tuple(former), key, value, query, heads=HEADS, **keywords)
    return torch.cat(path, 2)


def _inverted_bottleneck(image, expand, depthwise, project, *rest, **keywords):
    norms = tuple(ops.BatchNorm(rest[i], rest[i + 1], None, None, 1e-5, True) for i in (0, 2, 4))
    return ops.inverted_bottleneck(image, expand, depthwise, project, norms, **keywords)[0]


def _shapes(op, batch):
    image, text = (batch, C, H, W), (batch, K, C)
    linears = [(3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (E, C), (E,), (C, E), (C,), (C,), (C,)]
    square = [(C, C), (C,)]
    return {
        "downsample": [image, (C, C, 3, 3), (C,)],
        "conv2former": [text, (batch, C, 2, 2)],
        "former2conv": [image, text, text],
        "inverted_bottleneck": [image, (E, C, 1, 1), (E, 1, 3, 3), (C, E, 1, 1), *[(n,) for n in (E, E, E, E, C, C)]],
        "former": [text, *linears],
        "text_path": [text, text, *square, (C,), (C,), *linears, *square, *square, *square],
        "score_map": [image, text],
    }[op]


CALLS = {
    "downsample": ops.downsample,
    "conv2former": lambda *t, **kw: ops.conv2former(*t, heads=HEADS, **kw),
    "former2conv": lambda *t, **kw: ops.former2conv(*t, heads=HEADS, **kw),
    "inverted_bottleneck": _inverted_bottleneck,
    "former": _former,
    "text_path": _text_path,
    "score_map": lambda *t, **kw: ops.score_map(*t, concat=True, **kw),
}
# One result shape per op, as its docstring has it.
RESULTS = {
    "downsample": lambda batch: (batch, C, 2, 2),
    "conv2former": lambda batch: (batch, K, C),
    "former2conv": lambda batch: (batch, C, H, W),
    "inverted_bottleneck": lambda batch: (batch, C, H, W),
    "former": lambda batch: (batch, K, C),
    "text_path": lambda batch: (batch, K, 4 * C),
    "score_map": lambda batch: (batch, C + K, H, W),
}

every_op = pytest.mark.parametrize("op", OPS)


def make(op, *, batch=2, dtype=torch.float64, grad=False):
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in _shapes(op, batch)]


def test_the_table_is_complete():
    assert set(CALLS) == set(OPS) == {name for name in ops.__all__ if name in OPS}


@every_op
def test_gradients_are_those_of_finite_differences(op):
    tensors = make(op, grad=True)
    assert torch.autograd.gradcheck(CALLS[op], tensors)


@every_op
@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded"])
def test_strides_do_not_matter(op, layout, lay_out):
    # Other strides may take another order of summation: 1e-12 is 4500 ulp at 1 in float64.
    tensors = [lay_out(layout, tensor) for tensor in make(op)]
    plain = [tensor.contiguous().clone().requires_grad_() for tensor in tensors]
    strided = [tensor.requires_grad_() for tensor in tensors]
    expected, found = CALLS[op](*plain), CALLS[op](*strided)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, strided, weight)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, plain, weight), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-11)


@every_op
@pytest.mark.parametrize("batch", [0, 1])
def test_smallest_batches(op, batch):
    tensors = make(op, batch=batch, grad=True)
    result = CALLS[op](*tensors)
    assert result.shape == RESULTS[op](batch)
    assert result.isfinite().all()
    result.sum().backward()
    assert tensors[0].grad.shape == tensors[0].shape


@every_op
def test_result_is_new_and_arguments_stay(op):
    tensors = make(op)
    before = [tensor.clone() for tensor in tensors]
    result = CALLS[op](*tensors)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert result.untyped_storage().data_ptr() not in storages
    result.zero_()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


@every_op
def test_two_runs_give_equal_bits(op):
    tensors = make(op, dtype=torch.float32)
    first = CALLS[op](*tensors)
    assert torch.equal(first, CALLS[op](*tensors))
    # The comparison can fail: one bit of one argument shows.
    tensors[0].view(-1)[0] += 0.01
    assert not torch.equal(first, CALLS[op](*tensors))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_close_to_float64(op, dtype):
    tensors = make(op, dtype=dtype)
    result = CALLS[op](*tensors)
    truth = CALLS[op](*(tensor.double() for tensor in tensors))
    assert result.dtype == dtype
    # No op here chains more than six roundings of intermediates; 32 eps of the result's scale leaves room for their
    # amplification by the norms and is far below any error of formula.
    error = (result.double() - truth).abs().max() / truth.abs().max()
    assert error < 32 * torch.finfo(dtype).eps


@every_op
def test_autocast_takes_fp32_and_mixed_arguments(op):
    tensors = make(op, dtype=torch.float32, grad=True)
    mixed = [tensors[0].detach().bfloat16(), *tensors[1:]]
    truth = CALLS[op](*(tensor.double() for tensor in mixed))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for arguments in (tensors, mixed):
            result = CALLS[op](*arguments)
            assert (result.double() - truth).abs().max() < 32 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    result.float().sum().backward()
    for tensor in tensors[1:]:
        assert tensor.grad.dtype == torch.float32


@every_op
def test_compiles_to_one_graph_for_all_sizes(op):
    compiled = torch.compile(CALLS[op], fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        tensors = make(op, batch=batch)
        torch.testing.assert_close(compiled(*tensors), CALLS[op](*tensors), rtol=1e-12, atol=1e-12)


@every_op
def test_functional_transforms_of_the_reference(op):
    tensors = make(op)
    gradient = torch.func.grad(lambda *t: CALLS[op](*t, backend="reference").square().sum())(*tensors)
    leaf = tensors[0].clone().requires_grad_()
    CALLS[op](leaf, *tensors[1:]).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)
    stacked = torch.stack([tensors[0], 2 * tensors[0]])
    mapped = torch.func.vmap(lambda first: CALLS[op](first, *tensors[1:], backend="reference"))(stacked)
    torch.testing.assert_close(mapped[1], CALLS[op](2 * tensors[0], *tensors[1:]), rtol=1e-11, atol=1e-11)


@every_op
@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
def test_a_backend_asked_for_by_name_runs_or_says_why_not(op, backend):
    # float64 is for the reference alone.
    why = "(float64, it takes|this version has no|is not there|is not installed|it runs on)"
    with pytest.raises(FusekernError, match=f"backend '{backend}' cannot run {op}: .*{why}"):
        CALLS[op](*make(op), backend=backend)
    with use_backend(backend), pytest.raises(FusekernError, match=op):
        CALLS[op](*make(op))
    CALLS[op](*make(op), backend="reference")
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpp, triton, cuda, got 'fast'"):
        CALLS[op](*make(op), backend="fast")


@every_op
def test_arguments_that_are_no_tensors(op):
    tensors = make(op)
    for index in range(len(tensors)):
        with pytest.raises(ValueError, match="must be a tensor; got list"):
            CALLS[op](*tensors[:index], tensors[index].tolist(), *tensors[index + 1 :])


@every_op
def test_arguments_that_do_not_belong_together(op):
    tensors = make(op)
    for index in range(1, len(tensors)):
        other = [*tensors[:index], tensors[index].float(), *tensors[index + 1 :]]
        with pytest.raises(ValueError, match="float32"):
            CALLS[op](*other)
        other[index] = tensors[index].to("meta")
        with pytest.raises(ValueError, match="is on meta"):
            CALLS[op](*other)
        other[index] = tensors[index].new_zeros((2,) * 5)
        with pytest.raises(ValueError, match=r"must be .*; got"):
            CALLS[op](*other)
    with pytest.raises(ValueError, match="must be floating point, got torch.int64"):
        CALLS[op](*(tensor.long() for tensor in tensors))
    with pytest.raises(ValueError, match=r"must be \[B.*; got shape \[3\]"):
        CALLS[op](torch.zeros(3), *tensors[1:])
