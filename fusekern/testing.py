"""The rule by which a fused result is judged against float64; tests and benchmarks share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_parity(result: Tensor, peers: Sequence[Tensor], truth: Tensor, *, gradient: bool = False) -> list[str]:
    """Is a result as good as PyTorch's own?

    With r the truth and p the peers, of which the worst counts:

        max |y - r| <= m max |p - r| + floor,    floor = eps (max |r| + 0.3)
        |y - r| / |r| <= 1.1 |p - r| / |r|  in bf16 and fp16,    2 |p - r| / |r| + 2^-22  in fp32

    m is 2 for outputs and 3 for gradients. The floor is the most that adding 0.3 and taking it away can cost, twice.
    The truth in y's dtype counts among the peers: on a few elements a peer can be luckier than that, and it must pass.
    Elements that are finite neither in the truth nor in a peer do not enter the norms.

    Args:
        result: y, any shape, fp32, bf16 or fp16.
        peers: PyTorch's results in y's dtype, over its orderings and layouts.
        truth: r, float64.
        gradient: y is a gradient.

    Returns:
        What is wrong, in words; empty if nothing is.

    Raises:
        ValueError: no peer, shapes differ, or the truth is not float64.
    """
    if not peers:
        raise ValueError("check_parity needs at least one peer")
    if truth.dtype != torch.float64:
        raise ValueError(f"truth must be float64, got {truth.dtype}")
    for name, tensor in (("result", result), *(("peer", peer) for peer in peers)):
        if tensor.shape != truth.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, truth {list(truth.shape)}")
    if truth.numel() == 0:
        return []
    wrong = []
    finite = torch.stack([peer.isfinite() for peer in peers]).all(0) & truth.isfinite()
    bad = int((~result.isfinite() & finite).sum())
    if bad:
        return [f"{bad} of {truth.numel()} values are not finite, where the peers' are"]
    missed = int((result.isfinite() & ~truth.isfinite()).sum())
    if missed:
        return [f"{missed} of {truth.numel()} values are finite, where the truth's are not"]
    y, r = result.double()[finite], truth[finite]
    if r.numel() == 0:
        return []
    rounded = r.to(result.dtype)
    errors = [rounded.double() - r, *(peer.double()[finite] - r for peer in peers)]
    floor = torch.finfo(result.dtype).eps * (r.abs().max().item() + 0.3)
    worst = max(error.abs().max().item() for error in errors)
    allowed, found = (3 if gradient else 2) * worst + floor, (y - r).abs().max().item()
    if found > allowed:
        wrong.append(f"max error {found:.3g}, allowed {allowed:.3g} (worst peer {worst:.3g}, floor {floor:.3g})")
    norm = r.norm().item()
    if norm > 0:
        worst = max(error.norm().item() for error in errors) / norm
        allowed = 2 * worst + 2**-22 if result.dtype == torch.float32 else 1.1 * worst
        found = (y - r).norm().item() / norm
        if found > allowed:
            wrong.append(f"relative L2 error {found:.3g}, allowed {allowed:.3g} (worst peer {worst:.3g})")
    return wrong


def assert_parity(result: Tensor, peers: Sequence[Tensor], truth: Tensor, *, gradient: bool = False) -> None:
    """Raises an ``AssertionError`` with all that ``check_parity`` finds."""
    wrong = check_parity(result, peers, truth, gradient=gradient)
    assert not wrong, "; ".join(wrong)
