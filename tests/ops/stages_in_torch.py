"""The stages of inverted_bottleneck in plain PyTorch, in float64: what a backend's functions of these names must do."""

import torch
import torch.nn.functional as F


def per_channel(vector):
    return vector.double()[:, None, None]


def affine(y, vectors):
    return per_channel(vectors[0]) * y.double() + per_channel(vectors[1])


def relu6_mask(v):
    return (v > 0) & (v < 6)


def channels_sum(x):
    return x.sum((0, 2, 3))


def tell(y, stats, vectors=None, weight=None, bias=None, eps=0.0):
    """mean and M2, or what a norm makes of them."""
    mean, count = y.mean((0, 2, 3)), y.numel() // y.shape[1]
    squares = channels_sum((y - per_channel(mean)) ** 2)
    if stats is not None:
        stats.copy_(torch.stack((mean, squares)))
    if vectors is not None:
        scale = (squares / count + eps).rsqrt() * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean * scale
        vectors.copy_(torch.stack((scale, shift, mean, squares / count, squares / max(count - 1, 1))))


def add_up(dv, y, mean, sums, coef=None, dweight=None, vectors=None, weight=None, eps=0.0, batch=True):
    """The sums of dv and dv (y - mean), and what a norm makes of them."""
    total, product = channels_sum(dv), channels_sum(dv * (y.double() - per_channel(mean)))
    sums.copy_(torch.stack((total, product)))
    if coef is not None:
        count = y.numel() // y.shape[1]
        rstd = (vectors[3].double() + eps).rsqrt()
        p = rstd * (1 if weight is None else weight.double())
        dweight.copy_(product * rstd)
        q, r = (-p * rstd**2 * product / count, -p * total / count) if batch else (0 * p, 0 * p)
        coef.copy_(torch.stack((p, q, r, vectors[2])))


def through_norm(dv, y, coef):
    p, q, r, mean = map(per_channel, coef)
    return p * dv.double() + q * (y.double() - mean) + r


def expand_fwd(x, w1, y1, *seen):
    y = torch.einsum("bchw,ec->behw", x.double(), w1.double())
    y1.copy_(y)
    tell(y, *seen)


def _depthwise(a, wd, stride):
    return F.conv2d(a, wd.double()[:, None], stride=stride, padding=wd.shape[-1] // 2, groups=len(wd))


def depthwise_fwd(y1, affine1, wd, stride, y2, *seen):
    y = _depthwise(F.relu6(affine(y1, affine1)), wd, stride)
    y2.copy_(y)
    tell(y, *seen)


def project_fwd(y2, affine2, w3, y3, *seen):
    expand_fwd(F.relu6(affine(y2, affine2)), w3, y3, *seen)


def residual_fwd(y3, affine3, x, out):
    v = affine(y3, affine3)
    out.copy_(v if x is None else v + x.double())


def known(weight, bias, mean, var, eps):
    """Scale and shift of a norm by running statistics."""
    scale = (var.double() + eps).rsqrt() * (1 if weight is None else weight.double())
    return torch.stack((scale, (0 if bias is None else bias.double()) - mean.double() * scale))


def infer(x, w1, wd, w3, *rest):
    *norms, stride, residual, out = rest
    affine1, affine2, affine3 = (known(*norms[i : i + 5]) for i in (0, 5, 10))
    v1 = affine(torch.einsum("bchw,ec->behw", x.double(), w1.double()), affine1)
    v2 = affine(_depthwise(F.relu6(v1), wd, stride), affine2)
    v3 = affine(torch.einsum("bchw,ec->behw", F.relu6(v2), w3.double()), affine3)
    out.copy_(v3 + x.double() if residual else v3)


def output_bwd(g, y3, mean3, *sums):
    add_up(g.double(), y3, mean3, *sums)


def project_bwd(g, y3, coef3, y2, affine2, mean2, w3, dz, dw3, *sums):
    dy3, v2 = through_norm(g, y3, coef3), affine(y2, affine2)
    gradient = torch.einsum("bohw,oe->behw", dy3, w3.double()) * relu6_mask(v2)
    dz.copy_(gradient)
    dw3.copy_(torch.einsum("bohw,behw->oe", dy3, F.relu6(v2)))
    add_up(gradient, y2, mean2, *sums)


def depthwise_bwd(dz, y2, coef2, y1, affine1, mean1, wd, stride, d, dwd, *sums):
    v1 = affine(y1, affine1)
    # By name: below autograd, where a custom op's body runs, autograd.grad finds no graph.
    da, dweight, _ = torch.ops.aten.convolution_backward(
        *(through_norm(dz, y2, coef2), F.relu6(v1), wd.double()[:, None], None),
        *([stride] * 2, [wd.shape[-1] // 2] * 2, [1, 1], False, [0, 0], len(wd), [True, True, False]),
    )
    gradient = da * relu6_mask(v1)
    d.copy_(gradient)
    dwd.copy_(dweight[:, 0])
    add_up(gradient, y1, mean1, *sums)


def expand_bwd(d, y1, coef1, x, w1, g, dx, dw1):
    dy1 = through_norm(d, y1, coef1)
    gradient = torch.einsum("behw,ec->bchw", dy1, w1.double())
    dx.copy_(gradient if g is None else gradient + g.double())
    dw1.copy_(torch.einsum("behw,bchw->ec", dy1, x.double()))


STAGES = {
    stage.__name__: stage
    for stage in (
        *(expand_fwd, depthwise_fwd, project_fwd, residual_fwd, infer),
        *(output_bwd, project_bwd, depthwise_bwd, expand_bwd),
    )
}
