"""The layer recorded before it runs: compiled, exported, and captured in CUDA graphs."""

import copy
import io

import pytest
import torch

from fusekern import ConvFormer
from fusekern.backends import BACKENDS, OPS

CPP = pytest.param("cpp", marks=pytest.mark.skipif(bool(BACKENDS["cpp"].missing), reason=BACKENDS["cpp"].missing))
every_backend = pytest.mark.parametrize("backend", ["reference", "auto", CPP])
every_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@pytest.fixture(autouse=True)
def _alike(monkeypatch):
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def build(backend="auto", device="cpu"):
    return ConvFormer(32, blocks=2, bridge_heads=2, text_heads=2, expansion=2, backend=backend).to(device)


def inputs(batch=2, side=7, tokens=5, device="cpu", grad=False):
    image = torch.randn(batch, 32, side, side + 1, device=device).contiguous(memory_format=torch.channels_last)
    return image.requires_grad_(grad), torch.randn(batch, tokens, 32, device=device, requires_grad=grad)


def loss_of(found):
    return found.image.square().mean() + found.text.square().mean() + found.score.square().mean()


def learn(layer, image, text):
    """Result and the gradients of inputs and parameters."""
    found = layer(image, text)
    leaves = [image, text, *layer.parameters()]
    return [*(part.detach().clone() for part in found), *torch.autograd.grad(loss_of(found), leaves)]


def assert_close(found, wanted):
    """Same kernels, and around them the same sums in another order."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1, other.abs().max().item()))


def change(layer):
    """Other weights in the same memory."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.1)


# Compiled


@every_backend
@every_mode
def test_compiled_equals_eager(backend, training):
    layer = build(backend).train(training)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, side, tokens in ((2, 7, 5), (3, 10, 4)):
            arguments = inputs(batch, side, tokens, grad=training)
            if training:
                assert_close(learn(compiled, *arguments), learn(layer, *arguments))
            else:
                with torch.no_grad():
                    assert_close(compiled(*arguments), layer(*arguments))
    assert_close(compiled.buffers(), layer.buffers())


@every_backend
def test_compiled_has_the_weights_of_now(backend):
    layer, arguments = build(backend).eval(), inputs()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(*arguments)
        change(layer)
        found = compiled(*arguments)
        assert not torch.equal(found.score, before.score)
        assert_close(found, layer(*arguments))


@every_backend
def test_exported_equals_eager(backend):
    """A program exported with ``auto`` runs where there is no fusekern; a backend asked for stays in it."""
    layer, free = build(backend).eval(), torch.export.Dim.AUTO
    sizes = {"image": {0: free, 2: free, 3: free}, "text": {0: free, 1: free}}
    program = torch.export.export(layer, inputs(), dynamic_shapes=sizes)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    held = {op for op in OPS if any(name.startswith(f"fusekern.{op}.") for name in names)}
    assert held == (set(OPS) - {"former"} if backend == "cpp" else set())  # that is in text_path
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    arguments = inputs(3, 10, 4)
    with torch.no_grad():
        found = torch.export.load(file).module()(*arguments)
        assert type(found) is type(layer(*arguments))
        assert_close(found, layer(*arguments))


# In CUDA graphs, which run again what they have seen: on other values, in the same memory


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@every_mode
def test_graphed_callable_equals_eager(training):
    eager = build(device="cuda").train(training)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(eager), inputs(device="cuda", grad=True))
    graphed.load_state_dict(eager.state_dict())  # the warm-up has moved the running statistics
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (eager, graphed)]
    before = None
    for _ in range(3):
        arguments, results = inputs(device="cuda", grad=True), []
        for layer, optimizer in zip((eager, graphed), optimizers, strict=True):
            found = layer(*arguments)
            optimizer.zero_grad()
            grads = torch.autograd.grad(loss_of(found), [*arguments, *layer.parameters()])
            for parameter, grad in zip(layer.parameters(), grads[2:], strict=True):
                parameter.grad = grad.clone()
            results.append([part.detach().clone() for part in (*found, *grads)])
            optimizer.step()
        assert_close(results[1], results[0])
        assert_close(graphed.buffers(), eager.buffers())
        assert before is None or not torch.equal(results[1][0], before)
        before = results[1][0]


@pytest.mark.gpu
@needs_cuda
@every_mode
def test_captured_training_step_equals_eager(training):
    layer = build(device="cuda").train(training)
    eager, arguments = copy.deepcopy(layer), inputs(device="cuda", grad=True)
    captured, graph = _capture(lambda: learn(layer, *arguments))
    layer.load_state_dict(eager.state_dict())
    for _ in range(2):
        with torch.no_grad():
            for argument, value in zip(arguments, inputs(device="cuda"), strict=True):
                argument.copy_(value)
        graph.replay()
        assert_close(captured, learn(eager, *arguments))
        assert_close(layer.buffers(), eager.buffers())
        before = captured[0].clone()
        change(layer)
        change(eager)
        graph.replay()
        assert not torch.equal(captured[0], before)
        assert_close(captured, learn(eager, *arguments))


@pytest.mark.gpu
@needs_cuda
def test_captured_inference_equals_eager():
    layer, arguments = build(device="cuda").eval(), inputs(device="cuda")
    with torch.no_grad():
        captured, graph = _capture(lambda: layer(*arguments))
        for _ in range(2):
            for argument, value in zip(arguments, inputs(device="cuda"), strict=True):
                argument.copy_(value)
            change(layer)
            before = captured.score.clone()
            graph.replay()
            assert not torch.equal(captured.score, before)
            assert_close(captured, layer(*arguments))


def _capture(function):
    """What the function returned while it was recorded, after three runs beside, and the graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return found, graph


@pytest.mark.gpu
@needs_cuda
def test_reduce_overhead_equals_eager():
    layer = build(device="cuda").eval()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    before = None
    with torch.no_grad():
        for _ in range(5):  # the first runs warm up and record, the others replay
            arguments = inputs(device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            found = [part.clone() for part in compiled(*arguments)]
            assert_close(found, layer(*arguments))
            assert before is None or not torch.equal(found[2], before)
            before = found[2]
            change(layer)
