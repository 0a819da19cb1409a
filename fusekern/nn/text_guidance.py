"""The fusion layer between somebody else's encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fusekern.nn.convformer import ConvFormer


class TextLinear(nn.Linear):
    """Trainable map of the embeddings to the width of the layer; orthogonal at first, so that it keeps their angles."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)


class TextGuidance(nn.Module):
    """An encoder's last feature, corrected by text: same shape out as in, so that it fits in front of any decoder.

    >>> model = smp.Unet("resnet18", classes=len(text))
    >>> model.decoder = nn.Sequential(TextGuidance(ConvFormer(512), text), model.decoder)

    The text reaches the width C of the layer by one linear map, or unchanged where it has that width already. The image
    passes the layer as it is, or, for an encoder of another width, beside it:

        I' = I + expand(layer(reduce(I), T))    with 1x1 convolutions, the first with batch norm

    The score map is what ``layer`` returns; a forward hook on ``layer`` hands it to an auxiliary loss.

    Args:
        layer: the Conv-Former, of width C.
        text: embeddings ``[K, D]`` of the class names, floating point; kept as a buffer in fp32 and saved with the
            weights.
        channels: width of the encoder's last feature, if it is not C.

    Raises:
        ValueError: text is not ``[K, D]``.
    """

    def __init__(self, layer: ConvFormer, text: Tensor, channels: int | None = None) -> None:
        super().__init__()
        if text.dim() != 2 or not text.is_floating_point():
            raise ValueError(f"text must be [K, D], floating point; got {list(text.shape)}, {text.dtype}")
        width = layer.channels
        self.layer = layer
        self.channels = width if channels is None else channels
        self.register_buffer("text", text.detach().clone().float())
        self.projection = nn.Identity() if text.shape[1] == width else TextLinear(text.shape[1], width)
        if self.channels == width:
            self.reduce = self.expand = None
        else:
            self.reduce = nn.Sequential(nn.Conv2d(self.channels, width, 1, bias=False), nn.BatchNorm2d(width))
            self.expand = nn.Conv2d(width, self.channels, 1)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Guide one feature, or the last of several.

        Args:
            features: ``[B, channels, H, W]``, or a list or tuple of levels that ends with it.

        Returns:
            the same shape; for several levels a list, all but the last untouched.

        Raises:
            ValueError: neither a tensor nor a list or tuple of them, or the feature has another shape.
        """
        if isinstance(features, (list, tuple)):
            *levels, last = features
            return [*levels, self._guide(last)]
        return self._guide(features)

    def _guide(self, image: Tensor) -> Tensor:
        if not isinstance(image, Tensor):
            raise ValueError(f"features must be a tensor or a list or tuple of tensors, got {type(image).__name__}")
        if image.dim() != 4 or image.shape[1] != self.channels:
            raise ValueError(
                f"the last feature must be [B, C, H, W] with C = {self.channels}, got {list(image.shape)}; for an "
                "encoder of another width than the layer give channels="
            )
        text = self.projection(self.text)
        if self.reduce is None:
            return self.layer(image, text).image
        return image + self.expand(self.layer(self.reduce(image), text).image)
