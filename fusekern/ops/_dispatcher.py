"""How the ops with kernels are known to PyTorch.

Behind a public op with kernels stands an op of the dispatcher whose schema carries the backend's name; another is its
backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload

_library = torch.library.Library("fusekern", "FRAGMENT")


def kernel_op(name: str, schema: str) -> Callable[[Callable], OpOverload]:
    """Make the function below ``torch.ops.fusekern.<name>``, on every device; its results are new tensors.

    As ``torch.library.custom_op`` does, without what that checks in each call.
    """

    def define(body: Callable) -> OpOverload:
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, torch._disable_dynamo(body), "CompositeExplicitAutograd")
        op = getattr(torch.ops.fusekern, name).default
        op.body = body
        if hasattr(op, "_enable_pyobj_dispatch"):  # since torch 2.14; custom_op does it too
            op._enable_pyobj_dispatch()
        return op

    return define


def fake_of(op: OpOverload) -> Callable[[Callable], Callable]:
    """The function below says what ``op`` returns, for tensors without data."""
    return torch.library.register_fake(op.name(), lib=_library)


def differentiate(op: OpOverload, backward: Callable, setup_context: Callable | None = None) -> None:
    """Give ``op`` a gradient.

    As ``torch.library.register_autograd`` does, which asks the schema for every default in each call: that takes longer
    than most kernels.
    """
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def below(keyset, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx, keyset, *arguments):
        results = below(keyset, *arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, results)
        return results

    methods = {"forward": forward, "backward": lambda ctx, *grads: (None, *backward(ctx, *grads))}
    name = f"GeneratedBackwardFor_{op.name().replace('::', '_')}_default"
    function = type(name, (torch.autograd.Function,), {key: staticmethod(of) for key, of in methods.items()})

    def autograd(keyset, *arguments):
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return below(keyset, *arguments)
        # The dispatcher leaves out what equals its default.
        return function.apply(keyset, *arguments, *defaults[len(arguments) :])

    _library.impl(op.name(), autograd, "Autograd", with_keyset=True)


def no_second_derivative(op: str) -> Callable[..., None]:
    """The backward of a backward."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{op} has no second derivative in its kernels; backend='reference' has one")

    return refuse
