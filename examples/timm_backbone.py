"""A backbone of timm with a decoder of your own, its last level guided by text; the score map has a loss of its own.

Run ``python examples/timm_backbone.py`` after ``pip install '.[examples]'``.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusekern.config import TextConfig
from fusekern.models import embed_names
from fusekern.nn import ConvFormer, SemanticFPN, TextGuidance

NAMES = ("road", "building", "tree", "car", "sky")


def build() -> nn.Module:
    backbone = timm.create_model("mobilenetv2_100", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4))
    return nn.Sequential(backbone, SemanticFPN(backbone.feature_info.channels(), len(NAMES)))


def guide(model: nn.Module, text: Tensor) -> None:
    # mobilenetv2_100 ends 320 wide: a linear map brings the text there.
    model.insert(1, TextGuidance(ConvFormer(320, blocks=2), text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=192, help="side of the images")
    size = parser.parse_args().size
    torch.manual_seed(0)
    # Hashed names need no download and know no language; source="open_clip" gives CLIP's embeddings, also [K, 512].
    text = embed_names(NAMES, TextConfig(source="hash", width=512)).vectors
    image, label = torch.rand(2, 3, size, size), torch.randint(len(NAMES), (2, size, size))

    model = build().eval()
    with torch.no_grad():
        before = model(image)
    guide(model, text)
    model.eval()
    with torch.no_grad():
        after = model(image)
    print(f"text {list(text.shape)}, image {list(image.shape)}, logits {list(before.shape)} -> {list(after.shape)}")
    print(f"the layer moves the logits by up to {(after - before).abs().max():.3f}")

    model.train()
    scores = []  # cosines of each pixel with each name, [B, K, size / 32, size / 32]
    model[1].layer.register_forward_hook(lambda layer, inputs, output: scores.append(output.score))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    loss = cross_entropy(model(image), label) + 0.4 * cross_entropy(scores.pop() / 0.07, label)
    loss.backward()
    optimizer.step()
    print(f"trained one step, loss {loss:.3f}")


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(F.interpolate(logits, label.shape[-2:], mode="bilinear"), label)


if __name__ == "__main__":
    main()
