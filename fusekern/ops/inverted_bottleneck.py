"""The convolutional path of a block: MobileNetV2's inverted bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fusekern.backends import BACKENDS, register, resolve
from fusekern.ops._batch_norm import Norm, backward_of, fill_vectors, new_vectors, over_processes, readable
from fusekern.ops._check import check_alike, check_choice, check_shape, check_tensors
from fusekern.ops._dispatcher import differentiate, fake_of, kernel_op, no_second_derivative
from fusekern.ops._kernel import empty_image, follow_autocast, launch
from fusekern.ops._limits import cpp_dtypes, triton_dtypes

MEMORY = ("default", "low")


class BatchNorm(NamedTuple):
    """One batch norm over ``c`` channels, in the shape that the op takes it.

    Args:
        weight: ``[c]`` or none.
        bias: ``[c]`` or none.
        mean: ``[c]``, the running mean, or none if ``batch``.
        var: ``[c]``, the running variance, or none if ``batch``.
        eps: added to the variance.
        batch: normalise by the statistics of this batch (training) instead of the running ones.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    batch: bool


class BatchStatistics(NamedTuple):
    """What a batch norm saw: mean ``[c]`` and unbiased variance ``[c]`` of the batch, as running averages take them."""

    mean: Tensor
    var: Tensor


class Recipe(NamedTuple):
    """How to make a result of the op's kernels again, of what they keep for their backward: see ``made_again``."""

    result: Tensor
    y3: Tensor
    vectors3: Tensor
    skip: Tensor | None
    backend: str


def _batch_norm(x: Tensor, norm: BatchNorm, group: str = "") -> tuple[Tensor, BatchStatistics | None]:
    if not norm.batch:
        return F.batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps), None
    if group:
        return _batch_norm_of_all(x, norm, group)
    # Running averages that forget everything are the statistics of this batch, from PyTorch's own pass over x.
    seen = BatchStatistics(*(x.new_zeros(x.shape[1], dtype=_like(norm, x).dtype) for _ in range(2)))
    y = F.batch_norm(x, seen.mean, seen.var, norm.weight, norm.bias, training=True, momentum=1.0, eps=norm.eps)
    return y, seen


class _OverProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes of a group, in which each has a part of the loss."""

    @staticmethod
    def forward(ctx, part: Tensor, processes: object) -> Tensor:
        ctx.processes = processes
        total = part.clone()
        dist.all_reduce(total, group=processes)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.processes)
        return total, None


def _batch_norm_of_all(x: Tensor, norm: BatchNorm, group: str) -> tuple[Tensor, BatchStatistics]:
    """Over the batches of all processes of a group, with gradients through their statistics."""
    processes = dist.distributed_c10d._resolve_process_group(group)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))

    def total(part: Tensor) -> Tensor:
        return _OverProcesses.apply(part, processes)

    count = total(wide.new_tensor(x.numel() // x.shape[1]))
    mean = total(wide.sum((0, 2, 3))) / count
    centred = wide - mean[:, None, None]
    squares = total(centred.square().sum((0, 2, 3)))
    y = centred * (squares / count + norm.eps).rsqrt()[:, None, None]
    if norm.weight is not None:
        y = y * norm.weight[:, None, None]
    if norm.bias is not None:
        y = y + norm.bias[:, None, None]
    dtype = _like(norm, x).dtype
    seen = (mean, squares / (count - 1).clamp_min(1))
    return y.to(x.dtype), BatchStatistics(*(part.detach().to(dtype) for part in seen))


def _like(norm: BatchNorm, x: Tensor) -> Tensor:
    """What the statistics' dtype is that of."""
    return next((t for t in (norm.mean, norm.weight) if t is not None), x)


def inverted_bottleneck_reference(
    image: Tensor,
    expand: Tensor,
    depthwise: Tensor,
    project: Tensor,
    norms: tuple[BatchNorm, BatchNorm, BatchNorm],
    *,
    stride: int = 1,
    residual: bool = True,
    group: str = "",
) -> tuple[Tensor, tuple[BatchStatistics | None, ...]]:
    """Plain PyTorch; see ``inverted_bottleneck``."""
    if image.numel() == 0 and not group:  # convolutions refuse an empty map
        return _of_nothing(image, project, stride, residual), (None, None, None)
    y, seen1 = _batch_norm(F.conv2d(image, expand), norms[0], group)
    y = F.relu6(y)
    padding = depthwise.shape[2] // 2
    y, seen2 = _batch_norm(F.conv2d(y, depthwise, stride=stride, padding=padding, groups=y.shape[1]), norms[1], group)
    y = F.relu6(y)
    y, seen3 = _batch_norm(F.conv2d(y, project), norms[2], group)
    return image + y if residual else y, (seen1, seen2, seen3)


def _of_nothing(image: Tensor, project: Tensor, stride: int, residual: bool) -> Tensor:
    if residual:
        return image.clone()
    size = [_strided(side, stride) for side in image.shape[2:]]
    return image.new_zeros(image.shape[0], project.shape[0], *size) + 0 * image.sum()


def _strided(side: int, stride: int) -> int:
    return (side + stride - 1) // stride


# ---- kernels -----------------------------------------------------------------------------------------------------
#
# Between two batch norms lies a stage, for which a backend has a function. To it a norm is vectors of one number a
# channel; fusekern/ops/_batch_norm.py says what they are. A stage that sums up for a norm also makes its `vectors`, or
# in the backward its `coef` and the weight's gradient, unless the sums are to go over processes: then it gives `stats`,
# or `sums` alone. What a stage returns, if anything, the next one gets as `left`. What all backends share stands here.

_NORMS = ", ".join(f"Tensor? {part}{i}" for i in (1, 2, 3) for part in ("weight", "bias", "mean", "var"))
_KNOWN = ", ".join(f"Tensor? weight{i}, Tensor? bias{i}, Tensor mean{i}, Tensor var{i}" for i in (1, 2, 3))
_SETTINGS = "float[] eps, bool[] batch, int stride, bool residual"


def _norms_of(parts, eps, batch, backend) -> tuple[Norm, Norm, Norm]:
    parts = [readable(part, backend) for part in parts]
    return tuple([Norm(*parts[4 * i : 4 * i + 4], eps[i], batch[i]) for i in range(3)])


def _matrices(expand: Tensor, depthwise: Tensor, project: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights as the stages have them: ``[E, C]``, ``[E, k, k]``, ``[O, E]``."""
    return expand.flatten(1).contiguous(), depthwise.flatten(0, 1).contiguous(), project.flatten(1).contiguous()


def _output(image: Tensor, channels: int, stride: int) -> Tensor:
    """Uninitialised."""
    return empty_image(image, channels, (_strided(image.shape[2], stride), _strided(image.shape[3], stride)))


def _outputs(image: Tensor, hidden: int, channels: int, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, y1, y2 and y3, uninitialised."""
    out = _output(image, channels, stride)
    return out, empty_image(image, hidden), empty_image(image, hidden, out.shape[2:]), torch.empty_like(out)


def _pixels(tensor: Tensor) -> int:
    return tensor.shape[0] * tensor.shape[2] * tensor.shape[3]


def _kept(image: Tensor, y1: Tensor, y2: Tensor, y3: Tensor, learning: bool, low: bool) -> tuple[Tensor, ...]:
    """What a forward keeps of y1, y2 and y3 for the backward; nothing is an empty tensor."""
    wanted = (learning and not low, learning, learning)
    return tuple(y if on else image.new_empty(0) for y, on in zip((y1, y2, y3), wanted, strict=True))


def _stages(backend: str, image: Tensor) -> Callable[..., object]:
    """Runs a backend's stage by its name; without a pixel there is none to run."""

    def run(stage: str, *arguments: object, left: object = None) -> object:
        if not image.numel():
            return None
        more = {} if left is None else {"left": left}
        return launch(backend, "inverted_bottleneck", stage, *arguments, **more)

    return run


@kernel_op(
    "inverted_bottleneck_infer",
    f"(Tensor image, Tensor expand, Tensor depthwise, Tensor project, {_KNOWN}, float[] eps, int stride, "
    "bool residual, str backend) -> Tensor",
)
def _infer(image, expand, depthwise, project, *rest):
    """With norms by running statistics, and nothing to be learned."""
    *parts, eps, stride, residual, backend = rest
    parts = [part if part is None else part.contiguous() for part in parts]
    norms = *parts[:4], eps[0], *parts[4:8], eps[1], *parts[8:], eps[2]
    out = _output(image, project.shape[0], stride)
    if out.numel():
        weights = _matrices(expand, depthwise, project)
        launch(backend, "inverted_bottleneck", "infer", image, *weights, *norms, stride, residual, out)
    return out


@fake_of(_infer)
def _(image, expand, depthwise, project, *rest):
    return _output(image, project.shape[0], rest[13])


@kernel_op(
    "inverted_bottleneck",
    f"(Tensor image, Tensor expand, Tensor depthwise, Tensor project, {_NORMS}, {_SETTINGS}, "
    "bool learning, bool low, str group, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _inverted_bottleneck(image, expand, depthwise, project, *rest):
    *parts, eps, batch, stride, residual, learning, low, group, backend = rest
    norms = _norms_of(parts, eps, batch, backend)
    w1, wd, w3 = _matrices(expand, depthwise, project)
    run = _stages(backend, image)
    vectors = [new_vectors(image, 5, width) for width in (w1.shape[0], w1.shape[0], w3.shape[0])]
    affine = [of[:2] for of in vectors]
    if not all(batch):
        fill_vectors([None if norm.batch else norm for norm in norms], vectors, backend)
    out, y1, y2, y3 = _outputs(image, w1.shape[0], w3.shape[0], stride)

    def run_before(i: int, left: object, stage: str, *arguments: object) -> object:
        """A stage whose result, the last of the arguments, norm i sees."""
        norm, y = norms[i], arguments[-1]
        if not norm.batch:
            return run(stage, *arguments, None, left=left)
        if not group:
            return run(stage, *arguments, None, vectors[i], norm.weight, norm.bias, norm.eps, left=left)
        stats = new_vectors(image, 2, y.shape[1])
        left = run(stage, *arguments, stats, left=left)
        over_processes(stats, _pixels(y), group, vectors[i])
        fill_vectors([norm if other == i else None for other in range(3)], vectors, backend)
        return left

    left = run_before(0, None, "expand_fwd", image, w1, y1)
    left = run_before(1, left, "depthwise_fwd", y1, affine[0], wd, stride, y2)
    run_before(2, left, "project_fwd", y2, affine[1], w3, y3)
    run("residual_fwd", y3, affine[2], image if residual else None, out)
    return (out, *_kept(image, y1, y2, y3, learning, low), *vectors)


@fake_of(_inverted_bottleneck)
def _(image, expand, depthwise, project, *rest):
    *_, stride, _, learning, low, _, _ = rest
    out, y1, y2, y3 = _outputs(image, expand.shape[0], project.shape[0], stride)
    vectors = [image.new_empty(5, y.shape[1], dtype=torch.float32) for y in (y1, y2, y3)]
    return (out, *_kept(image, y1, y2, y3, learning, low), *vectors)


@kernel_op(
    "inverted_bottleneck_backward",
    "(Tensor grad, Tensor image, Tensor expand, Tensor depthwise, Tensor project, Tensor y1, Tensor y2, "
    f"Tensor y3, Tensor vectors1, Tensor vectors2, Tensor vectors3, {_NORMS}, {_SETTINGS}, str group, str backend) "
    f"-> ({', '.join(['Tensor'] * 10)})",
)
def _inverted_bottleneck_backward(grad, image, expand, depthwise, project, y1, y2, y3, *rest):
    *vectors, eps, batch, stride, residual, group, backend = rest
    vectors, norms = vectors[:3], _norms_of(vectors[3:], eps, batch, backend)
    w1, wd, w3 = _matrices(expand, depthwise, project)
    weight_like = torch.empty_like if image.numel() else torch.zeros_like
    dimage, dw1, dwd, dw3 = empty_image(image), *map(weight_like, (w1, wd, w3))
    run = _stages(backend, image)
    if not y1.numel():  # memory was low
        y1 = empty_image(image, w1.shape[0])
        run("expand_fwd", image, w1, y1, None)
    learned = []

    def run_before(i: int, left: object, y: Tensor, stage: str, *arguments: object) -> tuple[Tensor, object]:
        """A stage that ends with the sums of norm i, whose ``coef`` this returns; y is what the norm saw."""
        norm, width = norms[i], y.shape[1]
        sums, coef = new_vectors(image, 2, width), new_vectors(image, 4, width)
        dweight = coef.new_empty(width, dtype=_gradient_dtype(norm.weight))
        dbias = sums[0]
        if _gradient_dtype(norm.bias) != sums.dtype:
            dbias = sums.new_empty(width, dtype=norm.bias.dtype)
        if group:
            left = run(stage, *arguments, sums, left=left)
            backward_of(norm, vectors[i], sums, _pixels(y), group, backend, coef, dweight)
            if dbias.dtype != sums.dtype:
                dbias.copy_(sums[0])
        else:
            own = () if dbias.dtype == sums.dtype else (dbias,)
            settings = vectors[i], norm.weight, norm.eps, norm.batch, *own
            left = run(stage, *arguments, sums, coef, dweight, *settings, left=left)
        learned.extend((dbias, dweight))
        return coef, left

    coef, left = run_before(2, None, y3, "output_bwd", grad, y3, vectors[2][2])
    dz = torch.empty_like(y2)
    norm = vectors[1][:2], vectors[1][2]
    coef, left = run_before(1, left, y2, "project_bwd", grad, y3, coef, y2, *norm, w3, dz, dw3)
    d = torch.empty_like(y1)
    norm = vectors[0][:2], vectors[0][2]
    coef, _ = run_before(0, left, y1, "depthwise_bwd", dz, y2, coef, y1, *norm, wd, stride, d, dwd)
    del dz
    run("expand_bwd", d, y1, coef, image, w1, grad if residual else None, dimage, dw1)
    weights = dw1.view(expand.shape), dwd.view(depthwise.shape), dw3.view(project.shape)
    return (dimage, *weights, *reversed(learned))


def _gradient_dtype(part: Tensor | None) -> torch.dtype:
    """Of a norm's parameter, as a backend's kernels read it."""
    return torch.float32 if part is None else part.dtype


@fake_of(_inverted_bottleneck_backward)
def _(grad, image, expand, depthwise, project, y1, y2, y3, *rest):
    *vectors, eps, batch, _, _, _, backend = rest
    weights = (weight.new_empty(weight.shape) for weight in (expand, depthwise, project))
    widths = (expand.shape[0], expand.shape[0], project.shape[0])
    learned = (
        image.new_empty(c, dtype=_gradient_dtype(part))
        for c, norm in zip(widths, _norms_of(vectors[3:], eps, batch, backend), strict=True)
        for part in norm[:2]
    )
    return (empty_image(image), *weights, *learned)


def _setup_context(ctx, inputs, output):
    image, expand, depthwise, project, *parts = inputs[:16]
    ctx.eps, ctx.batch, ctx.stride, ctx.residual, _, _, ctx.group, ctx.backend = inputs[16:]
    # The vectors have what the running statistics had, which the caller may change until the backward.
    kept = [part for i in range(3) for part in (*parts[4 * i : 4 * i + 2], None, None)]
    ctx.save_for_backward(image, expand, depthwise, project, *output[1:], *kept)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *others):
    if grad is None:
        return (None,) * 24
    saved = ctx.saved_tensors
    settings = ctx.eps, ctx.batch, ctx.stride, ctx.residual, ctx.group, ctx.backend
    dimage, dexpand, ddepthwise, dproject, *vectors = _inverted_bottleneck_backward(grad, *saved, *settings)
    parts = saved[10:]
    found = []
    for i in range(3):
        for vector, part in zip(vectors[2 * i : 2 * i + 2], parts[4 * i : 4 * i + 2], strict=True):
            found.append(None if part is None else vector.to(part.dtype))
        found.extend((None, None))
    return (dimage, dexpand, ddepthwise, dproject, *found, *(None,) * 8)


differentiate(_inverted_bottleneck, _backward, _setup_context)
differentiate(_inverted_bottleneck_backward, no_second_derivative("inverted_bottleneck"))


@kernel_op("inverted_bottleneck_again", "(Tensor y3, Tensor vectors3, Tensor? skip, str backend) -> Tensor")
def made_again(y3, vectors3, skip, backend):
    """The result of a forward, by the stage that made it: to the bit."""
    out = torch.empty_like(y3)
    _stages(backend, y3)("residual_fwd", y3, vectors3[:2], skip, out)
    return out


@fake_of(made_again)
def _(y3, vectors3, skip, backend):
    return torch.empty_like(y3)


differentiate(made_again, no_second_derivative("inverted_bottleneck"))


def _known_sizes(others):
    def why_not(image, expand, depthwise, project, norms, stride, group):
        size = depthwise.shape[2]
        kernel = [] if size in (3, 5) else [f"a {size}x{size} kernel, it takes 3x3 and 5x5"]
        steps = [] if stride in (1, 2) else [f"stride {stride}, it takes 1 and 2"]
        return [*others(image, expand), *kernel, *steps]

    return why_not


def _cuda(image, expand, *rest):
    # The depthwise stages are CUDA, the pointwise ones Triton.
    height, width = image.shape[2:]
    large = ["rows too long for its offsets"] if 64 * width * max(expand.shape[0], height) >= 2**31 else []
    return [*filter(None, [BACKENDS["triton"].missing]), *triton_dtypes(image), *large]


def _why_slow_cpp(image, *rest):
    # Its bf16 products are torch's, and so is most of the time; in bench/results/inverted_bottleneck-cpu.json.
    narrow = image.dtype == torch.bfloat16 and image.stride(1) == 1 and image.shape[1] < 512
    return ["in bf16 and channels_last with few channels it is slower"] if narrow else []


register("inverted_bottleneck", "cpp", _known_sizes(cpp_dtypes), _why_slow_cpp)
register("inverted_bottleneck", "cuda", _known_sizes(_cuda))
register("inverted_bottleneck", "triton", lambda *arguments: ["its Triton kernels run as part of 'cuda'"])


def inverted_bottleneck(
    image: Tensor,
    expand: Tensor,
    depthwise: Tensor,
    project: Tensor,
    norms: tuple[BatchNorm, BatchNorm, BatchNorm],
    *,
    stride: int = 1,
    residual: bool = True,
    memory: str = "default",
    group: str = "",
    backend: str = "auto",
) -> tuple[Tensor, tuple[BatchStatistics | None, ...]]:
    """Expand, filter each channel, project back, add the input.

        I' = I + BN3(W_project ReLU6(BN2(W_depthwise * ReLU6(BN1(W_expand I)))))    * a k x k convolution, same padding

    Source: "CLIP for Lightweight Semantic Segmentation" (arXiv 2310.07394), section 3.3, after MobileNetV2 (arXiv
    1801.04381). An expansion of 6 fits the paper's GFLOPs. There the kernel is 3x3, the stride 1 and the residual
    added; the others are MobileNetV2's and its successors'.

    The op changes no argument: in training it returns what the norms saw, and the caller keeps the running averages.

    Args:
        image: ``[B, C, H, W]``, floating point, any strides.
        expand: ``[E, C, 1, 1]``.
        depthwise: ``[E, 1, k, k]``, k odd.
        project: ``[O, E, 1, 1]``.
        norms: the three batch norms, over E, E and O channels. Beside a bf16 or fp16 image they may be fp32.
        stride: of the depthwise convolution.
        residual: add the image, which needs O = C and stride 1.
        memory: ``"low"`` keeps nothing for the backward that the expansion gives anew, which costs its product once
            more. It is a matter of the kernels: the reference keeps what PyTorch keeps.
        group: name of the process group over whose batches together the norms take their statistics, as
            ``nn.SyncBatchNorm`` does; empty for those of this process.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        The new image ``[B, O, h, w]`` with h = ceil(H / stride), w alike, and for each norm what it saw if ``batch``,
        otherwise none (also where the image has no pixel). No gradient flows through the statistics.

    Raises:
        ValueError: wrong shape, device or dtype, a norm without batch and running statistics, a residual that does not
            fit, or a single pixel in the whole batch in training, which has no variance.
        FusekernError: the backend was asked for by name and cannot run.
    """
    return with_recipe(image, expand, depthwise, project, norms, stride, residual, memory, group, backend)[:2]


def with_recipe(
    image: Tensor,
    expand: Tensor,
    depthwise: Tensor,
    project: Tensor,
    norms: tuple[BatchNorm, BatchNorm, BatchNorm],
    stride: int,
    residual: bool,
    memory: str,
    group: str,
    backend: str,
) -> tuple[Tensor, tuple[BatchStatistics | None, ...], Recipe | None]:
    """``inverted_bottleneck`` and, where kernels keep something for their backward, how to make its image again."""
    check_shape("image", image, "B C H W")
    channels = image.shape[1]
    check_shape("expand", expand, "E C 1 1", C=channels)
    hidden = expand.shape[0]
    check_tensors(depthwise=depthwise)
    size = depthwise.shape[-1] if depthwise.dim() else 0
    check_shape("depthwise", depthwise, "E 1 k k", E=hidden, k=size)
    check_shape("project", project, "O E 1 1", E=hidden)
    if size % 2 == 0:
        raise ValueError(f"depthwise must have an odd kernel; got shape {list(depthwise.shape)}")
    if stride < 1:
        raise ValueError(f"stride must be 1 or more, got {stride}")
    if residual and (stride != 1 or project.shape[0] != channels):
        raise ValueError(
            f"residual needs stride 1 and as many channels out as in: got stride {stride}, {channels} channels in, "
            f"{project.shape[0]} out"
        )
    check_alike(image=image, expand=expand, depthwise=depthwise, project=project)
    check_choice("memory", memory, MEMORY)
    if len(norms) != 3:
        raise ValueError(f"norms must be three batch norms, got {len(norms)}")
    for index, (norm, width) in enumerate(zip(norms, (hidden, hidden, project.shape[0]), strict=True)):
        _check_norm(f"norms[{index}]", norm, width, image)
    image, expand, depthwise, project = follow_autocast(image, expand, depthwise, project)
    chosen = resolve("inverted_bottleneck", backend, image, expand, depthwise, project, norms, stride, group)
    if chosen == "reference" or (image.numel() == 0 and not group):
        weights = (expand, depthwise, project)
        found = inverted_bottleneck_reference(image, *weights, norms, stride=stride, residual=residual, group=group)
        return *found, None
    learned = [image, expand, depthwise, project, *(part for norm in norms for part in (norm.weight, norm.bias))]
    learning = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in learned)
    parts = [part for norm in norms for part in norm[:4]]
    eps, batch = [norm.eps for norm in norms], [norm.batch for norm in norms]
    if not (learning or any(batch)):
        out = _infer(image, expand, depthwise, project, *parts, eps, stride, residual, chosen)
        return out, (None, None, None), None
    if not group:
        _check_variance(image, norms, stride)
    out, _, _, y3, *vectors = _inverted_bottleneck(
        *(image, expand, depthwise, project, *parts),
        *(eps, batch, stride, residual, learning, memory == "low", group, chosen),
    )
    statistics = tuple(
        BatchStatistics(*seen[2::2].to(_like(norm, image).dtype)) if norm.batch else None
        for norm, seen in zip(norms, vectors, strict=True)
    )
    skip = image if residual else None
    if residual and not torch.compiler.is_compiling():
        # Its gradient comes another way, and compiled autograd cannot add one that is always none. A compiled forward
        # can, and would keep a detached image beside the other.
        skip = image.detach()
    recipe = Recipe(out, y3, vectors[2], skip, chosen) if learning else None
    return out, statistics, recipe


def _check_variance(image: Tensor, norms: tuple[BatchNorm, ...], stride: int) -> None:
    batch, _, height, width = image.shape
    for index, (norm, step) in enumerate(zip(norms, (1, stride, stride), strict=True)):
        size = batch, _strided(height, step), _strided(width, step)
        if norm.batch and size == (1, 1, 1):
            raise ValueError(
                f"Expected more than 1 value per channel when training: norms[{index}] has a single pixel, in which "
                "there is no variance"
            )


def _check_norm(name: str, norm: BatchNorm, width: int, image: Tensor) -> None:
    if not norm.batch and (norm.mean is None or norm.var is None):
        raise ValueError(f"{name} needs a running mean and variance, or batch=True")
    dtype, device = image.dtype, image.device
    for part, tensor in zip(("weight", "bias", "mean", "var"), norm[:4], strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            check_tensors(**{f"{name}.{part}": tensor})
        if tensor.dtype == dtype and tensor.device == device and tensor.shape == (width,):
            continue
        if tensor.shape != (width,):
            raise ValueError(f"{name}.{part} must be [c] with c = {width}; got shape {list(tensor.shape)}")
        if tensor.device != image.device:
            raise ValueError(f"{name}.{part} is on {tensor.device}, image on {image.device}: they must share a device")
        wide = torch.promote_types(dtype, torch.float32)
        if tensor.dtype not in (dtype, wide):
            raise ValueError(f"{name}.{part} is {tensor.dtype}: beside an image of {dtype} it must be {wide}")
