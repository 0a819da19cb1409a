"""The functions that the fusion layer is made of: tensors in, new tensors out, no state. One op a file."""

from fusekern.ops.conv2former import conv2former
from fusekern.ops.downsample import downsample, downsampled_size
from fusekern.ops.former import former
from fusekern.ops.former2conv import former2conv
from fusekern.ops.inverted_bottleneck import BatchNorm, BatchStatistics, inverted_bottleneck
from fusekern.ops.score_map import score_map
from fusekern.ops.text_path import TextPath, text_path

__all__ = [
    "BatchNorm",
    "BatchStatistics",
    "TextPath",
    "conv2former",
    "downsample",
    "downsampled_size",
    "former",
    "former2conv",
    "inverted_bottleneck",
    "score_map",
    "text_path",
]
