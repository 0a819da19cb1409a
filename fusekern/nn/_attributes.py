"""What ops take of a module's children, found without the detour of an attribute of ``nn.Module``.

Python looks for a name everywhere else first, which takes as long as a check of all that an op is given.
"""

from __future__ import annotations

from torch import Tensor, nn


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer; an attribute where it is neither, as of a parametrized weight."""
    found = module._parameters.get(name)
    if found is None:
        found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


def affine(part: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """A child as ops take it."""
    return tensor_of(part, "weight"), tensor_of(part, "bias")
