"""Choice of the backend, with kernels that are only claimed: nothing here runs one."""

import logging
import re

import pytest
import torch

from fusekern import FusekernError, backends, use_backend
from fusekern.backends import resolve, why_not

TENSOR = torch.zeros(1)


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    """A version that has none; the test's end brings them back."""
    monkeypatch.setattr(backends, "_kernels", {op: {} for op in backends.OPS})


@pytest.fixture
def cpp(monkeypatch):
    """A version in which the C++ backend is built; the fixture registers kernels."""
    monkeypatch.setitem(backends.BACKENDS, "cpp", backends.Backend("C++", "cpu", ""))

    def register(refuse):
        backends.register("former", "cpp", lambda *arguments: refuse)

    return register


def test_auto_takes_the_reference_where_nothing_else_is():
    assert resolve("former", "auto", TENSOR) == "reference"


def test_auto_takes_a_kernel_that_can_run(cpp):
    cpp([])
    assert resolve("former", "auto", TENSOR) == "cpp"
    assert resolve("former", "reference", TENSOR) == "reference"
    assert resolve("downsample", "auto", TENSOR) == "reference"


def test_auto_passes_over_a_kernel_that_cannot(cpp):
    cpp(["K is 1000, it takes up to 847"])
    assert resolve("former", "auto", TENSOR) == "reference"
    with pytest.raises(FusekernError, match="^backend 'cpp' cannot run former: K is 1000, it takes up to 847$"):
        resolve("former", "cpp", TENSOR)


def test_a_kernel_sees_the_arguments_of_the_op(cpp):
    seen = []
    backends.register("former", "cpp", lambda *arguments: seen.extend(arguments) or [])
    resolve("former", "auto", TENSOR, 8, None)
    assert seen == [TENSOR, 8, None]


def test_all_reasons_come_together():
    reasons = why_not("conv2former", "cuda", TENSOR)
    missing = backends.BACKENDS["cuda"].missing
    assert missing == "" or missing.startswith("_C_cuda is not there: ")
    assert reasons == [
        *([missing] if missing else []),
        "it runs on cuda and the tensors are on cpu",
        "this version has no CUDA kernel of it",
    ]
    with pytest.raises(FusekernError, match=re.escape("; ".join(reasons))):
        resolve("conv2former", "cuda", TENSOR)


def test_use_backend_for_a_block_and_from_now_on():
    with use_backend("triton"):
        with pytest.raises(FusekernError, match="triton"):
            resolve("former", "auto", TENSOR)
        assert resolve("former", "reference", TENSOR) == "reference"
        with use_backend("auto"):
            assert resolve("former", "auto", TENSOR) == "reference"
        with pytest.raises(FusekernError, match="triton"):
            resolve("former", "auto", TENSOR)
    assert resolve("former", "auto", TENSOR) == "reference"
    use_backend("cpp")
    try:
        with pytest.raises(FusekernError, match="cpp"):
            resolve("former", "auto", TENSOR)
    finally:
        use_backend("auto")


def test_the_default_comes_back_after_an_error():
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert resolve("former", "auto", TENSOR) == "reference"


def test_unknown_names():
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpp, triton, cuda, got 'tpu'"):
        use_backend("tpu")
    with pytest.raises(ValueError, match="got None"):
        resolve("former", None, TENSOR)
    assert resolve("former", "auto", TENSOR) == "reference"


def test_reasons_are_told_at_debug_alone(caplog):
    with caplog.at_level(logging.INFO, logger="fusekern"):
        resolve("former", "auto", TENSOR)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="fusekern"):
        resolve("former", "auto", TENSOR)
    assert "former runs on reference, not on cuda: " in caplog.text


def test_debug_logging_does_not_break_a_graph(caplog):
    def call(x):
        return x + (resolve("former", "auto", x) == "reference")

    with caplog.at_level(logging.DEBUG, logger="fusekern"):
        assert torch.compile(call, fullgraph=True, backend="eager")(TENSOR) == 1
    assert "former runs on" not in caplog.text


def test_a_compiled_function_follows_the_default():
    def call(x):
        return resolve("former", "auto", x)

    compiled = torch.compile(call, backend="eager")
    assert compiled(TENSOR) == "reference"
    with use_backend("cpp"), pytest.raises(FusekernError):
        compiled(TENSOR)


@pytest.mark.parametrize("strict", [False, True])
def test_auto_is_the_kernel_compiled_and_the_reference_exported(cpp, strict):
    cpp([])

    class Call(torch.nn.Module):
        def forward(self, x):
            return x + (1 if resolve("former", "auto", x) == "cpp" else 2)

    torch._dynamo.reset()
    assert torch.compile(Call(), fullgraph=True, backend="eager")(TENSOR) == 1
    assert torch.export.export(Call(), (TENSOR,), strict=strict).module()(TENSOR) == 2
