"""The two ways across: image to text and text to image.

``bridge="inner_product"`` is the paper's ablation (section 4.4, figure 3) as we read it, for no formula is given: the
same bridges without softmax and without projections, ``A = (Q K^T / N) V`` per head with N the number of keys. Nothing
bounds it: in a deep stack the features grow from block to block.
"""

from __future__ import annotations

from torch import Tensor, nn

from fusekern import ops
from fusekern.nn._attributes import affine, is_plain
from fusekern.nn._backend import HasBackend
from fusekern.ops._check import check_choice
from fusekern.ops.downsample import PADS, downsampled_by
from fusekern.ops.former2conv import by_recipe
from fusekern.ops.inverted_bottleneck import Recipe

BRIDGES = ("attention", "inner_product")
DOWNSAMPLES = ("conv", "depthwise")


class ImageToTextBridge(HasBackend):
    """The paper's Conv2Former, equation 3: the text tokens gather from the down-sampled image.

        T' = LN(T + W^O softmax(W^Q T X^T / sqrt(d)) X)    per head of d channels, X = downsample(I)

    Args:
        channels: C.
        heads: attention heads.
        downsample: the 3x3 convolution with stride 3 is full (``"conv"``) or depthwise (``"depthwise"``).
        pad: rows and columns beyond a multiple of 3 are dropped (``"floor"``) or completed with zeros (``"ceil"``).
        bridge: ``"attention"`` or ``"inner_product"``; the latter has no W^Q and no W^O.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Shape: text ``[B, K, C]`` and image ``[B, C, H, W]`` to ``[B, K, C]``.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 8,
        *,
        downsample: str = "conv",
        pad: str = "floor",
        bridge: str = "attention",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("downsample", downsample, DOWNSAMPLES)
        check_choice("bridge", bridge, BRIDGES)
        check_choice("pad", pad, PADS)
        groups = channels if downsample == "depthwise" else 1
        self.downsample = nn.Conv2d(channels, channels, 3, stride=3, groups=groups)
        if bridge == "attention":
            self.query = nn.Linear(channels, channels)
            self.out = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.heads = heads
        self.pad = pad
        self.bridge = bridge
        self.backend = backend

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        if self.bridge == "attention":
            return self.norm(text + self.out(self.gather(self.query(text), image)))
        return self.norm(text + inner_product(text, self.tokens(image).flatten(2).transpose(1, 2), heads=self.heads))

    def gather(self, query: Tensor, image: Tensor) -> Tensor:
        """The attention alone: what ``W^O`` is applied to, ``[B, K, C]``; ``query`` is ``W^Q T``."""
        return ops.conv2former(query, self.tokens(image), heads=self.heads, backend=self.backend)

    def tokens(self, image: Tensor) -> Tensor:
        """The down-sampled image, ``[B, C, h, w]``; by the child itself where it is another module or has hooks."""
        child = self._modules["downsample"]
        known = ((3, 3), (0, 0), (1, 1))
        if not is_plain(child, nn.Conv2d) or (child.stride, child.padding, child.dilation) != known:
            return downsampled_by(child, image, self.pad)
        return ops.downsample(image, *affine(child), pad=self.pad, backend=self.backend)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, pad={self.pad!r}, bridge={self.bridge!r}, backend={self.backend!r}"


class TextToImageBridge(HasBackend):
    """The paper's Former2Conv, equation 4: the pixels gather from the text tokens.

        I' = I + softmax(I (W^K T)^T / sqrt(d)) W^V T    per head of d channels

    Args:
        channels: C.
        heads: attention heads.
        bridge: ``"attention"`` or ``"inner_product"``; the latter has no parameters.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Shape: image ``[B, C, H, W]`` and text ``[B, K, C]`` to ``[B, C, H, W]``.
    """

    def __init__(self, channels: int, heads: int = 8, *, bridge: str = "attention", backend: str = "auto") -> None:
        super().__init__()
        check_choice("bridge", bridge, BRIDGES)
        if bridge == "attention":
            self.key = nn.Linear(channels, channels)
            self.value = nn.Linear(channels, channels)
        self.heads = heads
        self.bridge = bridge
        self.backend = backend

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        if self.bridge == "attention":
            return self.scatter(image, self.key(text), self.value(text))
        pixels = image.flatten(2).transpose(1, 2)
        return image + inner_product(pixels, text, heads=self.heads).transpose(1, 2).reshape(image.shape)

    def scatter(self, image: Tensor, key: Tensor, value: Tensor, recipe: Recipe | None = None) -> Tensor:
        """The attention and its skip; ``key`` and ``value`` are ``W^K T`` and ``W^V T``, the recipe is of the image."""
        return by_recipe(image, recipe, key, value, heads=self.heads, scale=None, backend=self.backend)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, bridge={self.bridge!r}, backend={self.backend!r}"


def inner_product(query: Tensor, keys: Tensor, *, heads: int) -> Tensor:
    """``(Q K^T / N) K`` per head: ``[B, n, C]`` and ``[B, N, C]`` to ``[B, n, C]``."""
    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, keys))  # [B, heads, n or N, d]
    return ((q @ k.transpose(2, 3) / keys.shape[1]) @ k).transpose(1, 2).flatten(2)
