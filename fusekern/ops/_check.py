"""Checks of tensor arguments. Each raises a ``ValueError`` that names the argument, what it is and what it must be."""

from __future__ import annotations

import torch
from torch import Tensor

# Asked once: torch 2.11 cannot compile the question.
_AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def autocast_enabled(device: str) -> bool:
    """Is autocast on, for a type of device that may not know it, as ``meta`` does not?"""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def check_tensors(**values: object) -> None:
    """All are tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor; got {type(value).__name__}")


def check_shape(name: str, tensor: Tensor, layout: str, **sizes: int) -> None:
    """``layout`` as in ``"B C 3 3"``; ``sizes`` gives the letters whose size is known."""
    if not isinstance(tensor, Tensor):
        check_tensors(**{name: tensor})
    letters = layout.split()
    fits = tensor.dim() == len(letters)
    for letter, found in zip(letters, tensor.shape, strict=False):
        fits = fits and found == (int(letter) if letter.isdigit() else sizes.get(letter, found))
    if not fits:
        known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
        where = f" with {known}" if known else ""
        raise ValueError(f"{name} must be [{', '.join(letters)}]{where}; got shape {list(tensor.shape)}")


def check_alike(**tensors: Tensor | None) -> None:
    """All floating point, on one device, and outside autocast of one dtype."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, leader = next(iter(present.items()))
    if _same(leader, *present.values()):
        return
    autocast = autocast_enabled(leader.device.type)
    for name, tensor in present.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != leader.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {leader.device}: they must share a device")
        if tensor.dtype != leader.dtype and not autocast:
            raise ValueError(
                f"{name} is {tensor.dtype}, {first} {leader.dtype}: outside autocast they must share a dtype"
            )


def _same(leader: Tensor, *others: Tensor) -> bool:
    """As good as always, and found out faster than in words."""
    dtype, device = leader.dtype, leader.device
    for other in others:
        if other.dtype != dtype or other.device != device:
            return False
    return dtype.is_floating_point


def check_tokens(name: str, tensor: Tensor) -> None:
    """``[B, K, C]`` with at least one token."""
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} must have at least one token; got shape {list(tensor.shape)}")


def check_affines(tokens: Tensor, **pairs: tuple) -> None:
    """Pairs of weight and bias that go with the tokens; each with the shape that its weight must have."""
    for name, ((weight, bias), shape) in pairs.items():
        if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
            check_tensors(**{f"{name} weight": weight, f"{name} bias": bias})
        if weight.shape != shape or bias.shape != shape[:1]:
            raise ValueError(
                f"{name} must be a weight {list(shape)} and a bias {list(shape[:1])}; "
                f"got shapes {list(weight.shape)} and {list(bias.shape)}"
            )
    if not _same(tokens, *[part for pair, _ in pairs.values() for part in pair]):
        for name, ((weight, bias), _) in pairs.items():
            check_alike(**{"tokens": tokens, f"{name} weight": weight, f"{name} bias": bias})


def check_heads(channels: int, heads: int, name: str = "heads") -> None:
    """Heads split the channels evenly."""
    if heads < 1 or channels % heads:
        raise ValueError(f"{name} must divide the channels: got {name} = {heads}, C = {channels}")


def check_scale(scale: float | None) -> None:
    """A number: kernels have no gradient for it."""
    if isinstance(scale, Tensor):
        raise ValueError("scale must be a number, got a tensor: multiply the query or key with a tensor, and pass 1.0")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
