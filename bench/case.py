"""A benchmark's subject: what is computed, in which shapes, at what least cost, and what the truth is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import peers
from fusekern import backends
from fusekern.testing import check_parity

LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclass(frozen=True)
class Shape:
    """``[B, C, H, H]`` and K text tokens, 0 where an op has none. Heads have 64 channels."""

    batch: int
    channels: int
    size: int
    tokens: int = 0

    @property
    def heads(self) -> int:
        return max(1, self.channels // 64)

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``"1,256,64,19"`` or ``"1,256,64"``."""
        return cls(*map(int, text.split(",")))

    def __str__(self) -> str:
        numbers = (self.batch, self.channels, self.size, self.tokens)
        return ",".join(map(str, numbers if self.tokens else numbers[:3]))


def shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(map(Shape.parse, texts))


class Case(ABC):
    """What a benchmark measures. Methods that compute take the tensors that ``sizes`` names, in its order.

    ``shapes`` gives for ``"cpu"``, ``"cuda"``, ``"quick"``, ``"headline"`` (where the goals are set) and ``"compile"``
    (few: compiling takes minutes) the shapes to measure. ``fed`` names the inputs of the ONNX model; the others are
    constants in it.
    """

    name: str
    op: str
    attention = False
    kernels = {"cpu": "cpp", "cuda": "triton"}
    others: dict[str, str] = {}  # further contenders, by the names of their methods
    native = ""  # a method that on CUDA is also timed with PyTorch's own kernels in the place of cuDNN's
    widened = False  # on a CPU 16 bits are also timed beside fusekern's own fp32
    engines_want_nchw = False  # ONNX's convolutions know no other layout
    draws = 1  # of values, over which the rule of parity takes errors together in 16 bits
    shapes: dict[str, tuple[Shape, ...]]
    fed: tuple[str, ...]

    @abstractmethod
    def sizes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by its name."""

    @abstractmethod
    def arguments(self, shape: Shape, *tensors: Tensor) -> tuple:
        """The op's own arguments, for ``fusekern.backends``."""

    def resolved(self, shape: Shape, *tensors: Tensor) -> str:
        """The backend that ``auto`` takes."""
        return backends.resolve(self.op, "auto", *self.arguments(shape, *tensors))

    def refused(self, shape: Shape, backend: str, *tensors: Tensor) -> list[str]:
        """Why a backend cannot take these tensors."""
        return backends.why_not(self.op, backend, *self.arguments(shape, *tensors))

    def judged_with(self, name: str) -> str:
        """In 16 bits, the group of results or gradients that the rule of parity takes as one. Behind a chain of
        roundings the error of a single tensor is luck, PyTorch's too, by more than the 10 % that the rule leaves."""
        return name

    def scaled(self, name: str, tensor: Tensor) -> Tensor:
        """Of normal values the tensor of this name: weights keep the variance of what they are multiplied with."""
        return tensor * (tensor.shape[0] / tensor.numel()) ** 0.5 if "weight" in name else tensor

    def timed(self, name: str, tensor: Tensor) -> Tensor:
        """The same for what is timed, where parity has to be judged on other values than users have."""
        return self.scaled(name, tensor)

    @abstractmethod
    def fused(self, shape: Shape, backend: str, *tensors: Tensor) -> Tensor:
        """fusekern's result, by the backend of this name."""

    @abstractmethod
    def reference(self, shape: Shape, *tensors: Tensor) -> Tensor:
        """What the op's own reference says: in float64 the truth."""

    def eager(self, shape: Shape, *tensors: Tensor) -> Tensor:
        return self.compose(shape, peers.attend, *tensors)

    @abstractmethod
    def compose(self, shape: Shape, attend, *tensors: Tensor) -> Tensor:
        """``eager`` with a given attention."""

    @abstractmethod
    def graph(self, shape: Shape, graph: peers.Graph, tensors: dict[str, Tensor], channels_last: bool) -> str:
        """Adds the nodes of the ONNX model and returns the result's name; images are ``[B, H, W, C]`` if asked."""

    def onnx(
        self,
        shape: Shape,
        tensors: dict[str, Tensor],
        channels_last: bool,
        fed: dict[str, tuple[int, ...]],
        size: tuple[int, ...],
    ) -> tuple[bytes, str]:
        """The ONNX model, whose inputs and result have these sizes, and the name of the result."""
        graph = peers.Graph()
        result = self.graph(shape, graph, tensors, channels_last)
        return graph.model(fed, result, size), result

    def parts(self, shape: Shape, out: Tensor) -> dict[str, Tensor]:
        """What of the result is judged by itself, because another part's scale would hide its errors."""
        return {"out": out}

    @abstractmethod
    def flops(self, shape: Shape) -> tuple[int, int]:
        """Of forward and backward; what a backward recomputes is not counted."""

    @abstractmethod
    def elements(self, shape: Shape) -> tuple[int, int]:
        """Values that forward and backward cannot but move: each input read once, each output written once."""


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    return tensor.contiguous(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor


def make(
    case: Case, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0, timed: bool = False
) -> dict[str, Tensor]:
    """Normal values, scaled as the case has it: to be judged, or to be timed."""
    scaled = case.timed if timed else case.scaled
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for name, size in case.sizes(shape).items():
        tensor = torch.randn(size, generator=generator, device=device)
        made[name] = scaled(name, tensor).to(dtype)
    return made


def with_gradients(call, tensors: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradient of every tensor."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


class Truth:
    """What PyTorch says in float64, and in the dtype at hand over its orderings and layouts; of values that are timed,
    of which parity judges no gradients, the results alone. If not ``whole``, only gradients that no other is judged
    with are kept: of all parameters they would fill the memory."""

    def __init__(
        self,
        case: Case,
        shape: Shape,
        dtype: torch.dtype,
        device: str,
        timed: bool = False,
        draw: int = 0,
        whole: bool = True,
    ) -> None:
        self.case, self.shape, self.learning = case, shape, not timed
        self.tensors = make(case, shape, dtype, device, 2 * draw, timed)
        together = Counter(case.judged_with(f"d{name}") for name in self.tensors)
        self.kept = [name for name in self.tensors if whole or together[case.judged_with(f"d{name}")] == 1]
        exact = [tensor.double() for tensor in self.tensors.values()]
        with torch.no_grad():
            size = case.reference(shape, *exact).shape
        generator = torch.Generator(device).manual_seed(2 * draw + 1)
        self.grad = torch.randn(size, generator=generator, device=device).to(dtype)
        self.exact = self.run(case.reference, exact, self.grad.double())
        self.peers = self._layouts(case.reference)
        # A wrong peer would widen the rule's tolerance until it allows anything.
        self.peers += [peer for peer in self._layouts(case.eager) if not self.sane(peer[0])]

    def _layouts(self, call) -> list[tuple[Tensor, ...]]:
        return [self.run(call, self.laid_out(layout), lay_out(self.grad, layout)) for layout in LAYOUTS]

    def run(self, call, tensors: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        if self.learning:
            return self.learn(lambda *leaves: call(self.shape, *leaves), tensors, grad)
        with torch.no_grad():
            return (call(self.shape, *tensors),)

    def learn(self, call, tensors: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """A result and the gradients that are kept."""
        out, *gradients = with_gradients(call, tensors, grad)
        return (out, *(found for name, found in zip(self.tensors, gradients, strict=True) if name in self.kept))

    def laid_out(self, layout: str) -> list[Tensor]:
        return [lay_out(tensor, layout) for tensor in self.tensors.values()]

    def named(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        """A result's parts and its gradients by name."""
        out, *gradients = found
        names = (f"d{name}" for name in self.kept) if gradients else ()
        return {**self.case.parts(self.shape, out), **dict(zip(names, gradients, strict=True))}

    def judge(self, found: Sequence[Tensor]) -> list[str]:
        """What is wrong with a result and, if they are given too, its gradients."""
        return judge([self], [found])

    def errors(self, found: Sequence[Tensor]) -> dict[str, tuple[float, float]]:
        """For every name the largest error and the relative L2 error."""
        exact = self.named(self.exact)
        return {name: _error(value, exact[name]) for name, value in self.named(found).items()}

    def sane(self, out: Tensor) -> list[str]:
        """A peer need not pass the rule that fusekern does, but must compute the same function."""
        error = _error(out, self.exact[0])[1]
        allowed = 8 * max(_error(peer[0], self.exact[0])[1] for peer in self.peers) + torch.finfo(out.dtype).eps
        return [] if error <= allowed else [f"wrong result: relative L2 error {error:.3g}, allowed {allowed:.3g}"]


def draws(case: Case, shape: Shape, dtype: torch.dtype, device: str, timed: bool = False) -> list[Truth]:
    """The truths by which the case is judged; where gradients are judged as one, one draw has numbers enough."""
    count = case.draws if dtype.itemsize == 2 else 1
    return [Truth(case, shape, dtype, device, timed, draw, whole=draw == 0) for draw in range(count)]


def judge(truths: Sequence[Truth], found: Sequence[Sequence[Tensor]]) -> list[str]:
    """What is wrong with a result of each draw and, if they are given too, its gradients. The draws count as one; where
    several gradients do, one draw has numbers enough, and there may be too many for more."""
    case, groups = truths[0].case, {}
    parts = case.parts(truths[0].shape, found[0][0])
    for name in truths[0].named(found[0]):
        group = case.judged_with(name) if found[0][0].dtype.itemsize == 2 else name
        groups.setdefault(group, []).append(name)
    peers, wrong = min(len(truth.peers) for truth in truths), []
    for group, names in groups.items():
        drawn = list(zip(truths, found, strict=True))[: 1 if len(names) > 1 else None]
        sides = [columns(truth, mine, names, peers) for truth, mine in drawn]
        mine, exact, *others = (torch.cat(column) for column in zip(*sides, strict=True))
        faults = check_parity(mine, others, exact, gradient=names[0] not in parts)
        wrong += [f"{group}: {fault}" for fault in faults]
    return wrong


def columns(truth: Truth, found: Sequence[Tensor], names: Sequence[str], peers: int) -> list[Tensor]:
    """The tensors of these names one after the other, as found, as they are in truth, and as each peer has them. If
    they are several, each is multiplied by the power of 2 that brings it nearest to 1."""
    exact, *others = (truth.named(of) for of in (truth.exact, *truth.peers[:peers]))
    scales = dict.fromkeys(names, 1.0)
    if len(names) > 1:
        scales = {name: _power_of_two(exact[name], [other[name] for other in others]) for name in names}
    every = (truth.named(found), exact, *others)
    return [torch.cat([(of[name] * scale).flatten() for name, scale in scales.items()]) for of in every]


def _power_of_two(exact: Tensor, others: Sequence[Tensor]) -> float:
    """The one by which values come nearest to 1, exactly in any dtype; 1 for zeros. What is zero but for roundings, as
    the gradient of a bias that a softmax takes away, counts by the size of these."""
    size = max(part.square().mean().sqrt() for part in (exact, *(other - exact for other in others)))
    return 2.0 ** -round(size.log2().item()) if size > 0 and size.isfinite() else 1.0


def _error(value: Tensor, exact: Tensor) -> tuple[float, float]:
    error = value.double() - exact
    return error.abs().max().item(), (error.norm() / exact.norm().clamp_min(1e-300)).item()
