"""The contenders of a benchmark: fusekern's kernel, and the others in their best form.

``reference``      fusekern's plain PyTorch, written for clarity
``eager``          plain PyTorch at its strongest: channels_last, ``scaled_dot_product_attention``
``sdpa-...``       the same with SDPA pinned to one of its kernels (CUDA)
``flex``           the same through FlexAttention, compiled (CUDA)
``compile...``     ``torch.compile`` of ``eager``, in three modes, and of the reference
``fusekern-float32``  fusekern's kernel on the same numbers in fp32, beside one in 16 bits (cases that ask for it)
``onnxruntime``    and ``openvino``: a CPU's inference engines, fp32, writing into a buffer that stays

Each contender is a function of the case's tensors. One that cannot run is named all the same, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PINNED = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MODES = {
    "compile": {},
    "compile-max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "compile-reduce-overhead": {"mode": "reduce-overhead"},
}
FUSED = "fusekern"
WIDE = "fusekern-float32"
GRAPHED = ", graphed"


class Unavailable(Exception):
    """Why a contender cannot run here."""


@dataclass(frozen=True)
class Contender:
    """
    Args:
        call: a function of the case's tensors.
        context: entered around every burst of calls.
        gradients: it has a backward.
        capture: its calls are also timed inside a CUDA graph.
        graphed: it is a CUDA graph by itself.
        dtype: of the tensors that it takes, if not that of the row.
    """

    call: Callable[..., Tensor]
    context: Callable[[], AbstractContextManager] = nullcontext
    gradients: bool = True
    capture: bool = False
    graphed: bool = False
    dtype: torch.dtype | None = None

    def taken(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as it takes them."""
        return [tensor if self.dtype is None else tensor.to(self.dtype) for tensor in tensors]


def names(case, device: str, compiled: bool) -> list[str]:
    """All contenders of a case on a device; ``compiled`` adds those that take minutes to compile."""
    found = [FUSED, "reference", "eager", *case.others]
    if device == "cuda" and case.attention:
        found += PINNED
    if device == "cuda" and case.native:
        found.append("native")
    if compiled:
        found += ["compile", "compile-reference"]
        if device == "cuda":
            found += ["compile-max-autotune", "compile-reduce-overhead"] + (["flex"] if case.attention else [])
    if device == "cpu":
        found += ([WIDE] if case.widened else []) + ["onnxruntime", "openvino"]
    return found


def build(name: str, case, shape, tensors: dict[str, Tensor], channels_last: bool, backend: str) -> Contender:
    """
    Raises:
        Unavailable: it cannot run on these tensors.
    """
    if name == FUSED:
        if reasons := case.refused(shape, backend, *tensors.values()):
            raise Unavailable("; ".join(reasons))
        return Contender(partial(case.fused, shape, backend), capture=True)
    if name == WIDE:
        if next(iter(tensors.values())).dtype == torch.float32:
            raise Unavailable("this row is of fp32")
        return replace(build(FUSED, case, shape, tensors, channels_last, backend), dtype=torch.float32)
    if name == "reference":
        return Contender(partial(case.reference, shape), capture=True)
    if name == "eager":
        return Contender(partial(case.eager, shape), capture=True)
    if name in case.others:
        return Contender(partial(getattr(case, case.others[name]), shape), capture=True)
    if name == "native":
        without = partial(torch.backends.cudnn.flags, enabled=False)
        return Contender(partial(getattr(case, case.native), shape), context=without, capture=True)
    if name in PINNED:
        return Contender(partial(case.eager, shape), context=lambda: sdpa_kernel(PINNED[name]), capture=True)
    if name == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        attend = partial(case.compose, shape, flex_attention)
        return Contender(torch.compile(attend, dynamic=False))
    if name == "compile-reference":
        return Contender(torch.compile(partial(case.reference, shape), dynamic=False))
    if name in MODES:
        call = torch.compile(partial(case.eager, shape), dynamic=False, **MODES[name])
        if name != "compile-reduce-overhead":
            return Contender(call)
        return Contender(partial(_new_step, call), graphed=True)
    return Contender(_engine(name, case, shape, tensors, channels_last), gradients=False)


def _new_step(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    return call(*tensors)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """SDPA under the argument names that FlexAttention shares."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def rows(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` as ``[B, H W, C]`` with channels side by side: a view of channels_last, a copy of NCHW.

    SDPA's fused kernels, and so all of its speed, need that.
    """
    tokens = image.flatten(2).transpose(1, 2)
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """``[B, N, C]`` as ``[B, heads, N, d]``, a view."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


class Graph:
    """An ONNX model, node by node: ``add`` returns the name of the new node's result."""

    def __init__(self) -> None:
        self.helper = import_module("onnx").helper
        self.arrays = import_module("onnx").numpy_helper
        self.nodes: list = []
        self.constants: list = []

    def constant(self, values: object) -> str:
        """A tensor, or a list of integers, that is part of the model."""
        array = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
        name = f"constant{len(self.constants)}"
        self.constants.append(self.arrays.from_array(array, name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def reshape(self, value: str, *size: int) -> str:
        return self.add("Reshape", value, self.constant(size))

    def transpose(self, value: str, *order: int) -> str:
        return self.add("Transpose", value, perm=order)

    def scaled(self, value: str, factor: float) -> str:
        return self.add("Mul", value, self.constant(np.float32(factor)))

    def model(self, inputs: dict[str, tuple[int, ...]], result: str, size: tuple[int, ...]) -> bytes:
        value, real = self.helper.make_tensor_value_info, 1
        graph = self.helper.make_graph(
            self.nodes,
            "graph",
            [value(name, real, shape) for name, shape in inputs.items()],
            [value(result, real, size)],
            self.constants,
        )
        opsets = [self.helper.make_opsetid("", 17)]
        return self.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def _engine(name: str, case, shape, tensors: dict[str, Tensor], channels_last: bool) -> Callable[..., Tensor]:
    """The case's ONNX model in an inference engine on one thread, bound to these tensors and to one result."""
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors.values()):
        raise Unavailable("timed on a CPU in fp32 only")
    for package in ("onnx", name):
        if find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
    with torch.no_grad():
        size = case.eager(shape, *tensors.values()).shape
    channels_last = channels_last and not case.engines_want_nchw
    out = torch.empty(size, memory_format=torch.channels_last if channels_last and len(size) == 4 else None)
    buffer, fed = (_fed(out, channels_last), {key: _fed(tensors[key], channels_last) for key in case.fed})
    sizes = {key: tuple(tensor.shape) for key, tensor in fed.items()}
    model, result = case.onnx(shape, tensors, channels_last, sizes, tuple(buffer.shape))
    run = {"onnxruntime": _onnxruntime, "openvino": _openvino}[name](model, fed, result, buffer)

    def call(*_: Tensor) -> Tensor:
        run()
        return out

    call.bound = fed, buffer  # the engine knows their addresses alone
    return call


def _fed(tensor: Tensor, channels_last: bool) -> Tensor:
    """Engines know no strides: an image in channels_last is a contiguous ``[B, H, W, C]``."""
    tensor = tensor.detach()
    return tensor.permute(0, 2, 3, 1) if channels_last and tensor.dim() == 4 else tensor.contiguous()


def _onnxruntime(model: bytes, fed: dict[str, Tensor], result: str, buffer: Tensor) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for key, tensor in fed.items():
        binding.bind_input(key, "cpu", 0, np.float32, list(tensor.shape), tensor.data_ptr())
    binding.bind_output(result, "cpu", 0, np.float32, list(buffer.shape), buffer.data_ptr())
    return lambda: session.run_with_iobinding(binding)


def _openvino(model: bytes, fed: dict[str, Tensor], result: str, buffer: Tensor) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    # Left to itself it computes in bf16 where the CPU can.
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    request = core.compile_model(core.read_model(model), "CPU").create_infer_request()
    for key, tensor in fed.items():
        request.set_tensor(key, openvino.Tensor(tensor.numpy(), shared_memory=True))
    request.set_tensor(result, openvino.Tensor(buffer.numpy(), shared_memory=True))
    return request.infer
