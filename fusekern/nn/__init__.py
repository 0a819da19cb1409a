"""Drop-in modules made of the ops; their children are ordinary ``torch.nn`` modules, and so are their state dicts."""

from fusekern.nn.bridges import ImageToTextBridge, TextToImageBridge
from fusekern.nn.convformer import ConvFormer, ConvFormerBlock, ConvFormerOutput
from fusekern.nn.inverted_bottleneck import InvertedBottleneck
from fusekern.nn.inverted_residual import FusedInvertedResidual, fuse_inverted_residuals
from fusekern.nn.semantic_fpn import FeaturePyramid, SemanticFPN
from fusekern.nn.text_guidance import TextGuidance, TextLinear
from fusekern.nn.text_transformer import TextTransformer

__all__ = [
    "ConvFormer",
    "ConvFormerBlock",
    "ConvFormerOutput",
    "FeaturePyramid",
    "FusedInvertedResidual",
    "ImageToTextBridge",
    "InvertedBottleneck",
    "SemanticFPN",
    "TextGuidance",
    "TextLinear",
    "TextToImageBridge",
    "TextTransformer",
    "fuse_inverted_residuals",
]
