"""The text tokens among themselves, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fusekern import ops
from fusekern.backends import check_name
from fusekern.nn._attributes import affine


class TextTransformer(nn.Module):
    """Post-norm transformer block (the paper's Former): self-attention, then a feed-forward network with GELU.

    It runs the op ``former`` on its children's weights; the children's own ``forward`` is not called.

    Args:
        channels: C.
        heads: attention heads.
        ffn_ratio: hidden width of the feed-forward network over C.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Shape: ``[B, K, C]`` to ``[B, K, C]``.
    """

    def __init__(self, channels: int, heads: int = 8, ffn_ratio: int = 2, *, backend: str = "auto") -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, ffn_ratio * channels)
        self.down = nn.Linear(ffn_ratio * channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.heads = heads
        self.backend = check_name(backend)

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.former(tokens, *self.parts(), heads=self.heads, eps=self.norm1.eps, backend=self.backend)

    def parts(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Weight and bias of each child, in the order in which the op takes them."""
        children = self._modules
        return tuple([affine(children[name]) for name in ("qkv", "out", "norm1", "up", "down", "norm2")])

    def extra_repr(self) -> str:
        return f"heads={self.heads}, backend={self.backend!r}"
