"""SegFormer of Hugging Face transformers, its encoder's last feature guided by text.

Run ``python examples/hf_segformer.py`` after ``pip install '.[examples]'``.
"""

import argparse

import torch
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from fusekern.config import TextConfig
from fusekern.models import embed_names
from fusekern.nn import ConvFormer, TextGuidance

NAMES = ("road", "building", "tree", "car", "sky")


def build() -> nn.Module:
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=len(NAMES)))  # B0, random weights


def guide(model: nn.Module, text: Tensor) -> None:
    # B0 ends 256 wide: a linear map brings the text there. Load weights first: the keys become `decode_head.1.*`.
    model.decode_head = nn.Sequential(TextGuidance(ConvFormer(256, blocks=2), text), model.decode_head)


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
        before = model(image).logits
    guide(model, text)
    model.eval()
    with torch.no_grad():
        after = model(image).logits
    print(f"text {list(text.shape)}, image {list(image.shape)}, logits {list(before.shape)} -> {list(after.shape)}")
    print(f"the layer moves the logits by up to {(after - before).abs().max():.3f}")

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    loss = model(image, labels=label).loss
    loss.backward()
    optimizer.step()
    print(f"trained one step, loss {loss:.3f}")


if __name__ == "__main__":
    main()
