"""Each script of ``examples/`` runs, and the layer that it puts into its host does something."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fusekern.nn import TextGuidance

EXAMPLES = Path(__file__).parents[1] / "examples"

# Script, library, side of the images that leaves the text several image tokens, stride of the logits, and where a
# result has its logits.
HOSTS = [
    pytest.param("smp_unet", "segmentation_models_pytorch", 192, 1, lambda output: output, id="smp_unet"),
    pytest.param("torchvision_deeplab", "torchvision", 96, 1, lambda output: output["out"], id="torchvision_deeplab"),
    pytest.param("hf_segformer", "transformers", 192, 4, lambda output: output.logits, id="hf_segformer"),
    pytest.param("timm_backbone", "timm", 192, 4, lambda output: output, id="timm_backbone"),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


class Logits(nn.Module):
    def __init__(self, host, pick):
        super().__init__()
        self.host, self.pick = host, pick

    def forward(self, image):
        return self.pick(self.host(image))


def test_every_script_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {host.id for host in HOSTS} | {"export_onnx"}


@pytest.mark.parametrize(("name", "library", "size", "stride", "pick"), HOSTS)
def test_text_guides_the_host(name, library, size, stride, pick, monkeypatch, capsys):
    pytest.importorskip(library)
    script = run(monkeypatch, name, "--size", size)
    side = size // stride
    assert f"logits [2, 5, {side}, {side}] -> [2, 5, {side}, {side}]" in capsys.readouterr().out

    host, text, image = script["build"](), torch.randn(5, 512), torch.rand(2, 3, size, size)
    model = Logits(host, pick).eval()
    with torch.no_grad():
        plain = model(image)
        script["guide"](host, text)
        model.eval()
        guided = model(image)
        (guidance,) = (module for module in model.modules() if isinstance(module, TextGuidance))
        guidance.text.copy_(torch.randn(5, 512))
        otherwise = model(image)
    assert plain.shape == guided.shape == (2, 5, side, side)
    scale = plain.std()
    assert (guided - plain).abs().max() > 0.1 * scale
    assert (otherwise - guided).abs().max() > 0.01 * scale

    model.train()(image).square().mean().backward()
    for parameter, gradient in ((key, value.grad) for key, value in guidance.named_parameters()):
        # A bias of the keys shifts the similarities of a pixel alike, which softmax ignores.
        assert parameter.endswith("key.bias") or gradient.abs().max() > 0, parameter
    assert next(host.parameters()).grad.abs().max() > 0


@pytest.mark.parametrize(("name", "library", "size", "stride", "pick"), [HOSTS[0], HOSTS[2]])
def test_a_guided_host_becomes_an_onnx_file(name, library, size, stride, pick, tmp_path):
    pytest.importorskip(library)
    onnx = pytest.importorskip("onnx")
    for needed in ("onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    script = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    host, image = script["build"](), torch.rand(2, 3, size, size)
    script["guide"](host, torch.randn(5, 512))
    model = Logits(host, pick).eval()
    export = runpy.run_path(str(EXAMPLES / "export_onnx.py"))
    file = tmp_path / "host.onnx"
    export["export"](model, image, file)
    export["check"](model, torch.rand(1, 3, size + 32, size), file)
    assert {node.domain for node in onnx.load(file).graph.node} == {""}


def test_a_segmenter_becomes_an_onnx_file(monkeypatch, capsys, tmp_path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    file = tmp_path / "segmenter.onnx"
    script = run(monkeypatch, "export_onnx", file)
    assert "image [1, 3, 224, 257]: off by" in capsys.readouterr().out
    # The comparison can fail: another model's logits are not these.
    other = script["Logits"](script["build"]()).eval()
    with torch.no_grad():
        other.segmenter.text.neg_()
    with pytest.raises(AssertionError, match="max error"):
        script["check"](other, torch.rand(1, 3, 192, 192), file)
