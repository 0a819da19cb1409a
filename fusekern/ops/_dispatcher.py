"""How the ops with kernels are known to PyTorch.

Behind a public op with kernels stands an op of the dispatcher whose schema carries the backend's name; another is its
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_

import torch
from torch._ops import OpOverload

_library = torch.library.Library("fusekern", "FRAGMENT")


class KernelOp:
    """An op of the dispatcher, ``torch.ops.fusekern.<name>``.

    A call goes by way of the dispatcher only where somebody listens there: it reaches a body in Python through two
    layers in Python, which take longer than most kernels.
    """

    def __init__(self, op: OpOverload, body: Callable) -> None:
        self.op, self.body = op, body
        self.function: type[torch.autograd.Function] | None = None
        self.defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def __call__(self, *arguments: object) -> object:
        if _somebody_listens(arguments):
            return self.op(*arguments)
        if self.function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self.apply(None, *arguments)
        return self.body(*arguments)

    def apply(self, keyset: torch._C.DispatchKeySet | None, *arguments: object) -> object:
        """With a gradient. Without ``keyset`` the body is called, with it the dispatcher's next kernel."""
        # The dispatcher leaves out what equals its default.
        return self.function.apply(keyset, *arguments, *self.defaults[len(arguments) :])

    def below(self, keyset: torch._C.DispatchKeySet | None, *arguments: object) -> object:
        """Without a gradient."""
        if keyset is None:
            return self.body(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


# All keys of a tensor but those of memory on a CPU or a GPU, of gradients and of autocast, as bits.
_OTHER = ~reduce(
    or_,
    [
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)).raw_repr()
        for key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")
    ],
)


# Lists are of numbers. What else there is among an op's arguments may be a tensor that overrides what is done with it.
_PLAIN = {torch.Tensor, torch.nn.Parameter, int, float, bool, str, list, type(None)}


def _somebody_listens(arguments: tuple[object, ...]) -> bool:
    """Would the dispatcher do more than call the body?

    So it would under a trace, a mode, a profile or ``vmap``, as of ``is_grads_batched``, for a subclass, and for a
    tensor whose numbers are to be read with the other sign.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, arguments))
        or any([torch._C._dispatch_keys(it).raw_repr() & _OTHER for it in arguments if isinstance(it, torch.Tensor)])
    )


def kernel_op(name: str, schema: str) -> Callable[[Callable], KernelOp]:
    """Make the function below ``torch.ops.fusekern.<name>``, on every device; its results are new tensors.

    As ``torch.library.custom_op`` does, without what that checks in each call.
    """

    def define(body: Callable) -> KernelOp:
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, torch._disable_dynamo(body), "CompositeExplicitAutograd")
        op = getattr(torch.ops.fusekern, name).default
        if hasattr(op, "_enable_pyobj_dispatch"):  # since torch 2.14; custom_op does it too
            op._enable_pyobj_dispatch()
        return KernelOp(op, body)

    return define


def fake_of(kernel: KernelOp) -> Callable[[Callable], Callable]:
    """The function below says what an op returns, for tensors without data."""
    return torch.library.register_fake(kernel.op.name(), lib=_library)


def differentiate(kernel: KernelOp, backward: Callable, setup_context: Callable | None = None) -> None:
    """Give an op a gradient.

    As ``torch.library.register_autograd`` does, which asks the schema for every default in each call: that takes longer
    than most kernels.
    """

    def forward(ctx, keyset, *arguments):
        results = kernel.below(keyset, *arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, results)
        return results

    methods = {"forward": forward, "backward": lambda ctx, *grads: (None, *backward(ctx, *grads))}
    name = kernel.op.name()
    function = f"GeneratedBackwardFor_{name.replace('::', '_')}_default"
    kernel.function = type(function, (torch.autograd.Function,), {key: staticmethod(of) for key, of in methods.items()})

    def autograd(keyset, *arguments):
        learns = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        return (kernel.apply if learns else kernel.below)(keyset, *arguments)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def no_second_derivative(op: str) -> Callable[..., None]:
    """The backward of a backward: kernels have none, and a gradient that is left out would be wrong without a word."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{op} has no second derivative in its kernels; backend='reference' has one")

    return refuse
