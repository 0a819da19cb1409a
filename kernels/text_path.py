"""The text's side of a block, from one bridge's attention to the other's, forward and backward: former's kernels.

    S0 = T + W_out G + b,   T1 = norm0(S0),   T' = former(T1),   K, V and the next block's Q = linear layers of T'

Alone, the linear layers, the sum and the norm are six launches and as many passes over the tokens. Here the first is
former's first launch, norm0 is applied as its result is read, and the last three are the end of former's chain, one
product, which applies norm2 as it reads and writes T' besides.
"""

from __future__ import annotations

from fusekern.kernels.former import Entry, Exit, backward, forward
from torch import Tensor


def launches() -> dict[str, tuple[str, ...]]:
    """The kernels that forward and backward launch, in their order, whatever the shapes."""
    return {
        "fwd": ("former_fwd_first_kernel", "former_fwd_chain_kernel"),
        "bwd": (
            *("former_bwd_exits_kernel", "former_bwd_chain_kernel", "former_bwd_attention_kernel"),
            *("former_bwd_entry_kernel", "former_bwd_parameters_kernel"),
        ),
    }


def text_path_fwd(
    tokens: Tensor,
    gathered: Tensor,
    entry_weight: Tensor,
    entry_bias: Tensor,
    gain0: Tensor,
    shift0: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    gain2: Tensor,
    shift2: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    heads: int,
    eps: float,
    out: Tensor,
    key: Tensor,
    value: Tensor,
    query: Tensor,
    sums0: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
) -> None:
    """Fills ``out``, ``key``, ``value``, ``query`` (where it has a weight) and what the backward needs.

    That is ``sums0`` ``[B, K, C]``, what ``former_fwd`` fills, and ``moments`` ``[6, B K]``.
    """
    entry = Entry(gathered, entry_weight, entry_bias, gain0, shift0, sums0)
    parts = (qkv_weight, qkv_bias, out_weight, out_bias, gain1, shift1)
    parts += (up_weight, up_bias, down_weight, down_bias, gain2, shift2)
    exits = [Exit(key_weight, key_bias, key), Exit(value_weight, value_bias, value)]
    if query_weight is not None:
        exits.append(Exit(query_weight, query_bias, query))
    forward(tokens, entry, parts, exits, heads, eps, out, qkv, mixed, lse, sums1, hidden, sums2, moments)


def text_path_bwd(
    grad: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dquery: Tensor | None,
    gathered: Tensor,
    entry_weight: Tensor,
    gain0: Tensor,
    shift0: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gain2: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_weight: Tensor | None,
    out: Tensor,
    sums0: Tensor,
    qkv: Tensor,
    mixed: Tensor,
    lse: Tensor,
    sums1: Tensor,
    hidden: Tensor,
    sums2: Tensor,
    moments: Tensor,
    heads: int,
    dtokens: Tensor,
    dgathered: Tensor,
    dentry_weight: Tensor,
    dentry_bias: Tensor,
    dgain0: Tensor,
    dshift0: Tensor,
    dqkv_weight: Tensor,
    dqkv_bias: Tensor,
    dout_weight: Tensor,
    dout_bias: Tensor,
    dgain1: Tensor,
    dshift1: Tensor,
    dup_weight: Tensor,
    dup_bias: Tensor,
    ddown_weight: Tensor,
    ddown_bias: Tensor,
    dgain2: Tensor,
    dshift2: Tensor,
    dkey_weight: Tensor,
    dkey_bias: Tensor,
    dvalue_weight: Tensor,
    dvalue_bias: Tensor,
    dquery_weight: Tensor | None,
    dquery_bias: Tensor | None,
) -> None:
    """Fills the gradients, contiguous, of the shapes that the forward has."""
    entry = Entry(gathered, entry_weight, None, gain0, shift0, sums0)
    weights = (qkv_weight, out_weight, gain1, shift1, up_weight, down_weight, gain2)
    exits = [Exit(key_weight, None, dkey), Exit(value_weight, None, dvalue)]
    dexits = [(dkey_weight, dkey_bias), (dvalue_weight, dvalue_bias)]
    if query_weight is not None:
        exits.append(Exit(query_weight, None, dquery))
        dexits.append((dquery_weight, dquery_bias))
    saved = (qkv, mixed, lse, sums1, hidden, sums2, moments)
    dentry = (dgathered, dentry_weight, dentry_bias, dgain0, dshift0)
    dparts = (dqkv_weight, dqkv_bias, dout_weight, dout_bias, dgain1, dshift1)
    dparts += (dup_weight, dup_bias, ddown_weight, ddown_bias, dgain2, dshift2)
    backward(grad, None, entry, weights, exits, out, *saved, heads, dtokens, dentry, dparts, dexits)
