"""A segmenter with the fusion layer as an ONNX file, checked in ONNX Runtime.

    pip install '.[examples]'
    python examples/export_onnx.py segmenter.onnx

The file holds weights, text embeddings and standard operators alone: torch.export takes the ops' references, which are
plain PyTorch. Batch, height and width stay free, but a side needs more than 64 pixels (feature maps below 3 x 3 take
another way through the layer).
"""

import argparse
import copy
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusekern.config import BackboneConfig, DataConfig, GuidanceConfig, HeadConfig, ModelConfig, TextConfig
from fusekern.models import Segmenter, build_segmenter, embed_names
from fusekern.testing import assert_parity

NAMES = ("road", "building", "tree", "car", "sky")


class Logits(nn.Module):
    """RGB images ``[B, 3, H, W]``, values in [0, 1], to logits ``[B, K, H, W]``."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(self.segmenter(image).logits, image.shape[-2:], mode="bilinear")


def build() -> Segmenter:
    text = embed_names(NAMES, TextConfig(source="hash", width=64)).vectors
    guidance = GuidanceConfig(channels=32, blocks=2, bridge_heads=2, text_heads=2)
    model = ModelConfig(BackboneConfig("mobilenetv2_035"), guidance, HeadConfig(16, 16))
    return build_segmenter(model, DataConfig(), len(NAMES), text, seed=0)


def export(model: nn.Module, image: Tensor, file: Path) -> None:
    """Write a model from images to logits into an ONNX file.

    Args:
        model: in eval mode.
        image: ``[B, 3, H, W]`` to trace with, B at least 2: torch.export takes a size of 1 for a constant.
        file: where to.
    """
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (image,), dynamic_shapes=({0: free, 2: free, 3: free},))
    names = {"input_names": ["image"], "output_names": ["logits"]}
    torch.onnx.export(program, dynamo=True, verbose=False, **names).save(file)


def check(model: nn.Module, image: Tensor, file: Path) -> float:
    """Compare a file in ONNX Runtime with the model that it was made of.

    Both round in fp32, in different orders, so the yardstick is float64: ONNX Runtime may be off by twice what PyTorch
    is, in the worse of its two layouts (the rule of ``fusekern.testing``).

    Args:
        model: in eval mode, fp32.
        image: ``[B, 3, H, W]``.
        file: from ``export``.

    Returns:
        the largest difference between the logits of ONNX Runtime and PyTorch.

    Raises:
        AssertionError: ONNX Runtime is off by more.
    """
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
    with torch.no_grad():
        expected = model(image)
        other_order = model(image.to(memory_format=torch.channels_last))
        truth = copy.deepcopy(model).double()(image.double())
    assert_parity(found, [expected, other_order], truth)
    return (found - expected).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where the ONNX file goes")
    parser.add_argument("--size", type=int, default=192, help="side of the images to trace with")
    options = parser.parse_args()
    torch.manual_seed(0)
    # A trained one: Logits(fusekern.engine.checkpoint.load_segmenter("runs/ade").model).
    model = Logits(build()).eval()
    export(model, torch.rand(2, 3, options.size, options.size), options.file)
    for shape in ((2, 3, options.size, options.size), (1, 3, options.size + 32, options.size + 65)):
        print(f"image {list(shape)}: off by {check(model, torch.rand(shape), options.file):.1e} at most")


if __name__ == "__main__":
    main()
