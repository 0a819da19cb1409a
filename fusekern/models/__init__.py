"""Whole systems made of modules: a backbone, the text of the class names, the guidance, and a head."""

from fusekern.models.backbones import Backbone, build_backbone
from fusekern.models.guidance import ConvFormerGuidance, NoGuidance
from fusekern.models.segmenter import Segmenter, SegmenterOutput, build_segmenter
from fusekern.models.text import TextEmbeddings, embed_names

__all__ = [
    "Backbone",
    "ConvFormerGuidance",
    "NoGuidance",
    "Segmenter",
    "SegmenterOutput",
    "TextEmbeddings",
    "build_backbone",
    "build_segmenter",
    "embed_names",
]
