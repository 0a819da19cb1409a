"""What ops take of a module's children, and whether they may.

It is found without the detour of an attribute of ``nn.Module``: Python looks for a name everywhere else first, which
takes as long as a check of all that an op is given.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.nn.utils.parametrize import type_before_parametrizations


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer; an attribute where it is neither, as of a parametrized weight."""
    found = module._parameters.get(name)
    if found is None:
        found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


def children_of(module: nn.Module, *names: str) -> list[nn.Module]:
    return [module._modules[name] for name in names]


def affine(part: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """A child as ops take it."""
    return tensor_of(part, "weight"), tensor_of(part, "bias")


def is_plain(child: nn.Module, *kinds: type[nn.Module]) -> bool:
    """May an op take the place of a child's call: is it of such a kind, not of a subclass, and does nobody listen?

    A parametrized child is a subclass by name alone. Hooks, its own or those of all modules, may change what goes in or
    comes out, or a weight before it is used, as pruning does; a ``forward`` of the instance's own is how others wrap a
    module in place.
    """
    if child._forward_pre_hooks or child._forward_hooks or child._backward_pre_hooks or child._backward_hooks:
        return False
    if of_all._global_forward_pre_hooks or of_all._global_forward_hooks:
        return False
    if of_all._global_backward_pre_hooks or of_all._global_backward_hooks:
        return False
    if "forward" in child.__dict__:
        return False
    return type(child) in kinds or type_before_parametrizations(child) in kinds


def is_plain_affine(child: nn.Module, kind: type[nn.Module]) -> bool:
    """The same for a child with weight and bias."""
    return is_plain(child, kind) and child._parameters.get("bias", child) is not None
