"""Data sets: their description, their files, the training transforms, and the built-in scenes."""

from fusekern.data.folder import Sample, SegmentationFolder
from fusekern.data.spec import DatasetSpec, Split, load_spec

__all__ = ["DatasetSpec", "Sample", "SegmentationFolder", "Split", "load_spec"]
