"""What the tests of evaluation and prediction share: a cheap model, a few samples, a checkpoint of a real segmenter."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from fusekern import recipes
from fusekern.data.folder import Sample
from fusekern.data.spec import load_spec
from fusekern.engine import checkpoint as checkpoints
from fusekern.engine.predict import predict_label
from fusekern.models.segmenter import build_segmenter

CLASSES = 5


class Fake(nn.Module):
    """A convolution with stride 4 in place of a segmenter: every pixel's class depends on its surroundings."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, classes, 7, stride=4, padding=3)
        weight = torch.randn(self.conv.weight.shape, generator=generator)
        self.conv.weight.data = weight - weight.mean((1, 2, 3), keepdim=True)  # else one class wins everywhere
        self.conv.bias.data.zero_()
        self.noise = nn.Dropout(0.5)

    def forward(self, image):
        return SimpleNamespace(logits=self.noise(self.conv(image)))


class Samples(list):
    spec = SimpleNamespace(names=tuple("abcde"))


def samples(count):
    """Images of several sizes with random labels, some ignored."""
    generator = torch.Generator().manual_seed(0)
    found = Samples()
    for index in range(count):
        size = (20 + 7 * index, 45 - 5 * index)
        label = torch.randint(0, CLASSES + 1, size, generator=generator)
        label[label == CLASSES] = 255
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        found.append(Sample(image, label.to(torch.uint8), f"image{index}"))
    return found


def photo(height=50, width=70, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def label_of(image, config, model=None):
    return predict_label((model or Fake()).eval(), image, config, device="cpu")


def save_checkpoint(run, root, *, source="hash vectors", kind="convformer", weights="auto"):
    """Write a run folder with untrained segmenters of the ``scenes`` classes; returns them by kind of weights."""
    spec = load_spec("scenes")
    options = {"data.root": str(root), "eval.scale": "[256, 192]", "eval.weights": weights, "model.guidance.kind": kind}
    recipe = recipes.load("demo", *(word for key, value in options.items() for word in (f"--{key}", value)))
    vectors = torch.randn(len(spec.names), 128, generator=torch.Generator().manual_seed(0))
    text = None if kind == "none" else F.normalize(vectors, dim=1)
    models = {
        name: build_segmenter(recipe.model, recipe.data, len(spec.names), text, seed=seed).eval()
        for seed, name in enumerate(["model", "ema"])
    }
    state = {
        "world": 1,
        "device": "cpu",
        "recipe": recipes.to_dict(recipe),
        "dataset": checkpoints.spec_to_dict(spec),
        "images": 3,
        "text": None if text is None else {"source": source, "language_prior": "hash" not in source},
        "score": None,
        "backbone_mult": 1.0,
        "scaler": None,
        "versions": {},
        "threads": 1,
    }
    tensors = {name: model.state_dict() for name, model in models.items()}
    checkpoints.save(run, 300, state=state, tensors={**tensors, "optimizer": {}, "rng": {}}, keep=1)
    return models
