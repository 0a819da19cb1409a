import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from by_torch import block_by_torch

from fusekern import ConvFormer, FusekernError, ops, use_backend
from fusekern.testing import assert_parity


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


WB = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def small(**options):
    return ConvFormer(**{"channels": 16, "blocks": 2, "bridge_heads": 4, "text_heads": 2, "expansion": 3, **options})


def inputs(batch=2, height=7, breadth=6, count=5, channels=16, dtype=torch.float32):
    return torch.randn(batch, channels, height, breadth, dtype=dtype), torch.randn(batch, count, channels, dtype=dtype)


# Maths


@pytest.mark.parametrize("outer_residual", [True, False])
@pytest.mark.parametrize("text_scale", [1.0, 4.0])
def test_equals_the_paper_out_of_torchs_parts(outer_residual, text_scale):
    layer = small(outer_residual=outer_residual, text_scale=text_scale).double()
    image, text = inputs(dtype=torch.float64)
    found = layer(image, text)
    new_image, new_text = image, text * text_scale
    for block in layer.blocks:
        new_image, new_text = block_by_torch(block, new_image, new_text)
    if outer_residual:
        new_image, new_text = new_image + image, new_text + text * text_scale
    torch.testing.assert_close(found.image, new_image, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.text, new_text, rtol=1e-9, atol=1e-9)
    cosine = F.cosine_similarity(new_image[:, None], new_text[..., None, None], dim=2)
    torch.testing.assert_close(found.score, cosine, rtol=1e-9, atol=1e-9)


def test_inner_product_bridges():
    layer = small(blocks=1, bridge="inner_product", outer_residual=False).double().eval()
    image, text = inputs(dtype=torch.float64)
    block = layer.blocks[0]
    assert not [name for name, _ in block.named_parameters() if any(part in name for part in ("query", "key", "value"))]

    def inner(query, keys, heads=4):
        width, result = keys.shape[2] // heads, torch.zeros_like(query)
        for head in range(heads):
            group = slice(head * width, (head + 1) * width)
            similarity = torch.einsum("bnd,bmd->bnm", query[..., group], keys[..., group])
            result[..., group] = torch.einsum("bnm,bmd->bnd", similarity, keys[..., group]) / keys.shape[1]
        return result

    tokens = block.image_to_text.downsample(image).flatten(2).transpose(1, 2)
    text1 = block.transformer(block.image_to_text.norm(text + inner(text, tokens)))
    image1 = block.bottleneck(image)
    image1 = image1 + inner(image1.flatten(2).transpose(1, 2), text1).transpose(1, 2).reshape(image.shape)
    found = layer(image, text)
    torch.testing.assert_close(found.text, text1, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.image, image1, rtol=1e-10, atol=1e-10)


def test_one_text_for_all_images_equals_its_copies():
    layer = small().eval()
    image, text = inputs()
    for shared, repeated in zip(layer(image, text[0]), layer(image, text[:1].repeat(2, 1, 1)), strict=True):
        torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("outer_residual", [True, False])
def test_no_blocks_is_the_identity(outer_residual):
    layer = small(blocks=0, outer_residual=outer_residual, text_scale=3.0)
    image, text = inputs()
    found = layer(image, text)
    assert torch.equal(found.image, image)
    assert torch.equal(found.text, text)
    assert torch.equal(found.score, ops.score_map(image, text))


def test_literal_equation_2():
    layer = small(normalize=False).eval()
    found = layer(*inputs())
    torch.testing.assert_close(found.score, torch.einsum("bchw,bkc->bkhw", found.image, found.text))


def test_channels_last_gives_the_same():
    layer = small().eval()
    image, text = inputs()
    expected = layer(image, text)
    found = layer.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last), text)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert found.image.is_contiguous(memory_format=torch.channels_last)


# Training


def test_every_parameter_learns():
    layer = small()
    found = layer(*inputs())
    (found.image.square().mean() + found.text.square().mean() + found.score.square().mean()).backward()
    for name, parameter in layer.named_parameters():
        # A bias of the keys shifts the similarities of a pixel alike, which softmax ignores.
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_fp32_parameters(dtype):
    layer = small()
    image, text = inputs()
    with torch.autocast("cpu", dtype=dtype):
        found = layer(image, text)
        loss = found.score.float().square().mean() + found.image.float().square().mean()
    loss.backward()
    truth = small().double()
    truth.load_state_dict(layer.state_dict())
    truth.train()
    wanted = truth(image.double(), text.double())
    # Two blocks in 8 or 11 bits: some hundredths of the scale; an error of formula is of the order of the scale.
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).abs().max() < 16 * torch.finfo(dtype).eps * other.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whole_layer_in_one_dtype(dtype):
    layer = small().to(dtype)
    found = layer(*inputs(dtype=dtype))
    assert [part.dtype for part in found] == [dtype] * 3
    assert all(part.isfinite().all() for part in found)


# Sizes and arguments


@pytest.mark.parametrize(("height", "breadth"), [(1, 1), (1, 5), (2, 2), (2, 9), (3, 4), (0, 4)])
@pytest.mark.parametrize("pad", ["floor", "ceil"])
@pytest.mark.filterwarnings("ignore:a feature map of")
def test_small_maps(height, breadth, pad):
    image, text = inputs(height=height, breadth=breadth)
    found = small(pad=pad)(image, text)
    assert [part.shape for part in found] == [image.shape, text.shape, (2, 5, height, breadth)]
    assert all(part.isfinite().all() for part in found)


@pytest.mark.parametrize("options", [{}, {"downsample": "depthwise"}, {"bridge": "inner_product"}, {"ffn_ratio": 3}])
def test_empty_batch_and_one_class(options):
    layer = small(**options)
    image, text = inputs(batch=0, count=1)
    assert [part.shape for part in layer(image, text)] == [image.shape, text.shape, (0, 1, 7, 6)]
    assert layer(*inputs(count=1)).score.shape == (2, 1, 7, 6)


def test_one_image_token_warns_once():
    layer = small()
    image, text = inputs(height=5, breadth=4)
    with pytest.warns(UserWarning, match="5x4 leaves the text one image token.*crops of at least 192.*stride of 16"):
        layer(image, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(image, text)
        small()(*inputs(height=6, breadth=4))
        small(pad="ceil")(image, text)
        small(blocks=0)(image, text)


def test_why_it_warns():
    """Softmax over one key is 1, whatever the query."""
    layer = small(blocks=1)
    with pytest.warns(UserWarning, match="one image token"):
        layer(*inputs(height=5, breadth=5)).text.square().sum().backward()
    assert layer.blocks[0].image_to_text.query.weight.grad.abs().max() < 1e-6


def test_errors_name_the_argument():
    layer = small()
    image, text = inputs()
    with pytest.raises(ValueError, match=r"text must be .* with C = 16, .*; got shape \[5, 12\], whose width is 12"):
        layer(image, text[0, :, :12])
    with pytest.raises(ValueError, match=r"image must be \[B, C, H, W\] with C = 16; got shape \[2, 8, 7, 6\]"):
        layer(image[:, :8], text)
    with pytest.raises(ValueError, match="text is for 3 images, image holds 2"):
        layer(image, text[:1].repeat(3, 1, 1))
    with pytest.raises(ValueError, match="at least one token"):
        layer(image, text[:, :0])
    with pytest.raises(ValueError, match="bridge_heads must divide the channels: got bridge_heads = 3, C = 16"):
        small(bridge_heads=3)
    with pytest.raises(ValueError, match="bridge must be one of attention, inner_product, got 'softmax'"):
        small(bridge="softmax")
    with pytest.raises(ValueError, match="downsample must be one of conv, depthwise, got 'pool'"):
        small(downsample="pool")
    with pytest.raises(ValueError, match="pad must be one of floor, ceil"):
        small(pad="same")
    with pytest.raises(ValueError, match="backend must be one of"):
        small(backend="fast")
    with pytest.raises(ValueError, match="preset must be one of paper, small, got 'tiny'"):
        ConvFormer.preset("tiny")


def test_presets():
    with torch.device("meta"):
        paper, small_preset = ConvFormer.preset("paper"), ConvFormer.preset("small", blocks=2)
    assert (paper.channels, len(paper.blocks)) == (512, 6)
    assert paper.blocks[0].image_to_text.downsample.groups == 1
    assert (small_preset.channels, len(small_preset.blocks)) == (256, 2)
    assert small_preset.blocks[0].image_to_text.downsample.groups == 256


def test_backend_set_later_reaches_every_part():
    layer, (image, text) = small(backend="reference"), inputs()
    layer.backend = "auto"
    parts = [part for part in layer.modules() if hasattr(part, "backend")]
    assert len(parts) == 1 + 5 * len(layer.blocks) and {part.backend for part in parts} == {"auto"}
    with pytest.raises(ValueError, match="backend must be one of"):
        layer.backend = "fast"
    layer.blocks[1].backend = "cuda"
    assert layer.backend == layer.blocks[0].bottleneck.backend == "auto"
    assert copy.deepcopy(layer).blocks[1].bottleneck.backend == "cuda"
    with pytest.raises(FusekernError, match="backend 'cuda' cannot run"):
        layer(image, text)


def test_backend_reaches_every_op():
    image, text = inputs()
    with pytest.raises(FusekernError, match="backend 'cuda' cannot run"):
        small(backend="cuda")(image, text)
    with use_backend("triton"):
        small(backend="reference")(image, text)
        with pytest.raises(FusekernError, match="backend 'triton' cannot run"):
            small()(image, text)


# An ordinary module


def test_state_dict_is_that_of_ordinary_modules():
    layer = small(blocks=1)
    assert set(layer.state_dict()) == {
        *(f"blocks.0.image_to_text.{name}.{part}" for name in ("downsample", "query", "out", "norm") for part in WB),
        *(
            f"blocks.0.transformer.{name}.{part}"
            for name in ("qkv", "out", "norm1", "up", "down", "norm2")
            for part in WB
        ),
        *(f"blocks.0.bottleneck.{name}.weight" for name in ("expand", "depthwise", "project")),
        *(f"blocks.0.bottleneck.norm{i}.{part}" for i in (1, 2, 3) for part in (*WB, *STATISTICS)),
        *(f"blocks.0.text_to_image.{name}.{part}" for name in ("key", "value") for part in WB),
    }


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(clone):
    layer = small().eval()
    image, text = inputs()
    for one, other in zip(clone(layer)(image, text), layer(image, text), strict=True):
        assert torch.equal(one, other)


def test_repr_shows_the_options():
    text = repr(small(bridge="inner_product", pad="ceil", text_scale=4.0))
    for option in ("channels=16", "heads=4", "heads=2", "pad='ceil'", "bridge='inner_product'", "text_scale=4.0"):
        assert option in text


@pytest.mark.parametrize(
    ("training", "options"),
    [(True, {}), (False, {"bridge": "inner_product", "downsample": "depthwise", "pad": "ceil"})],
)
def test_compiles_to_one_graph_for_all_sizes(training, options):
    torch._dynamo.reset()
    layer = small(blocks=1, **options).double().train(training)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, side, count in ((2, 7, 5), (3, 10, 4)):
            image, text = inputs(batch, side, side + 1, count, dtype=torch.float64)
            for one, other in zip(compiled(image, text), layer(image, text), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    for one, other in zip(compiled.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_exports_with_free_sizes():
    layer = small(blocks=1).eval()
    auto = torch.export.Dim.AUTO
    free = {"image": {0: auto, 2: auto, 3: auto}, "text": {0: auto}}
    program = torch.export.export(layer, (inputs()[0], inputs()[1][0]), dynamic_shapes=free)
    image, text = inputs(batch=3, height=10, breadth=12, count=7)
    for one, other in zip(program.module()(image, text[0]), layer(image, text[0]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options", [{}, {"bridge": "inner_product", "downsample": "depthwise", "pad": "ceil", "normalize": False}]
)
def test_onnx_runtime_computes_the_same_for_free_sizes(options, tmp_path):
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = small(blocks=1, **options).eval()
    free = torch.export.Dim.DYNAMIC
    sizes = {"image": {0: free, 2: free, 3: free}, "text": {0: free}}
    program = torch.export.export(layer, (inputs()[0], inputs()[1][0]), dynamic_shapes=sizes)
    file = tmp_path / "layer.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    truth = copy.deepcopy(layer).double()
    for batch, height, breadth, count in ((2, 7, 6, 5), (1, 10, 12, 7), (3, 3, 8, 1)):
        image, text = inputs(batch, height, breadth, count)
        found = session.run(None, {"image": image.numpy(), "text": text[0].numpy()})
        with torch.no_grad():
            plain = layer(image, text[0])
            other_order = layer(image.to(memory_format=torch.channels_last), text[0])
            exact = truth(image.double(), text[0].double())
        for one, *peers, right in zip(found, plain, other_order, exact, strict=True):
            assert_parity(torch.from_numpy(one), peers, right)
