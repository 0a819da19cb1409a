"""The text tokens among themselves, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fusekern import ops
from fusekern.nn._attributes import affine, children_of, is_plain_affine
from fusekern.nn._backend import HasBackend
from fusekern.ops.former import former_by

# The children in the order in which the op takes them.
PARTS = {
    "qkv": nn.Linear,
    "out": nn.Linear,
    "norm1": nn.LayerNorm,
    "up": nn.Linear,
    "down": nn.Linear,
    "norm2": nn.LayerNorm,
}


class TextTransformer(HasBackend):
    """Post-norm transformer block (the paper's Former): self-attention, then a feed-forward network with GELU.

    It runs the op ``former`` on its children's weights. Where a child is another module (an adapter around it, a layer
    without bias) or has hooks, the children run themselves.

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
        self.backend = backend

    def forward(self, tokens: Tensor) -> Tensor:
        eps = self.eps_for_op()
        if eps is not None:
            return ops.former(tokens, *self.parts(), heads=self.heads, eps=eps, backend=self.backend)
        return former_by(tokens, *children_of(self, *PARTS), heads=self.heads)

    def eps_for_op(self) -> float | None:
        """The eps with which the op does what the children do; none if it does not."""
        children = self._modules
        for name, kind in PARTS.items():
            if not is_plain_affine(children[name], kind):
                return None
        eps = children["norm1"].eps
        return eps if eps == children["norm2"].eps else None

    def parts(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Weight and bias of each child, in the order in which the op takes them."""
        return tuple([affine(child) for child in children_of(self, *PARTS)])

    def extra_repr(self) -> str:
        return f"heads={self.heads}, backend={self.backend!r}"
