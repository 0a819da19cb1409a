"""One set of weights under every backend: the same state dict, and the same labels whichever backend trained them."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fusekern import ConvFormer
from fusekern.backends import BACKENDS, NAMES, OPS
from fusekern.config import BackboneConfig, DataConfig, GuidanceConfig, HeadConfig, ModelConfig
from fusekern.models.segmenter import build_segmenter
from fusekern.testing import assert_parity

NEEDS_CPP = pytest.mark.skipif(bool(BACKENDS["cpp"].missing), reason=BACKENDS["cpp"].missing)
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# On a GPU no backend has a kernel of every op: `auto` takes Triton's and CUDA's.
KERNELS = [pytest.param("cpp", "cpu", marks=NEEDS_CPP), pytest.param("auto", "cuda", marks=NEEDS_CUDA)]

SIZE = 96
COLOURS = torch.tensor([[0.8, 0.3, 0.3], [0.3, 0.8, 0.3], [0.3, 0.3, 0.8]])
TEXT = torch.eye(len(COLOURS), 32)
MODEL = ModelConfig(
    backbone=BackboneConfig("mobilenetv2_035", output_stride=16),
    guidance=GuidanceConfig(channels=32, blocks=2, bridge_heads=2, text_heads=2, expansion=2),
    head=HeadConfig(neck_channels=16, channels=16),
)


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def segmenter(backend):
    guidance = dataclasses.replace(MODEL.guidance, backend=backend)
    return build_segmenter(dataclasses.replace(MODEL, guidance=guidance), DataConfig(), len(COLOURS), TEXT, seed=0)


def layer(backend):
    return ConvFormer(16, blocks=2, bridge_heads=2, text_heads=2, expansion=2, backend=backend)


def pictures(count, seed, device):
    """Noisy images ``[count, 3, SIZE, SIZE]`` of an area in each colour, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    edges = torch.randint(SIZE // 4, 3 * SIZE // 4, (count, 2), generator=generator)
    for one, (right, below) in zip(label, edges, strict=True):
        one[:, right:] = 1
        one[below:] = 2
    image = COLOURS[label].permute(0, 3, 1, 2) + 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return image.clamp(0, 1).to(device), label.to(device)


def train(model, steps, device):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(steps):
        image, label = pictures(4, step, device)
        optimizer.zero_grad()
        sum(model.loss(model(image), label).values()).backward()
        optimizer.step()
    return model.eval()


class Kernels(TorchDispatchMode):
    """The ops that did not run as plain PyTorch."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fusekern":
            self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def described(state):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("make", [layer, segmenter])
@pytest.mark.parametrize("backend", [name for name in NAMES if name != "reference"])
def test_a_state_dict_knows_no_backend(make, backend, tmp_path):
    one, other = make("reference"), make(backend)
    for parameter in (*one.parameters(), *other.parameters()):
        parameter.data = torch.randn_like(parameter)
    for source, target in ((one, other), (other, one)):
        assert described(source.state_dict()) == described(target.state_dict())
        save_file(source.state_dict(), tmp_path / "model.safetensors")
        state = load_file(tmp_path / "model.safetensors")
        found = target.load_state_dict(state, strict=True)
        assert not found.missing_keys and not found.unexpected_keys
        assert all(torch.equal(tensor, state[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize(("kernels", "device"), KERNELS)
def test_training_adds_nothing_to_a_state_dict(kernels, device):
    models = {backend: segmenter(backend).to(device) for backend in ("reference", kernels)}
    before = described(models["reference"].state_dict())
    for backend, model in models.items():
        with Kernels() as ran:
            train(model, 1, device)
            model(pictures(1, 0, device)[0])
        assert described(model.state_dict()) == before
        assert bool(ran.seen) == (backend != "reference")
    ops = {name.removesuffix("_backward").removesuffix("_again") for name in ran.seen}
    assert kernels == "auto" or ops == set(OPS) - {"former"}  # that is in text_path


@pytest.mark.parametrize("trained_by", ["kernels", "reference"])
@pytest.mark.parametrize(("kernels", "device"), KERNELS)
@torch.no_grad()
def test_the_other_backend_finds_the_same_labels(kernels, device, trained_by, tmp_path):
    with torch.enable_grad():
        trained = train(segmenter(kernels if trained_by == "kernels" else "reference").to(device), 40, device)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    image, label = pictures(8, 99, device)

    def logits(backend, **to):
        model = segmenter(backend)
        model.load_state_dict(load_file(tmp_path / "model.safetensors"))
        return model.to(device, **to).eval()(image.to(**to)).logits

    truth = logits("reference", dtype=torch.float64)
    plain = [logits("reference", memory_format=layout) for layout in (torch.contiguous_format, torch.channels_last)]
    fused = logits(kernels)
    assert_parity(fused, plain, truth)
    # The rule's bound on a logit. A label may change only where the best two of the truth are nearer than twice that.
    off = 2 * max((peer - truth).abs().max() for peer in plain)
    off += torch.finfo(torch.float32).eps * (truth.abs().max() + 0.3)
    best, second = truth.topk(2, dim=1).values.unbind(1)
    ties = best - second <= 2 * off
    assert ties.float().mean() < 1e-3
    labels = fused.argmax(1)
    for other in (*plain, truth):
        assert torch.equal(labels[~ties], other.argmax(1)[~ties])
    # The labels say something: all classes are there, and far more is right than one class alone would have right.
    label = label[:, 2::4, 2::4]
    assert len(labels.unique()) == len(COLOURS)
    assert (labels == label).float().mean() > label.flatten().bincount().max() / label.numel() + 0.2
