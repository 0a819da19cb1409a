"""Language-guided semantic segmentation with a fast fusion layer.

``ConvFormer`` lets text embeddings and image features correct each other; ``fusekern.ops`` holds the functions that it
is made of, ``fusekern.nn`` its parts. This import needs torch and numpy alone.
"""

from fusekern import nn, ops
from fusekern._version import __version__
from fusekern.backends import use_backend
from fusekern.errors import FusekernError
from fusekern.nn import ConvFormer, ConvFormerOutput, SemanticFPN

__all__ = ["ConvFormer", "ConvFormerOutput", "FusekernError", "SemanticFPN", "__version__", "nn", "ops", "use_backend"]
