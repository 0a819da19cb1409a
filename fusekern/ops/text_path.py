"""The textual path of a block: from the attention of one bridge to that of the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekern.backends import register, resolve
from fusekern.ops._check import autocast_enabled, check_affines, check_alike, check_heads, check_shape, check_tokens
from fusekern.ops._dispatcher import differentiate, fake_of, kernel_op, no_second_derivative
from fusekern.ops._kernel import empty_tokens, follow_autocast, launch
from fusekern.ops._limits import cpp_linear, slow_bf16
from fusekern.ops.former import PARAMETERS as FORMER_PARAMETERS
from fusekern.ops.former import Affine, affines_of_former, former_reference, why_not_triton


class TextPath(NamedTuple):
    """What ``text_path`` returns, each ``[B, K, C]``.

    Args:
        tokens: the text tokens.
        key: what ``former2conv`` takes as keys.
        value: and as values.
        query: what ``conv2former`` of the next block takes; none where no weight is given.
    """

    tokens: Tensor
    key: Tensor
    value: Tensor
    query: Tensor | None


def text_path_reference(
    tokens: Tensor,
    gathered: Tensor,
    entry: Affine,
    norm0: Affine,
    former: tuple[Affine, ...],
    key: Affine,
    value: Affine,
    query: Affine | None,
    *,
    heads: int,
    eps: float = 1e-5,
) -> TextPath:
    """Plain PyTorch; see ``text_path``."""
    tokens = F.layer_norm(tokens + F.linear(gathered, *entry), tokens.shape[2:], *norm0, eps)
    tokens = former_reference(tokens, *former, heads=heads, eps=eps)
    following = None if query is None else F.linear(tokens, *query)
    return TextPath(tokens, F.linear(tokens, *key), F.linear(tokens, *value), following)


_PARAMETERS = ", ".join(
    [
        *("Tensor entry_weight, Tensor entry_bias, Tensor gain0, Tensor shift0", FORMER_PARAMETERS),
        *("Tensor key_weight, Tensor key_bias, Tensor value_weight, Tensor value_bias",),
        "Tensor? query_weight, Tensor? query_bias",
    ]
)
_EXITS = 18  # behind tokens, what was gathered and 16 parameters: weights and biases of key, value and query
_SAVED = ("sums0", "qkv", "mixed", "lse", "sums1", "hidden", "sums2", "moments")


def _empty(tokens: Tensor, up_weight: Tensor, query: bool, heads: int) -> tuple[Tensor, ...]:
    """The results and what the backward needs: 7 C + F numbers for a token, and a few in fp32."""
    batch, count, channels = tokens.shape
    return (
        *(empty_tokens(tokens) for _ in range(3)),
        empty_tokens(tokens) if query else tokens.new_empty(0),
        empty_tokens(tokens),
        tokens.new_empty(batch, count, 3 * channels),
        empty_tokens(tokens),
        tokens.new_empty((batch, heads, count), dtype=torch.float32),
        empty_tokens(tokens),
        tokens.new_empty(batch, count, up_weight.shape[0]),
        empty_tokens(tokens),
        tokens.new_empty((6, batch * count), dtype=torch.float32),
    )


@kernel_op(
    "text_path",
    f"(Tensor tokens, Tensor gathered, {_PARAMETERS}, int heads, float eps, str backend) "
    f"-> ({', '.join(['Tensor'] * 12)})",
)
def _text_path(tokens, gathered, *arguments):
    *parameters, heads, eps, backend = arguments
    results = _empty(tokens, parameters[10], parameters[20] is not None, heads)
    if tokens.numel():
        launch(backend, "text_path", "fwd", tokens, gathered, *parameters, heads, eps, *results)
    return results


@fake_of(_text_path)
def _(tokens, gathered, *arguments):
    return _empty(tokens, arguments[10], arguments[20] is not None, arguments[22])


@kernel_op(
    "text_path_backward",
    f"(Tensor grad, Tensor dkey, Tensor dvalue, Tensor dquery, Tensor gathered, {_PARAMETERS}, Tensor out, "
    f"{', '.join(f'Tensor {name}' for name in _SAVED)}, int heads, str backend) -> ({', '.join(['Tensor'] * 24)})",
)
def _text_path_backward(grad, dkey, dvalue, dquery, gathered, *arguments):
    *tensors, heads, backend = arguments
    parameters, saved = tensors[:22], tensors[22:]
    gradients = _gradients(grad, gathered, parameters)
    if grad.numel():
        weights = [parameters[i] for i in (0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 16, 18, 20)]
        if parameters[20] is None:
            dquery, present = None, (*gradients[:-2], None, None)
        else:
            present = gradients
        launch(backend, "text_path", "bwd", grad, dkey, dvalue, dquery, gathered, *weights, *saved, heads, *present)
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients


def _gradients(grad: Tensor, gathered: Tensor, parameters: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Uninitialised, of the tokens, what was gathered and the parameters; empty for those that are not there."""
    present = (grad, gathered, *parameters)
    return tuple(grad.new_empty(0) if tensor is None else empty_tokens(tensor) for tensor in present)


@fake_of(_text_path_backward)
def _(grad, dkey, dvalue, dquery, gathered, *arguments):
    return _gradients(grad, gathered, arguments[:22])


def _setup_context(ctx, inputs, output):
    _, gathered, *parameters, ctx.heads, _, ctx.backend = inputs
    ctx.save_for_backward(gathered, *parameters, output[0], *output[4:])
    ctx.mark_non_differentiable(*output[4:])
    ctx.set_materialize_grads(False)  # zeros for all that is kept would be eight launches


def _backward(ctx, *grads):
    saved = ctx.saved_tensors
    out, no_query = saved[23], saved[21] is None
    if all(grad is None for grad in grads):
        return (None,) * 27
    unused = [i for i, grad in enumerate(grads[1:4]) if grad is None or (i == 2 and no_query)]
    grads = [torch.zeros_like(out) if grad is None else grad for grad in grads[: 3 if no_query else 4]]
    grads += [out.new_empty(0)] * no_query
    gradients = list(_text_path_backward(*grads, *saved, ctx.heads, ctx.backend))
    for i in unused:  # an optimizer would let weights decay whose gradient is zero
        gradients[_EXITS + 2 * i : _EXITS + 2 * i + 2] = None, None
    return (*gradients, None, None, None)


differentiate(_text_path, _backward, _setup_context)
differentiate(_text_path_backward, no_second_derivative("text_path"))


def _why_not_triton(tokens, gathered, entry, norm0, former, key, value, query, heads, eps):
    reasons = why_not_triton(tokens, *former, heads, eps)
    biases = {bias.dtype for _, bias in filter(None, (key, value, query))}
    if len(biases) > 1:  # one kernel chooses among them
        reasons.append("biases of key, value and query that differ in dtype")
    return reasons


def _why_not_cpp(tokens, gathered, entry, norm0, former, key, value, query, heads, eps):
    parts = [part for pair in (entry, norm0, *former, key, value, query) if pair is not None for part in pair]
    return cpp_linear([tokens, gathered], parts)


register("text_path", "cpp", _why_not_cpp, slow_bf16)
register("text_path", "triton", _why_not_triton)


def text_path(
    tokens: Tensor,
    gathered: Tensor,
    entry: Affine,
    norm0: Affine,
    former: tuple[Affine, ...],
    key: Affine,
    value: Affine,
    query: Affine | None = None,
    *,
    heads: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> TextPath:
    """All that a block does with its text between the two attentions over the image.

        T1 = LN0(T + W_entry G)       the end of Conv2Former; G is what ``conv2former`` gathered
        T' = former(T1)
        K, V = W_key T', W_value T'   the beginning of Former2Conv
        Q = W_query T'                the beginning of the next block's Conv2Former

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.2, equations 3 and 4. One op,
    because its seams are what a kernel saves: a sum, a norm and four linear layers, each too small for a launch.

    Args:
        tokens: ``[B, K, C]``, floating point, any strides.
        gathered: ``[B, K, C]``.
        entry: weight ``[C, C]`` and bias ``[C]``.
        norm0: weight ``[C]`` and bias ``[C]``.
        former: the six pairs ``qkv, out, norm1, up, down, norm2`` that ``fusekern.ops.former`` takes.
        key: weight ``[C, C]`` and bias ``[C]``.
        value: weight ``[C, C]`` and bias ``[C]``.
        query: weight ``[C, C]`` and bias ``[C]``, or none.
        heads: number of heads among the tokens.
        eps: added to the variance of all three norms.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``tokens``, ``key``, ``value`` and ``query``, each ``[B, K, C]``; ``query`` is none where its weight is.

    Raises:
        ValueError: wrong shape, device or dtype, no token, or ``heads`` that do not divide ``C``.
        FusekernError: the backend was asked for by name and cannot run.
    """
    check_shape("tokens", tokens, "B K C")
    check_tokens("tokens", tokens)
    batch, count, channels = tokens.shape
    check_shape("gathered", gathered, "B K C", B=batch, K=count, C=channels)
    check_alike(tokens=tokens, gathered=gathered)
    check_heads(channels, heads)
    square = channels, channels
    check_affines(
        tokens,
        entry=(entry, square),
        norm0=(norm0, (channels,)),
        **affines_of_former(channels, *former),
        key=(key, square),
        value=(value, square),
        **({} if query is None else {"query": (query, square)}),
    )
    if autocast_enabled(tokens.device.type):
        qkv, out, norm1, up, down, norm2 = former
        # Vectors keep their dtype: they are added to sums in fp32.
        linears = [entry, qkv, out, up, down, key, value, *([query] if query else [])]
        tokens, gathered, *weights = follow_autocast(tokens, gathered, *(weight for weight, _ in linears))
        entry, qkv, out, up, down, key, value, *others = zip(weights, (bias for _, bias in linears), strict=True)
        query, former = others[0] if others else None, (qkv, out, norm1, up, down, norm2)
    arguments = tokens, gathered, entry, norm0, former, key, value, query
    backend = resolve("text_path", backend, *arguments, heads, eps)
    if backend == "reference":
        results = text_path_reference(*arguments, heads=heads, eps=eps)
        return TextPath(*(result if result is None else result.to(tokens.dtype) for result in results))
    parts = [part for pair in (entry, norm0, *former, key, value) for part in pair]
    results = _text_path(tokens, gathered, *parts, *(query or (None, None)), heads, float(eps), backend)[:4]
    return TextPath(*results[:3], None if query is None else results[3])
