"""The segmenter: one forward pass, one loss, and initial weights that variants share."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fusekern.config import BackboneConfig, DataConfig, GuidanceConfig, HeadConfig, ModelConfig, TextConfig
from fusekern.errors import FusekernError
from fusekern.models.guidance import ConvFormerGuidance, TextLinear
from fusekern.models.segmenter import SegmenterOutput, build_segmenter
from fusekern.models.text import embed_names

# Pictures of 64 x 96 keep the tests short; what they leave the text is one image token.
pytestmark = pytest.mark.filterwarnings("ignore:a feature map of")

NAMES = ("wall", "sky", "tree", "road", "car")
K = len(NAMES)
TEXT = embed_names(NAMES, TextConfig(source="hash", width=32)).vectors
SMALL = ModelConfig(
    backbone=BackboneConfig("mobilenetv2_035"),
    guidance=GuidanceConfig(channels=32, blocks=2, bridge_heads=2, text_heads=4, expansion=2),
    head=HeadConfig(neck_channels=16, channels=16),
)


def build(kind="convformer", *, text=TEXT, seed=0, **guidance):
    settings = dataclasses.replace(SMALL.guidance, kind=kind, **guidance)
    return build_segmenter(dataclasses.replace(SMALL, guidance=settings), DataConfig(), K, text, seed=seed)


def picture(height=64, width=96, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def labels(height=64, width=96, batch=2):
    return torch.randint(0, K, (batch, height, width), generator=torch.Generator().manual_seed(2))


# forward


@pytest.mark.parametrize("kind", ["none", "convformer"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (250, 333)])
def test_forward_and_backward(kind, training, height, width):
    model = build(kind).train(training)
    output = model(picture(height, width))
    assert output.logits.shape == (2, K, -(-height // 4), -(-width // 4))
    if kind == "convformer":
        assert output.score.shape == (2, K, -(-height // 32), -(-width // 32))
        assert output.text.shape == (2, K, 32)
    else:
        assert output.score is None and output.text is None and model.text is None
    losses = model.loss(output, labels(height, width))
    sum(losses.values()).backward()
    assert set(losses) == ({"decode", "aux"} if kind == "convformer" else {"decode"})
    # Tokens of the last block go nowhere but into the score map, so that every parameter takes part.
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_the_score_map_reaches_the_decoder():
    model = build().eval()
    guided = model.guidance(torch.randn(1, 112, 4, 4), model.text)
    assert guided.feature.shape == (1, 32 + K, 4, 4)
    assert torch.equal(guided.feature[:, 32:], guided.score)


def test_image_is_normalised_inside():
    data = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    model = build_segmenter(SMALL, data, K, TEXT, seed=0).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([0.6, 0.7, 0.425])[:, None, None].expand(1, 3, 64, 64))
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([1.0, 2.0, 1.0]))


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]
)
def test_wrong_image(image):
    with pytest.raises(ValueError, match=r"image must be \[B, 3, H, W\], floating point, values in \[0, 1\]; got"):
        build("none")(image)


def test_predict_logits():
    model = build().eval()
    image = picture(64, 96)
    with torch.no_grad():
        found = model.predict_logits(image, (50, 70))
        expected = F.interpolate(model(image).logits, (50, 70), mode="bilinear", align_corners=False)
        with torch.autocast("cpu", torch.bfloat16):
            half = model.predict_logits(image, (50, 70))
    assert torch.equal(found, expected) and half.dtype == torch.float32


# text


@pytest.mark.parametrize("text", [None, TEXT[:3], TEXT[0]])
def test_unusable_text(text):
    with pytest.raises(ValueError, match=r"text must be \[K, D\] with K = 5"):
        build(text=text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"bridge_heads": 5}, "bridge_heads must divide"), ({"aux_tau": 0.0}, "aux_tau > 0 and aux_weight >= 0, got 0.0")],
)
def test_unusable_guidance_settings(settings, words):
    with pytest.raises(FusekernError, match=f"model.guidance: .*{words}"):
        build(**settings)


def test_text_of_another_width_goes_through_one_orthogonal_map():
    vectors = embed_names(NAMES, TextConfig(source="hash", width=16)).vectors
    model = build(text=vectors)
    assert isinstance(model.guidance.text, TextLinear) and isinstance(build().guidance.text, torch.nn.Identity)
    mapped = model.guidance.text(model.text)
    # 16 -> 32 keeps all angles; 32-term sums in float32
    torch.testing.assert_close(mapped @ mapped.T, vectors @ vectors.T, atol=1e-5, rtol=0)
    sum(model.loss(model(picture()), labels()).values()).backward()
    assert model.guidance.text.weight.grad.abs().max() > 0


def test_the_layer_itself_refuses_another_width():
    guidance = ConvFormerGuidance(112, 32, K, SMALL.guidance)
    with pytest.raises(ValueError, match=r"text must be .* C = 32.* \[5, 16\]"):
        guidance(torch.zeros(1, 112, 4, 4), torch.zeros(K, 16))


def test_state_dict_round_trip(tmp_path):
    """Text embeddings and normalisation travel with the weights."""
    model = build(seed=1).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build(text=torch.zeros(K, 32), seed=2).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.text, TEXT) and {"text", "mean", "std"} <= set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(picture()).logits, model(picture()).logits)


# loss


def test_loss_against_the_two_dimensional_form():
    model = build(aux_weight=0.3, aux_tau=0.5)
    logits, score = torch.randn(2, K, 16, 24, requires_grad=True), torch.randn(2, K, 2, 3)
    label = labels()
    label[:, :20] = 255
    losses = model.loss(SegmenterOutput(logits, score, None), label)

    def expected(values):
        values = F.interpolate(values, label.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(values, label, ignore_index=255)

    # the same sum over 8448 pixels in another order
    torch.testing.assert_close(losses["decode"], expected(logits), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["aux"], 0.3 * expected(score / 0.5), rtol=1e-5, atol=0)


def test_loss_without_any_label_is_zero():
    model = build()
    losses = model.loss(model(picture()), torch.full((2, 64, 96), 255))
    assert all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_aux_loss_can_be_turned_off():
    model = build(aux_weight=0.0)
    assert set(model.loss(model(picture()), labels())) == {"decode"}


def test_loss_is_float32_under_autocast():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(picture())
        inside = model.loss(output, labels())
    outside = model.loss(output, labels())
    assert output.logits.dtype == output.score.dtype == torch.bfloat16
    score = F.interpolate(output.score.float() / 0.07, (64, 96), mode="bilinear", align_corners=False)
    # the same sum over 12288 pixels in another order; dividing in bfloat16 would be off by 2^-9
    torch.testing.assert_close(outside["aux"], 0.4 * F.cross_entropy(score, labels()), rtol=1e-5, atol=0)
    assert all(value.dtype == torch.float32 for value in inside.values())
    assert all(torch.equal(inside[name], outside[name]) for name in inside)


# initial weights


def test_vanilla_and_convformer_start_equal_where_they_share():
    vanilla, guided = build("none"), build("convformer")
    shared = guided.state_dict()
    differing = [name for name, value in vanilla.state_dict().items() if not torch.equal(value, shared[name])]
    assert differing == ["head.neck.lateral.3.weight"]
    assert guided.head.neck.lateral[3].in_channels == 32 + K and vanilla.head.neck.lateral[3].in_channels == 112


def test_layers_of_the_guidance_start_equal_whatever_else_is_built():
    one = build(blocks=1).guidance.state_dict()
    other = build(blocks=2, downsample="depthwise", text=TEXT[:, :16].clone()).guidance.state_dict()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert differing == [f"layer.blocks.0.image_to_text.downsample.{name}" for name in ("weight", "bias")]


def test_layers_differ_from_each_other():
    state = build().state_dict()
    first, second = (state[f"guidance.layer.blocks.{i}.transformer.qkv.weight"] for i in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(state["head.neck.output.0.weight"], state["head.neck.output.1.weight"])


def test_seed_decides():
    first, again, other = (build(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].ndim > 1 and name not in ("text", "mean", "std")]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_streams_keep_the_layers_own_distributions():
    """Drawing again by name must not change what the layer's constructor would have drawn from."""
    guidance = build().guidance
    fresh = dict(ConvFormerGuidance(112, 32, K, SMALL.guidance).named_parameters())
    for name, parameter in guidance.named_parameters():
        if parameter.numel() >= 1000:  # the deviation of a thousand numbers is off by 1/sqrt(2000), 2 %, each
            assert parameter.std().item() == pytest.approx(fresh[name].std().item(), rel=0.15)


def test_building_leaves_the_global_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build()
    assert torch.equal(torch.rand(3), expected)
    second = build()
    assert torch.equal(first.head.classifier.weight, second.head.classifier.weight)


# compilers


@pytest.mark.parametrize(("kind", "training"), [("none", False), ("convformer", True)])
def test_compile_in_one_graph(kind, training):
    model = build(kind).train(training)
    model.head.dropout.p = 0.0  # the compiled graph draws other random numbers
    eager = copy.deepcopy(model)(picture())
    output = torch.compile(model, fullgraph=True, backend="eager")(picture())
    torch.testing.assert_close(output.logits, eager.logits)


@pytest.mark.parametrize("kind", ["none", "convformer"])
def test_export(kind, tmp_path):
    model = build(kind).eval()
    image = picture(64, 96, batch=1)
    torch.export.save(torch.export.export(model, (image,)), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(exported(image).logits, model(image).logits)
