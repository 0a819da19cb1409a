"""The launchers of the text path and the op above them, judged against float64."""

from __future__ import annotations

import pytest
import torch
from fusekern.kernels import former as kernels
from fusekern.kernels import text_path as launchers
from interpreted_former import Spy, assert_in_stages, composition, guarded, lay_out, tasks_and_waits
from interpreted_former import make as make_former
from torch import Tensor
from torch.nn import functional as F
from where import DEVICE, DTYPES

from fusekern.ops.text_path import _empty, _text_path, text_path_reference
from fusekern.testing import assert_parity

# batch, tokens, heads, channels of a head, hidden channels, layout of tokens and gradients; whether a query is wanted
CASES = [
    ((2, 19, 2, 16, 64, "plain"), True),
    ((2, 33, 3, 20, 50, "sliced"), False),
    ((1, 65, 2, 64, 256, "batch first"), True),
    ((2, 7, 3, 11, 19, "permuted"), True),
    ((1, 34, 1, 128, 16, "wide rows"), False),
    ((3, 18, 1, 24, 24, "expanded"), True),
]


def make(case, query: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The results' gradients, and tokens, what was gathered and parameters."""
    grad, (tokens, *former) = make_former(case, dtype)
    channels, layout = tokens.shape[2], case[-1]

    def linear() -> list[Tensor]:
        weight = torch.randn(channels, channels, device=DEVICE) / channels**0.5
        return [weight.to(dtype), torch.randn(channels, device=DEVICE).to(dtype)]

    norm = [(1 + torch.randn(channels, device=DEVICE) / 2).to(dtype), torch.randn(channels, device=DEVICE).to(dtype)]
    gathered, *grads = (lay_out(layout, torch.randn(tokens.shape, device=DEVICE).to(dtype)) for _ in range(4))
    exits = [part for _ in range(3 if query else 2) for part in linear()]
    return [grad, *(grads if query else grads[:2])], [tokens, gathered, *linear(), *norm, *former, *exits]


def run(grads: list[Tensor], tensors: list[Tensor], heads: int) -> list[Tensor]:
    """Results and gradients; the launchers write them and nothing else."""
    query, walls = len(tensors) == 24, []

    def fresh(like: Tensor) -> Tensor:
        tensor, around = guarded(like)
        walls.extend(around)
        return tensor

    before = [tensor.clone() for tensor in (*grads, *tensors)]
    none = () if query else (None, None)
    results = [fresh(tensor) for tensor in _empty(tensors[0], tensors[12], query, heads)]
    launchers.text_path_fwd(*tensors, *none, heads, 1e-5, *results)
    gradients = [fresh(torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)) for tensor in tensors]
    weights = [tensors[i] for i in (1, 2, 4, 5, 6, 8, 10, 11, 12, 14, 16, 18, 20)] + [tensors[22] if query else None]
    last = () if query else (None,)
    launchers.text_path_bwd(*grads, *last, *weights, results[0], *results[4:], heads, *gradients, *none)
    for tensor, copy in zip((*grads, *tensors), before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    assert all((wall == 7).all() for wall in walls)
    return [*results[: 4 if query else 3], *gradients]


def paired(tensors: list[Tensor]) -> tuple:
    entry, norm, *rest = (tuple(tensors[i : i + 2]) for i in range(2, len(tensors), 2))
    return *tensors[:2], entry, norm, tuple(rest[:6]), *rest[6:], *([] if len(tensors) == 24 else [None])


def reference(tensors: list[Tensor], heads: int) -> list[Tensor]:
    return [result for result in text_path_reference(*paired(tensors), heads=heads) if result is not None]


def fused_attention(tensors: list[Tensor], heads: int) -> list[Tensor]:
    tokens, gathered, entry, norm, former, *exits = paired(tensors)
    tokens = F.layer_norm(tokens + F.linear(gathered, *entry), tokens.shape[2:], *norm)
    tokens = composition(tokens, *(part for pair in former for part in pair), heads=heads)
    return [tokens, *(F.linear(tokens, *pair) for pair in exits if pair)]


def apart(tensors: list[Tensor], heads: int) -> list[Tensor]:
    """Bias and residual are added in another order."""
    tokens, gathered, entry, norm, former, *exits = paired(tensors)
    tokens = F.layer_norm(gathered @ entry[0].mT + tokens + entry[1], tokens.shape[2:], *norm)
    tokens = composition(tokens, *(part for pair in former for part in pair), heads=heads)
    return [tokens, *(tokens @ weight.mT + bias for weight, bias in filter(None, exits))]


def differentiated(op, grads: list[Tensor], tensors: list[Tensor], heads: int) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    results = op(leaves, heads)
    return [result.detach() for result in results] + list(torch.autograd.grad(results, leaves, grads))


def judge(case, query: bool, dtype: torch.dtype) -> None:
    """By the house's rule, the vectors' gradients as one: see ``interpreted_former.judge``."""
    grads, tensors = make(case, query, dtype)
    found = run(grads, tensors, case[2])
    peers = [differentiated(op, grads, tensors, case[2]) for op in (reference, fused_attention, apart)]
    doubles = [tensor.double() for tensor in grads], [tensor.double() for tensor in tensors]
    truth = differentiated(reference, *doubles, case[2])
    vectors = [i for i, right in enumerate(truth) if right.dim() == 1]
    scales = {i: 2.0 ** -truth[i].square().mean().sqrt().log2().round().item() for i in vectors}

    def together(results: list[Tensor]) -> list[Tensor]:
        joined = torch.cat([results[i] * scales[i] for i in vectors])
        return [joined, *(result for i, result in enumerate(results) if i not in scales)]

    found, truth, *peers = map(together, (found, truth, *peers))
    for i, (mine, right, *others) in enumerate(zip(found, truth, *peers, strict=True)):
        try:
            assert_parity(mine, others, right, gradient=i == 0 or i > (4 if query else 3))
        except AssertionError as error:
            raise AssertionError(f"number {i}, {list(mine.shape)}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case, query", CASES, ids=str)
def test_as_good_as_torch(case, query, dtype):
    judge(case, query, dtype)


def test_large_tiles(monkeypatch):
    """Those for many rows, on few."""
    for large in ("medium", "large"):
        monkeypatch.setattr(kernels, "setting_of", lambda kind, rows, columns, load=large: kernels.SETTINGS[kind, load])
        judge((1, 40, 2, 64, 144, "plain"), True, torch.float16)


def test_few_parts_of_many_rows(monkeypatch):
    """A program has several blocks of rows where there are more than can run at once."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "MANY_ROWS", 100)
    judge((2, 70, 1, 32, 32, "plain"), True, torch.float32)


def test_same_bits_again():
    case, query = CASES[3]
    grads, tensors = make(case, query, DTYPES[-1])
    first = run(grads, tensors, case[2])
    assert all(map(torch.equal, first, run(grads, tensors, case[2])))
    # The comparison can fail: a change of a single input shows.
    tensors[1] = tensors[1].clone()
    tensors[1][0, 0, 0] += 0.25
    again = run(grads, tensors, case[2])
    assert not any(torch.equal(first[i], again[i]) for i in (0, 1, 2, 3, 4, 5))


@pytest.mark.parametrize("query", [True, False])
def test_launches_are_those_planned(query, monkeypatch):
    launched = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Spy(getattr(kernels, name), name, launched))
    grads, tensors = make(CASES[0][0], query, torch.float16)
    run(grads, tensors, CASES[0][0][2])
    plan = launchers.launches()
    assert launched == [*plan["fwd"], *plan["bwd"]]
    assert (len(plan["fwd"]), len(plan["bwd"])) == (2, 5)


if DEVICE == "cpu":  # programs run one by one, in Python

    @pytest.mark.parametrize("query", [True, False])
    def test_a_product_waits_for_the_one_before(query, monkeypatch):
        chains = tasks_and_waits(monkeypatch)
        run(*make(CASES[0][0], query, torch.float32), CASES[0][0][2])
        for chain, stages in zip(chains, (6, 5, 3), strict=True):
            assert_in_stages(chain, stages)


def through_the_op(tensors: list[Tensor], heads: int) -> list[Tensor]:
    query = len(tensors) == 24
    none = () if query else (None, None)
    return _text_path(*tensors, *none, heads, 1e-5, "triton")[: 4 if query else 3]


@pytest.mark.parametrize("query", [True, False])
def test_the_op_differentiates(query):
    case = CASES[0][0]
    grads, tensors = make(case, query, torch.float32)
    found = differentiated(through_the_op, grads, tensors, case[2])
    assert all(map(torch.equal, found, run(grads, tensors, case[2])))
    leaf = tensors[18].clone().requires_grad_()
    key = through_the_op([*tensors[:18], leaf, *tensors[19:]], case[2])[1]
    (gradient,) = torch.autograd.grad(key, leaf, grads[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="text_path has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("query", [True, False])
def test_the_op_is_registered_soundly(query):
    _, tensors = make((2, 3, 1, 16, 16, "batch first"), query, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    none = () if query else (None, None)
    torch.library.opcheck(torch.ops.fusekern.text_path.default, (*leaves, *none, 1, 1e-5, "triton"))


def test_the_op_of_no_batch():
    _, tensors = make(CASES[0][0], True, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (*(tensor[:0] for tensor in tensors[:2]), *tensors[2:])]
    results = through_the_op(leaves, 2)
    assert all(result.shape == (0, 19, 32) for result in results)
    for leaf, gradient in zip(leaves, torch.autograd.grad(sum(r.sum() for r in results), leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
