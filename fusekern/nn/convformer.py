"""The fusion layer: image features and text embeddings correct each other, block by block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fusekern import ops
from fusekern.backends import is_reference
from fusekern.nn._attributes import affine, children_of, is_plain, is_plain_affine
from fusekern.nn._backend import HasBackend
from fusekern.nn.bridges import ImageToTextBridge, TextToImageBridge
from fusekern.nn.inverted_bottleneck import InvertedBottleneck
from fusekern.nn.text_transformer import TextTransformer
from fusekern.ops._check import check_alike, check_choice, check_heads, check_tensors
from fusekern.ops.inverted_bottleneck import Recipe

PRESETS = {
    "paper": {},
    "small": {"channels": 256, "downsample": "depthwise"},
}


class ConvFormerOutput(NamedTuple):
    """What ``ConvFormer`` returns.

    Args:
        image: ``[B, C, H, W]``, the features I'.
        text: ``[B, K, C]``, the text tokens T', which depend on the image.
        score: ``[B, K, H, W]``, the score map of I' and T'.
    """

    image: Tensor
    text: Tensor
    score: Tensor


# torch.export.save refuses a named tuple without a name to write; torch.export.load then wants fusekern imported.
_pytree._register_namedtuple(ConvFormerOutput, serialized_type_name="fusekern.nn.ConvFormerOutput")


class ConvFormer(HasBackend):
    """Conv-Former: N blocks in which text tokens and image features exchange what they know, and a score map.

        [T', I'] = blocks([T, I]) + [T, I]      (equation 1; one skip around all blocks)
        S = I' T'^T                             (equation 2; cosine if ``normalize``)

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3. The defaults are the paper's,
    completed where it is silent by what fits its GFLOPs: 52.2 M parameters at C = 512.

    The weights start as PyTorch initialises each child: every standard deviation follows the fan-in, so that one rule
    serves every C, and is 0.026 for the linear maps at C = 512, next to the 0.02 that is usual there.

    Args:
        channels: C, the width of the image features and of the text embeddings.
        blocks: number of blocks; 0 leaves image and text as they are.
        bridge_heads: attention heads of both bridges.
        text_heads: attention heads among the text tokens.
        expansion: hidden channels of the inverted bottleneck over C.
        ffn_ratio: hidden width of the feed-forward network on the text tokens over C.
        downsample: ``"conv"`` (full, the paper's) or ``"depthwise"``.
        pad: rows and columns beyond a multiple of 3 are dropped (``"floor"``) or completed with zeros (``"ceil"``) on
            their way to the text. A side below 3 is always completed.
        bridge: ``"attention"`` (the paper's) or ``"inner_product"`` (its ablation, see ``fusekern.nn.bridges``).
        outer_residual: the skip of equation 1.
        normalize: cosine score map, in [-1, 1]; false is the literal equation 2, of the order of 100 at C = 512.
        text_scale: factor on the text as it enters the blocks; ``channels ** 0.5`` brings unit-length embeddings to the
            length that layer normalisation gives the tokens later.
        memory: ``"low"`` keeps less of each block for the backward, where a kernel runs, and computes its expansion
            twice: a sixth more work at the paper's sizes.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``. As an attribute it may be set
            later, here for the whole layer or on one of its parts.

    Raises:
        ValueError: an option outside its choices, or heads that do not divide ``channels``.
    """

    def __init__(
        self,
        channels: int = 512,
        *,
        blocks: int = 6,
        bridge_heads: int = 8,
        text_heads: int = 8,
        expansion: int = 6,
        ffn_ratio: int = 2,
        downsample: str = "conv",
        pad: str = "floor",
        bridge: str = "attention",
        outer_residual: bool = True,
        normalize: bool = True,
        text_scale: float = 1.0,
        memory: str = "default",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1),
            ("blocks", blocks, 0),
            ("expansion", expansion, 1),
            ("ffn_ratio", ffn_ratio, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        for name, heads in (("bridge_heads", bridge_heads), ("text_heads", text_heads)):
            check_heads(channels, heads, name)
        self.blocks = nn.ModuleList(
            ConvFormerBlock(
                channels,
                bridge_heads=bridge_heads,
                text_heads=text_heads,
                expansion=expansion,
                ffn_ratio=ffn_ratio,
                downsample=downsample,
                pad=pad,
                bridge=bridge,
                memory=memory,
                backend=backend,
            )
            for _ in range(blocks)
        )
        self.channels = channels
        self.pad = pad
        self.outer_residual = outer_residual
        self.normalize = normalize
        self.text_scale = text_scale
        self.backend = backend
        self._warned = False

    @classmethod
    def preset(cls, name: str, **overrides: object) -> ConvFormer:
        """A layer of a known size.

        Args:
            name: ``"paper"`` (C = 512, 6 blocks, 52.2 M parameters) or ``"small"`` (ours, not the paper's: C = 256 with
                a depthwise down-sampling convolution, 9.6 M).
            overrides: any argument of the class.

        Raises:
            ValueError: there is no such preset.
        """
        check_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **overrides})

    def forward(self, image: Tensor, text: Tensor) -> ConvFormerOutput:
        """Let image and text correct each other.

        Args:
            image: ``[B, C, H, W]``, floating point, any strides.
            text: ``[B, K, C]``, or ``[K, C]`` for one text that all images share.

        Raises:
            ValueError: wrong shape, device or dtype.
        """
        check_tensors(image=image, text=text)
        if image.dim() != 4 or image.shape[1] != self.channels:
            raise ValueError(f"image must be [B, C, H, W] with C = {self.channels}; got shape {list(image.shape)}")
        if text.dim() not in (2, 3) or text.shape[-1] != self.channels:
            raise ValueError(
                f"text must be [K, C] or [B, K, C] with C = {self.channels}, the channels of the layer; got shape "
                f"{list(text.shape)}, whose width is {text.shape[-1]}"
            )
        if text.shape[-2] == 0:
            raise ValueError(f"text must hold at least one token; got shape {list(text.shape)}")
        check_alike(image=image, text=text)
        if text.dim() == 2:
            text = text.expand(image.shape[0], -1, -1)
        if text.shape[0] != image.shape[0]:
            raise ValueError(f"text is for {text.shape[0]} images, image holds {image.shape[0]}")
        self._warn_of_one_token(image)
        if self.blocks:
            image, text = self._fuse(image, text)
        return ConvFormerOutput(image, text, ops.score_map(image, text, normalize=self.normalize, backend=self.backend))

    def _fuse(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text = text * self.text_scale
        new_image, new_text = image, text
        query = None
        blocks = list(self.blocks)
        for block, following in zip_longest(blocks, blocks[1:]):
            new_image, new_text, query = block(new_image, new_text, query, following)
        if self.outer_residual:
            return new_image + image, new_text + text
        return new_image, new_text

    def _warn_of_one_token(self, image: Tensor) -> None:
        if torch.compiler.is_compiling() or self._warned or not self.blocks:
            return
        if ops.downsampled_size(*image.shape[2:], self.pad) == (1, 1):
            self._warned = True
            warnings.warn(
                f"a feature map of {image.shape[2]}x{image.shape[3]} leaves the text one image token, and attention "
                "over one token learns nothing: use crops of at least 192 pixels a side, or an output stride of 16",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, outer_residual={self.outer_residual}, normalize={self.normalize}, "
            f"text_scale={self.text_scale}, backend={self.backend!r}"
        )


class ConvFormerBlock(HasBackend):
    """One block (sections 3.2 and 3.3): the text gathers from the image, both go their own way, the image gathers back.

        T1 = ImageToTextBridge(T, I)
        T2 = TextTransformer(T1)      I2 = InvertedBottleneck(I)      (independent of each other)
        I3 = TextToImageBridge(I2, T2)

    Args: see ``ConvFormer``.

    Shape: image ``[B, C, H, W]`` and text ``[B, K, C]``, to the same and none. As one of a stack it may be told the
    block that follows, whose query, ``W^Q`` of the new text, it then computes along with its own keys and values, and
    returns instead of none, ``[B, K, C]``: that one takes it as ``query``.

    The bottleneck's image is not kept for the backward of the last bridge, which makes it again, unless a forward hook
    on the bottleneck may have changed it.

    Between the bridges' attentions the op ``text_path`` runs on the children's weights. Where one of them is another
    module (an adapter around it, a layer without bias) or has hooks, and with ``backend="reference"``, bridges and
    transformer are called one by one, and their children run themselves where they must.
    """

    def __init__(
        self,
        channels: int,
        *,
        bridge_heads: int = 8,
        text_heads: int = 8,
        expansion: int = 6,
        ffn_ratio: int = 2,
        downsample: str = "conv",
        pad: str = "floor",
        bridge: str = "attention",
        memory: str = "default",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.image_to_text = ImageToTextBridge(
            channels, bridge_heads, downsample=downsample, pad=pad, bridge=bridge, backend=backend
        )
        self.transformer = TextTransformer(channels, text_heads, ffn_ratio, backend=backend)
        self.bottleneck = InvertedBottleneck(channels, expansion, memory=memory, backend=backend)
        self.text_to_image = TextToImageBridge(channels, bridge_heads, bridge=bridge, backend=backend)

        self.bridge = bridge
        self.backend = backend

    def forward(
        self, image: Tensor, text: Tensor, query: Tensor | None = None, following: ConvFormerBlock | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        first, transformer, bottleneck, last = children_of(
            self, "image_to_text", "transformer", "bottleneck", "text_to_image"
        )
        plain = None
        if self.bridge == "attention" and not is_reference(self.backend):
            plain = _text_parts(first, transformer, last)
        if plain is None:
            text = transformer(first(text, image))
            return last(bottleneck(image), text), text, None
        parts, eps = plain
        with _beside(image) as apart:
            with apart:
                wide, recipe = _and_recipe(bottleneck, image)
            path = ops.text_path(
                *(text, first.gather(first.query(text) if query is None else query, image)),
                *parts,
                _awaited_query(following),
                heads=transformer.heads,
                eps=eps,
                backend=self.backend,
            )
        return last.scatter(wide, path.key, path.value, recipe), path.tokens, path.query


def _text_parts(first: nn.Module, transformer: nn.Module, last: nn.Module) -> tuple[tuple, float] | None:
    """What ``text_path`` takes of the modules between the attentions, and eps; none if it does not do what they do."""
    if not (
        is_plain(first, ImageToTextBridge)
        and is_plain(transformer, TextTransformer)
        and is_plain(last, TextToImageBridge)
    ):
        return None
    out, norm = children_of(first, "out", "norm")
    key, value = children_of(last, "key", "value")
    for linear in (out, key, value):
        if not is_plain_affine(linear, nn.Linear):
            return None
    if not (is_plain_affine(norm, nn.LayerNorm) and transformer.eps_for_op() == norm.eps):
        return None
    return (affine(out), affine(norm), transformer.parts(), affine(key), affine(value)), norm.eps


def _awaited_query(following: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    """W^Q of the block that follows, if nothing comes between that may change the text."""
    if following is None or not is_plain(following, ConvFormerBlock):
        return None
    bridge = following._modules["image_to_text"]
    if not is_plain(bridge, ImageToTextBridge):
        return None
    query = bridge._modules["query"]
    return affine(query) if is_plain_affine(query, nn.Linear) else None


def _and_recipe(bottleneck: nn.Module, image: Tensor) -> tuple[Tensor, Recipe | None]:
    """What the bottleneck makes of an image, and how to make it again, unless somebody may have changed it since."""
    hooked = bottleneck._forward_hooks or torch.nn.modules.module._global_forward_hooks
    own = "forward" in bottleneck.__dict__ or type(bottleneck).forward is not InvertedBottleneck.forward
    if hooked or own:
        return bottleneck(image), None
    recipes = []
    wide = bottleneck(image, recipes=recipes)
    recipe = recipes.pop() if recipes else None
    return wide, recipe if recipe is not None and recipe.result is wide else None


@contextmanager
def _beside(image: Tensor) -> Iterator[AbstractContextManager]:
    """For work beside other work: a stream of its own while a CUDA graph is captured, joined at the end.

    Only there: eagerly two streams cost more host time than they hide, and memory would have to outlive its stream.
    """
    if torch.compiler.is_compiling() or not (image.is_cuda and torch.cuda.is_current_stream_capturing()):
        yield nullcontext()
        return
    main, side = torch.cuda.current_stream(image.device), _side_stream(image.device)
    side.wait_stream(main)
    yield torch.cuda.stream(side)
    main.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
