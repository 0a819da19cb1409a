"""Backbones: four NCHW levels or a message that says what was found; weights by name or not at all."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file

from fusekern.config import BackboneConfig
from fusekern.errors import FusekernError
from fusekern.models.backbones import build_backbone


def error_of(**settings):
    with pytest.raises(FusekernError) as caught:
        build_backbone(BackboneConfig(**settings))
    return str(caught.value)


@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_mobilenetv2_levels(output_stride):
    backbone = build_backbone(BackboneConfig(output_stride=output_stride)).eval()
    assert backbone.channels == (24, 32, 96, 320)
    assert backbone.strides == tuple(min(s, output_stride) for s in (4, 8, 16, 32))
    with torch.no_grad():
        levels = backbone(torch.zeros(2, 3, 64, 96))
    assert [tuple(level.shape) for level in levels] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)
    ]


def test_odd_sizes_round_up():
    with torch.no_grad():
        levels = build_backbone(BackboneConfig("mobilenetv2_035")).eval()(torch.zeros(1, 3, 250, 333))
    assert [tuple(level.shape[2:]) for level in levels] == [(63, 84), (32, 42), (16, 21), (8, 11)]


def test_xception_of_the_paper_has_its_odd_sizes():
    """Its stem does not pad: what docs/own-backbone.md says about it."""
    backbone = build_backbone(BackboneConfig("legacy_xception"))
    assert backbone.channels == (128, 256, 728, 2048)
    with torch.no_grad():
        levels = copy.deepcopy(backbone).to("meta").eval()(torch.empty(1, 3, 512, 512, device="meta"))
    assert [level.shape[-1] for level in levels] == [127, 64, 32, 16]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "mobilnetv2_100"}, "nearest: mobilenetv2_100"),
        ({"name": "mobilenetv2_100.ra_in1k"}, "goes into model.backbone.weights"),
        ({"name": "vit_tiny_patch16_224"}, "strides (16, 16, 16, 16), needed (4, 8, 16, 32)"),
        ({"name": "swin_tiny_patch4_window7_224"}, "any image size, failed at (96, 160)"),
        ({"name": "efficientformerv2_s0"}, "any image size, failed at (96, 160)"),
        ({"name": "convnext_atto", "output_stride": 7}, "output_stride 7"),
        ({"weights": "in22k"}, "'in22k' is neither `none`, a file, nor a tag of mobilenetv2_100; tags: ra_in1k"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors not found"),
        ({"weights": __file__}, "is not a .safetensors file"),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    assert words in error_of(**settings)


def test_channels_last_levels_are_named(monkeypatch):
    """No stock network passes all other checks with NHWC levels, so one is made."""

    class Permuted(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.feature_info = net, net.feature_info

        def forward(self, image):
            return [level.permute(0, 2, 3, 1) for level in self.net(image)]

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **arguments: Permuted(create_model(name, **arguments)))
    assert "needed NCHW levels of width (8, 16, 32, 112), found [(1, 24, 40, 8)" in error_of(name="mobilenetv2_035")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl"])
def test_pickles_are_refused_unopened(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"not even a pickle")
    assert "is a pickle" in (message := error_of(weights=str(path))) and "safetensors" in message


# mobilenetv2's extractor keeps the classifier's names, convnext's has `stages_0` for `stages.0`, xception's is hooked
@pytest.mark.parametrize("name", ["mobilenetv2_035", "convnext_atto", "legacy_xception"])
def test_classifier_file(tmp_path, name):
    file = tmp_path / "classifier.safetensors"
    classifier = timm.create_model(name, num_classes=7)
    save_file(classifier.state_dict(), file)
    backbone = build_backbone(BackboneConfig(name, weights=str(file)))
    expected = {key.replace(".", "_"): value for key, value in classifier.state_dict().items()}
    state = {key.removeprefix("body.").replace(".", "_"): value for key, value in backbone.net.state_dict().items()}
    assert state and all(torch.equal(value, expected[key]) for key, value in state.items())


def test_extractor_file(tmp_path):
    file = tmp_path / "extractor.safetensors"
    state = build_backbone(BackboneConfig("convnext_atto")).net.state_dict()
    save_file(state, file)
    loaded = build_backbone(BackboneConfig("convnext_atto", weights=str(file))).net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_incomplete_and_foreign_files(tmp_path):
    file = tmp_path / "some.safetensors"
    state = build_backbone(BackboneConfig("mobilenetv2_035")).net.state_dict()
    save_file({key: value for key, value in state.items() if not key.startswith("blocks.6")}, file)
    message = error_of(name="mobilenetv2_035", weights=str(file))
    # three convolutions, and three norms of weight, bias and two statistics
    assert f"lacks 15 of {len(state)} tensors: blocks.6.0" in message
    assert "another architecture" in error_of(name="mobilenetv2_050", weights=str(file))
    file.write_bytes(b"{}")
    assert "no readable safetensors file" in error_of(name="mobilenetv2_035", weights=str(file))


def test_failed_download_names_the_local_option(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = error_of(weights="ra_in1k")
    assert "cannot load mobilenetv2_100.ra_in1k" in message and "`model.backbone.weights: FILE.safetensors`" in message
