"""DeepLabV3 of torchvision, its backbone's last feature guided by text.

Run ``python examples/torchvision_deeplab.py`` after ``pip install '.[examples]'``.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from fusekern.config import TextConfig
from fusekern.models import embed_names
from fusekern.nn import ConvFormer, TextGuidance

NAMES = ("road", "building", "tree", "car", "sky")


def build() -> nn.Module:
    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(NAMES))


def guide(model: nn.Module, text: Tensor) -> None:
    # 960 channels (2048 in a ResNet-50) are many for the layer: it works in 256, beside the feature. Load weights
    # first: the keys become `classifier.1.*`.
    model.classifier = nn.Sequential(TextGuidance(ConvFormer(256, blocks=2), text, channels=960), model.classifier)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="side of the images")
    size = parser.parse_args().size
    torch.manual_seed(0)
    # Hashed names need no download and know no language; source="open_clip" gives CLIP's embeddings, also [K, 512].
    text = embed_names(NAMES, TextConfig(source="hash", width=512)).vectors
    image, label = torch.rand(2, 3, size, size), torch.randint(len(NAMES), (2, size, size))

    model = build().eval()
    with torch.no_grad():
        before = model(image)["out"]
    guide(model, text)
    model.eval()
    with torch.no_grad():
        after = model(image)["out"]
    print(f"text {list(text.shape)}, image {list(image.shape)}, logits {list(before.shape)} -> {list(after.shape)}")
    print(f"the layer moves the logits by up to {(after - before).abs().max():.3f}")

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    loss = F.cross_entropy(model(image)["out"], label)
    loss.backward()
    optimizer.step()
    print(f"trained one step, loss {loss:.3f}")


if __name__ == "__main__":
    main()
