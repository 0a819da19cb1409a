"""The launchers of former and the op above them, judged against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusekern.kernels import former as kernels
from fusekern.kernels import former_bwd, former_fwd
from torch import Tensor
from where import DEVICE, DTYPES

from fusekern.ops.former import _empty, _former, former_reference
from fusekern.testing import assert_parity

# batch, tokens, heads, channels of a head, hidden channels, layout of tokens and gradient
CASES = [
    (2, 19, 2, 16, 64, "plain"),
    (2, 33, 3, 20, 50, "sliced"),
    (1, 65, 2, 64, 256, "batch first"),
    (1, 35, 5, 64, 32, "permuted"),
    (3, 18, 1, 24, 24, "expanded"),
    (2, 7, 3, 11, 19, "permuted"),
    (1, 150, 4, 16, 128, "plain"),
    (1, 34, 1, 128, 16, "wide rows"),
    (1, 17, 1, 160, 48, "plain"),
]
NAMES = (
    *("tokens", "qkv_weight", "qkv_bias", "out_weight", "out_bias", "gain1", "shift1"),
    *("up_weight", "up_bias", "down_weight", "down_bias", "gain2", "shift2"),
)


def lay_out(layout: str, text: Tensor) -> Tensor:
    """The same values in other strides; ``expanded`` repeats the first batch. NaN around it, so that a read shows."""
    batch, count, channels = text.shape
    if layout == "sliced":
        larger = text.new_full((batch + 1, count + 2, channels + 3), float("nan"))
        return larger[1:, 1:-1, 2:-1].copy_(text)
    if layout == "wide rows":  # in place: its rows have accesses of 16 bytes
        larger = text.new_full((batch, count + 1, channels + 32), float("nan"))
        return larger[:, 1:, 16:-16].copy_(text)
    if layout == "batch first":
        return text.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "permuted":
        return text.mT.contiguous().mT
    if layout == "expanded":
        return text[:1].expand_as(text)
    return text


def make(case, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """The result's gradient, and tokens and parameters."""
    batch, count, heads, width, hidden, layout = case
    channels = heads * width

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    tensors = [
        *(draw(batch, count, channels) + offset, draw(3 * channels, channels) / channels**0.5, draw(3 * channels)),
        *(draw(channels, channels) / channels**0.5, draw(channels), 1 + draw(channels) / 2, draw(channels)),
        *(draw(hidden, channels) / channels**0.5, draw(hidden), draw(channels, hidden) / hidden**0.5, draw(channels)),
        *(1 + draw(channels) / 2, draw(channels)),
    ]
    tensors = [tensor.to(dtype) for tensor in tensors]
    tensors[0] = lay_out(layout, tensors[0])
    return lay_out(layout, draw(batch, count, channels).to(dtype)), tensors


def guarded(like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A dense tensor full of NaN, and the memory before and behind it, full of 7."""
    memory = like.new_full((like.numel() + 256,), 7)
    return memory[128:-128].view(like.shape).fill_(float("nan")), [memory[:128], memory[-128:]]


def run(grad: Tensor, tensors: list[Tensor], heads: int, eps: float = 1e-5) -> dict[str, Tensor]:
    """The result, called "out", and all gradients; the launchers write them and nothing else."""
    walls = []

    def fresh(like: Tensor) -> Tensor:
        tensor, around = guarded(like)
        walls.extend(around)
        return tensor

    before = [tensor.clone() for tensor in (grad, *tensors)]
    out, *saved = (fresh(tensor) for tensor in _empty(tensors[0], tensors[7], heads))
    kernels.former_fwd(*tensors, heads, eps, out, *saved)
    gradients = [fresh(torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)) for tensor in tensors]
    needed = [tensors[i] for i in (0, 1, 3, 5, 6, 7, 9, 11)]
    kernels.former_bwd(grad, *needed, *saved, heads, *gradients)
    for tensor, copy in zip((grad, *tensors), before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
    assert all((wall == 7).all() for wall in walls)
    return {"out": out} | dict(zip(NAMES, gradients, strict=True))


def reference(*tensors: Tensor, heads: int, eps: float = 1e-5) -> Tensor:
    pairs = [tensors[i : i + 2] for i in range(1, 13, 2)]
    return former_reference(tensors[0], *pairs, heads=heads, eps=eps)


def composition(*tensors: Tensor, heads: int, eps: float = 1e-5) -> Tensor:
    """As PyTorch's own layer has it, with its fused attention."""
    tokens, qkv_weight, qkv_bias, out_weight, out_bias, *rest = tensors
    gain1, shift1, up_weight, up_bias, down_weight, down_bias, gain2, shift2 = rest
    q, k, v = F.linear(tokens, qkv_weight, qkv_bias).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    norm = tokens.shape[2:]
    tokens = F.layer_norm(tokens + F.linear(mixed, out_weight, out_bias), norm, gain1, shift1, eps)
    wide = F.gelu(F.linear(tokens, up_weight, up_bias))
    return F.layer_norm(tokens + F.linear(wide, down_weight, down_bias), norm, gain2, shift2, eps)


def unfused(*tensors: Tensor, heads: int, eps: float = 1e-5) -> Tensor:
    """Products and sums apart, as they are without a bias in the product."""
    tokens, qkv_weight, qkv_bias, out_weight, out_bias, *rest = tensors
    gain1, shift1, up_weight, up_bias, down_weight, down_bias, gain2, shift2 = rest
    q, k, v = (tokens @ qkv_weight.mT + qkv_bias).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = (((q @ k.mT) * k.shape[3] ** -0.5).softmax(3) @ v).transpose(1, 2).flatten(2)
    norm = tokens.shape[2:]
    tokens = F.layer_norm(mixed @ out_weight.mT + out_bias + tokens, norm, gain1, shift1, eps)
    wide = F.gelu(tokens @ up_weight.mT + up_bias)
    return F.layer_norm(wide @ down_weight.mT + down_bias + tokens, norm, gain2, shift2, eps)


def differentiated(op, grad: Tensor, tensors: list[Tensor], heads: int, **keywords: float) -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = op(*leaves, heads=heads, **keywords)
    return {"out": out.detach()} | dict(zip(NAMES, torch.autograd.grad(out, leaves, grad), strict=True))


def gathered(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vectors' gradients in one, each in the power of 2 that is nearest to its size."""
    parts, others = [], {}
    for name, result in results.items():
        if result.dim() == 1:
            size = truth[name].square().mean().sqrt()
            parts.append(result * (2.0 ** -size.log2().round()).to(result.dtype))
        else:
            others[name] = result
    return others | {"vectors": torch.cat(parts)}


def judge(grad: Tensor, tensors: list[Tensor], heads: int, **keywords: float) -> None:
    """By the house's rule. In 16 bits errors come from roundings on the way, not the last alone, and in the norm of
    some dozens of them one result can be luckier than another by more than the 10 % that the rule leaves: so there the
    vectors count as one."""
    found = run(grad, tensors, heads, **keywords)
    peers = [differentiated(op, grad, tensors, heads, **keywords) for op in (reference, composition, unfused)]
    truth = differentiated(reference, grad.double(), [tensor.double() for tensor in tensors], heads, **keywords)
    if grad.dtype != torch.float32:
        found, *peers, truth = (gathered(results, truth) for results in (found, *peers, truth))
    for name, result in found.items():
        try:
            assert_parity(result, [peer[name] for peer in peers], truth[name], gradient=name != "out")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_good_as_torch(case, dtype):
    judge(*make(case, dtype), case[2])


@pytest.mark.parametrize("width", [1, 3, 16])
def test_one_token(width):
    """A softmax over one key: what is 0 then, of the queries and keys, has no relative error."""
    judge(*make((1, 1, 1, width, 32, "plain"), torch.float32), 1)


@pytest.mark.parametrize("eps", [1e-12, 0.3])
def test_eps(eps):
    judge(*make(CASES[0], torch.float32), 2, eps=eps)


def test_a_mean_far_from_zero():
    """The moments of parts are joined around their means: squares of 300 would lose the deviations of 1."""
    grad, tensors = make((1, 40, 5, 64, 64, "plain"), torch.float32, offset=300.0)
    # Similarities of the order of 1e4 would be the subject instead: the backward computes them again, and what two
    # roundings of theirs do to the softmax is luck, for every attention that keeps no probabilities.
    tensors[1] = tensors[1] * 0.01
    judge(grad, tensors, 5)


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_vectors_of_another_dtype(case):
    """Beside tokens of 16 bits, as autocast leaves them."""
    grad, tensors = make(case, torch.float16)
    wide = [tensor.float() if tensor.dim() == 1 else tensor for tensor in tensors]
    found, narrow = run(grad, wide, case[2]), run(grad, tensors, case[2])
    for name, tensor in zip(NAMES, wide, strict=True):
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].to(torch.float16), narrow[name])
    assert torch.equal(found["out"], narrow["out"])


def test_strides_of_parameters():
    grad, tensors = make(CASES[0], torch.float32)
    strided = [tensor if tensor.dim() == 1 else tensor.mT.contiguous().mT for tensor in tensors]
    strided = [torch.stack((tensor, tensor), 1)[:, 0] if tensor.dim() == 1 else tensor for tensor in strided]
    assert_same(run(grad, tensors, 2), run(grad, strided, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["grad", "tokens"])
def test_nan_stays_in_its_batch(where, dtype):
    grad, tensors = make((3, 21, 2, 32, 80, "plain"), dtype)
    clean = run(grad, tensors, 2)
    (grad if where == "grad" else tensors[0])[1, 4, 40] = float("nan")
    found = run(grad, tensors, 2)
    truth = differentiated(reference, grad.double(), [tensor.double() for tensor in tensors], 2)
    for name, result in found.items():
        assert torch.equal(result.isnan(), truth[name].isnan()), name
        assert torch.equal(result[~truth[name].isnan()], clean[name][~truth[name].isnan()]), name
    assert bool(truth["out"].isnan().any()) == (where == "tokens") and not truth["out"][0].isnan().any()


@pytest.mark.parametrize("case", [CASES[5], CASES[6]], ids=str)
def test_same_bits_again(case):
    grad, tensors = make(case, DTYPES[-1])
    first = run(grad, tensors, case[2])
    assert_same(first, run(grad, tensors, case[2]))
    # The comparison can fail: a change of a single input shows.
    tensors[0] = tensors[0].clone()
    tensors[0][0, 0, 0] += 0.25
    again = run(grad, tensors, case[2])
    assert not any(torch.equal(first[name], again[name]) for name in ("out", "tokens", "qkv_weight"))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, result in found.items():
        assert torch.equal(result, wanted[name]), name


def test_more_than_int32_elements():
    """Batches further apart than 2**31 elements."""
    far = 2**31 + 64
    grad, tensors = make((2, 17, 1, 16, 32, "plain"), torch.float16)
    memory = torch.empty(far + 17 * 16, dtype=torch.float16, device=DEVICE)
    apart = memory.as_strided((2, 17, 16), (far, 16, 1)).copy_(tensors[0])
    assert kernels._rows(apart)[0] is apart
    assert_same(run(grad, [apart, *tensors[1:]], 1), run(grad, tensors, 1))


class Spy:
    """A kernel that says when it is launched."""

    def __init__(self, kernel, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_launches_are_those_planned(case, monkeypatch):
    launched = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Spy(getattr(kernels, name), name, launched))
    grad, tensors = make(case, torch.float16)
    plan = kernels.launches()
    run(grad, tensors, case[2])
    assert launched == [*plan["fwd"], *plan["bwd"]]
    assert (len(plan["fwd"]), len(plan["bwd"])) == (2, 5)


def tasks_and_waits(monkeypatch) -> list[list[tuple[int, int]]]:
    """While kernels run: of each chain, number by number, for how many tasks it waits. Each waits but for those of the
    first product, and in the interpreter finds them done."""
    chains = []
    take, wait = former_fwd.next_task, former_fwd.wait_for

    def next_task(counters):
        number = take(counters)
        if int(number) == 0:
            chains.append([])
        assert int(number) == len(chains[-1])
        chains[-1].append((int(number), 0))
        return number

    def wait_for(counters, tasks):
        chains[-1][-1] = chains[-1][-1][0], int(tasks)
        wait(counters, tasks)

    for module in (former_fwd, former_bwd):
        monkeypatch.setattr(module, "next_task", next_task)
        monkeypatch.setattr(module, "wait_for", wait_for)
    return chains


def assert_in_stages(chain: list[tuple[int, int]], stages: int) -> None:
    """A task waits for all that come before the first task that waits as it does."""
    firsts = {waits: number for number, waits in reversed(chain)}
    assert len(firsts) == stages
    assert all(waits == number for waits, number in firsts.items())
    assert [waits for _, waits in chain] == sorted(waits for _, waits in chain)


if DEVICE == "cpu":  # programs run one by one, in Python

    @pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
    def test_a_product_waits_for_the_one_before(case, monkeypatch):
        chains = tasks_and_waits(monkeypatch)
        grad, tensors = make(case, torch.float32)
        run(grad, tensors, case[2])
        for chain, stages in zip(chains, (5, 4), strict=True):
            assert_in_stages(chain, stages)


def test_large_tiles(monkeypatch):
    """Those for many rows, on few."""
    for large in ("medium", "large"):
        monkeypatch.setattr(kernels, "setting_of", lambda kind, rows, columns, load=large: kernels.SETTINGS[kind, load])
        judge(*make((1, 40, 2, 64, 144, "plain"), torch.float16), 2)


def test_settings():
    """Every width of a head and every number of rows has a setting, of tiles that the tensor cores take."""
    for kind in ("half", "tf32", "ieee", "odd half", "odd fp32"):
        for width in range(1, 257):
            for tile in kernels.ATTENTION[kind, kernels.padded(width, 16)]:
                assert tile.BQ >= 16 and tile.BN >= 16
        for rows in (1, 150, 2400, 40000):
            for tile in kernels.setting_of(kind, rows, 512):
                assert min(tile[:3]) >= 16
    assert kernels.NORM_TILE >= kernels.MAX_CHANNELS
    half, single = torch.float16, torch.float32
    assert kernels.kind_of(half, 32, 64) == "half" and kernels.kind_of(half, 32, 24) == "odd half"
    assert kernels.kind_of(single, 32) == "ieee" and kernels.kind_of(single, 33) == "odd fp32"
    loads = [kernels.setting_of("half", rows, 512) for rows in (150, 1000, 5000)]
    assert loads == [kernels.SETTINGS["half", load] for load in ("small", "medium", "large")]


def test_few_parts_of_many_rows(monkeypatch):
    """A program has several blocks of rows where there are more than can run at once."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "MANY_ROWS", 100)
    judge(*make((2, 70, 1, 32, 32, "plain"), torch.float32), 1)


def through_the_op(*tensors: Tensor, heads: int, eps: float = 1e-5) -> Tensor:
    return _former(*tensors, heads, eps, "triton")[0]


def test_the_op_differentiates():
    grad, tensors = make(CASES[1], torch.float32)
    assert_same(differentiated(through_the_op, grad, tensors, 3), run(grad, tensors, 3))
    # Of some arguments alone.
    leaf = tensors[9].clone().requires_grad_()
    out = through_the_op(*tensors[:9], leaf, *tensors[10:], heads=3)
    (found,) = torch.autograd.grad(out, leaf, grad, create_graph=True)
    assert torch.equal(found, run(grad, tensors, 3)["down_weight"])
    with pytest.raises(NotImplementedError, match="former has no second derivative"):
        found.sum().backward()


def test_the_op_is_registered_soundly():
    _, tensors = make((2, 3, 1, 16, 16, "batch first"), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.fusekern.former.default, (*leaves, 1, 1e-5, "triton"))


def test_the_op_of_no_batch():
    _, tensors = make(CASES[0], torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (tensors[0][:0], *tensors[1:])]
    out = through_the_op(*leaves, heads=2)
    assert out.shape == (0, 19, 32)
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
