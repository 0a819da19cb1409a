"""A U-Net of segmentation_models_pytorch, its encoder's last feature guided by text.

Run ``python examples/smp_unet.py`` after ``pip install '.[examples]'``.
"""

import argparse

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusekern.config import TextConfig
from fusekern.models import embed_names
from fusekern.nn import ConvFormer, TextGuidance

NAMES = ("road", "building", "tree", "car", "sky")


def build() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, classes=len(NAMES))


def guide(model: nn.Module, text: Tensor) -> None:
    # resnet18 ends 512 wide, and so does the text. Load weights first: the decoder's keys become `decoder.1.*`.
    model.decoder = nn.Sequential(TextGuidance(ConvFormer(512, blocks=2), text), model.decoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=192, help="side of the images, a multiple of 32")
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
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    loss = F.cross_entropy(model(image), label)
    loss.backward()
    optimizer.step()
    print(f"trained one step, loss {loss:.3f}")


if __name__ == "__main__":
    main()
