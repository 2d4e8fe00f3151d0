"""Random choices, and thresholds, whose values are hard and whose gradients are those of a relaxed function.

In the forward pass a choice is exact in law: zeros and ones, from one uniform number each. In the backward pass and in
forward-mode differentiation it is a smooth function of the same uniform number, with a temperature ``tau``: a
straight-through gradient, biased, the less so the smaller ``tau``, and noisier. A choice keeps for its backward pass
no more than its argument and one number; the derivatives of its backward pass are those of the relaxed function, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrobirds import _checks
from pyrobirds._checks import shape_text


def threshold(x: Tensor, *, tau: float) -> Tensor:
    r"""Return 1 where ``x`` is above zero, else 0, with the gradient of a sigmoid.

    .. math:: \text{forward } 1[x > 0], \qquad \text{backward } \frac{d}{dx} \sigma(x / \tau).

    Args:
        x: any shape, float32 or float64.
        tau: width of the sigmoid in the units of ``x``, above 0: :math:`1 / k` for a sigmoid of steepness k.

    Returns:
        Zeros and ones in the shape and dtype of ``x``; NaN where ``x`` is NaN.

    Raises:
        TypeError, ValueError: ``x`` is not a tensor of floats, or ``tau`` not a number above 0.

    The estimator is the straight-through one of Bengio, Léonard and Courville 2013 (https://arxiv.org/abs/1308.3432,
    section 4) with the sigmoid's slope.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 0.5], requires_grad=True)
        >>> y = threshold(x, tau=0.25)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad
        ([0.0, 0.0, 1.0], tensor([0.0707, 1.0000, 0.4200]))
    """
    return _apply(_Threshold, _DualThreshold, _floats("x", x), _checks.positive("tau", tau))


def bernoulli(
    probs: Tensor | None = None, *, logits: Tensor | None = None, tau: float, u: Tensor | None = None
) -> Tensor:
    r"""Draw 0 or 1 with a straight-through gradient.

    .. math::
        \xi = 1[\operatorname{logit} p + \operatorname{logit} u > 0], \qquad
        \tilde\xi = \sigma\left(\frac{\operatorname{logit} p + \operatorname{logit} u}{\tau}\right), \qquad
        u \sim U(0, 1).

    The draw is :math:`\xi`, in law Bernoulli(p); the gradient is that of :math:`\tilde\xi` at the same u. Both are in
    law those of the first class of a two-class Gumbel-softmax with ``hard=True`` (the binary Concrete distribution of
    Maddison, Mnih and Teh 2017, https://arxiv.org/abs/1611.00712, appendix B; Jang, Gu and Poole 2017,
    https://arxiv.org/abs/1611.01144, section 2.2).

    A draw is never 1 at p = 0 and never 0 at p = 1, and the gradient is finite there. With respect to ``probs`` it is
    zero at both ends for ``tau`` below 1, where the relaxed function is flat; for ``tau`` above 1 its slope would be
    infinite there, and ``probs`` are refused.

    Args:
        probs: probabilities of a 1, between 0 and 1 (beyond, by rounding, counts as the end), any shape, float32 or
            float64.
        logits: their log-odds instead, infinite ones included.
        tau: temperature of the relaxation, above 0; with ``probs`` at most 1.
        u: uniform numbers in [0, 1) in the shape, dtype and device of the probabilities, to be used instead of fresh
            ones: choices of which no more than one counts can share them. A draw is 1 for the larger ones.

    Returns:
        Zeros and ones in the shape and dtype of the probabilities; NaN where these are NaN. Torch's uniform numbers of
        32 bits are multiples of 6e-8, and so are in effect the probabilities of a draw: take float64 for rarer events.

    Raises:
        TypeError, ValueError: not exactly one of ``probs`` and ``logits`` is given, it is not a tensor of floats, ``u``
            does not fit it, or ``tau`` is not in its range. The values of tensors are not looked at.

    Example:
        >>> logits = torch.zeros(5, requires_grad=True)
        >>> draws = bernoulli(logits=logits, tau=0.5)
        >>> bool(((draws == 0) | (draws == 1)).all())
        True
        >>> draws.sum().backward()
        >>> bool((logits.grad > 0).all())
        True

        Two choices that exclude each other, of one uniform number:

        >>> infected, u = torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.9])
        >>> catches = bernoulli(torch.tensor([0.3, 0.3]), tau=0.1, u=u)
        >>> recovers = bernoulli(torch.tensor([0.05, 0.05]), tau=0.1, u=u)
        >>> infected + (1 - infected) * catches - infected * recovers
        tensor([1., 1.])
    """
    if logits is None:
        probs, tau = _probs_and_tau("bernoulli", probs, tau)
        return _apply(_Bernoulli, _DualBernoulli, probs, _uniform(u, probs), tau)
    _refuse_both("bernoulli", probs)
    u = _uniform(u, _floats("logits", logits))
    noise = torch.logit(u, eps=torch.finfo(logits.dtype).tiny)  # finite, so that infinite logits have their way
    return threshold(logits + noise, tau=tau)


def categorical(
    probs: Tensor | None = None, *, logits: Tensor | None = None, tau: float, u: Tensor | None = None
) -> Tensor:
    r"""Draw one of K classes, as a one-hot vector, with a straight-through gradient.

    With :math:`G_k` the probability of a class beyond k, one uniform number decides K - 1 nested choices, "beyond k":

    .. math::
        \xi_k = c_{k-1} - c_k, \quad c_k = 1[\operatorname{logit} G_k + \operatorname{logit} u > 0], \qquad
        \tilde\xi_k = \tilde c_{k-1} - \tilde c_k, \quad
        \tilde c_k = \sigma\left(\frac{\operatorname{logit} G_k + \operatorname{logit} u}{\tau}\right),

    :math:`k = 0, \dots, K - 1`, where :math:`c_{-1} = 1` and :math:`c_{K-1} = 0`, and :math:`G_k = \sum_{j>k} p_j /
    \sum_j p_j`. The draw is :math:`\xi`, the inverse of the distribution function at u, so in law Categorical(p); the
    gradient is that of :math:`\tilde\xi` at the same u. As :math:`G_k` falls with k, :math:`\tilde\xi` has no negative
    entry, and its entries add up to 1. For K = 2 the second entry is :func:`bernoulli` of the second probability.

    The order of the classes matters for the gradient, not for the law: the relaxed draw is spread over classes next
    to each other, so neighbours should be alike where classes have an order. A Gumbel-softmax has no such order, and
    takes K random numbers.

    A class of probability 0 is never drawn, and the gradient is finite there.

    Args:
        probs: probabilities of the classes, shape ``(*batch, K)``, float32 or float64; they are divided by their sum.
        logits: log-probabilities up to a constant instead; ``-inf`` for a class that is never drawn, ``inf`` for one
            that always is.
        tau: temperature of the relaxation, above 0 and at most 1: for larger ones its slope at probability 0 would be
            infinite.
        u: uniform numbers in [0, 1), shape ``batch``, in the dtype and on the device of the probabilities, to be used
            instead of fresh ones. Larger numbers give later classes.

    Returns:
        Zeros and a one in the last dimension, shape ``(*batch, K)``, in the dtype of the probabilities; NaN where these
        hold NaN or add up to 0.

    Raises:
        TypeError, ValueError: as for :func:`bernoulli`, or there is no dimension of classes.

    Example:
        >>> logits = torch.zeros(4, 3, requires_grad=True)
        >>> u = torch.tensor([0.1, 0.4, 0.6, 0.9])
        >>> draws = categorical(logits=logits, tau=0.5, u=u)
        >>> draws.argmax(-1)
        tensor([0, 1, 1, 2])
        >>> (draws @ torch.tensor([1.0, 10.0, 100.0])).sum().backward()
        >>> bool((logits.grad[:, 0] < 0).all())
        True
    """
    if logits is None:
        x, tau = _probs_and_tau("categorical", probs, tau)
        _check_classes("probs", x)
    else:
        _refuse_both("categorical", probs)
        x, tau = _floats("logits", logits), _at_most_one("categorical", tau)
        _check_classes("logits", x)
    return _apply(_Categorical, _DualCategorical, x, _uniform(u, x[..., 0]), tau, logits is not None)


class _Threshold(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tau: float) -> Tensor:
        return x.clamp(0, 1).ceil()  # keeps NaN, as a comparison would not

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.tau = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Threshold._times_slope(ctx, grad), None

    @staticmethod
    def _times_slope(ctx: Any, factor: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.sigmoid_backward(factor, torch.sigmoid(x / ctx.tau)) / ctx.tau


class _DualThreshold(_Threshold):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return _Threshold._times_slope(ctx, tangent)


class _Bernoulli(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, u: Tensor, tau: float) -> Tensor:
        # u >= 1 - p: on a grid of [0, 1) this is exact at both ends, and NaN stays. The sum can round to 2.
        return (p + u).floor().clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        p, u, ctx.tau = inputs
        ctx.save_for_backward(p, u)
        ctx.save_for_forward(p, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        p, u = ctx.saved_tensors
        return grad * _slope(p, u, ctx.tau), None, None


class _DualBernoulli(_Bernoulli):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        p, u = ctx.saved_tensors
        return tangent * _slope(p, u, ctx.tau)


class _Categorical(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, u: Tensor, tau: float, of_logits: bool) -> Tensor:
        f, _ = _up_to(_weights(x) if of_logits else x)
        return _differences((u.unsqueeze(-1) - f).floor() + 1, first=1)  # u >= f, and NaN stays

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
        x, u, ctx.tau, ctx.of_logits = inputs
        ctx.save_for_backward(x, u)
        ctx.save_for_forward(x, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, u = ctx.saved_tensors
        p = _weights(x) if ctx.of_logits else x
        f, total = _up_to(p)
        g = 1 - f
        by_g = pad(grad.diff(dim=-1), (0, 1)) * _slope(g, _for_each(u, g), ctx.tau)
        # The derivative of G_k with respect to p_j is (1[j > k] - G_k) / sum(p).
        by_p = (by_g.cumsum(-1) - by_g - (by_g * g).sum(-1, keepdim=True)) / total
        return by_p * p if ctx.of_logits else by_p, None, None, None


class _DualCategorical(_Categorical):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        x, u = ctx.saved_tensors
        p = _weights(x) if ctx.of_logits else x
        f, total = _up_to(p)
        g = 1 - f
        sums = (tangent * p if ctx.of_logits else tangent).cumsum(-1)
        of_g = (f * sums[..., -1:] - sums) / total
        return _differences(of_g * _slope(g, _for_each(u, g), ctx.tau), first=0)


def _up_to(p: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution function, exactly 1 at the last class and where only zeros follow; and the sum of p."""
    sums = p.cumsum(-1)
    total = sums[..., -1:]
    return sums / total, total


def _differences(beyond: Tensor, first: float) -> Tensor:
    """What falls to each class, of what lies beyond it; ``first`` lies beyond none."""
    return pad(beyond[..., :-1], (1, 0), value=first) - beyond


def _for_each(u: Tensor, g: Tensor) -> Tensor:
    # Operations on two contiguous tensors are several times faster than a broadcast over a short last dimension.
    return u.unsqueeze(-1).expand_as(g).contiguous()


def _slope(p: Tensor, u: Tensor, tau: float) -> Tensor:
    r"""The derivative of :math:`\sigma((\mathrm{logit} p + \mathrm{logit} u) / \tau)` with respect to p.

    It is :math:`r / ((1 + r)^2 \tau p (1 - p))` with :math:`r = (p u / ((1 - p) (1 - u)))^{\pm 1 / \tau}`; with the
    sign for which r is at most 1 nothing overflows, and r is zero at both ends.
    """
    info = torch.finfo(p.dtype)
    u = u.clamp(min=info.tiny)
    q = 1 - p
    yes, no = p * u, q * (1 - u)
    if tau == 1:
        total = yes + no
        return (u / total) * ((1 - u) / total)
    # The first bound is for p that rounding has brought out of its range. The second, whose square has a reciprocal
    # still, makes 0 / 0 at the ends 0, which is the limit.
    r = (torch.minimum(yes, no) / torch.maximum(yes, no)).clamp(min=0) ** (1 / tau)
    return r / ((1 + r).square() * (p * q).clamp(min=info.eps**2) * tau)


def _weights(logits: Tensor) -> Tensor:
    """Probabilities of classes up to a factor, the greatest being 1: several times faster than a softmax."""
    logits = logits.clamp(max=torch.finfo(logits.dtype).max)  # infinity minus itself is NaN
    return torch.exp(logits - logits.detach().amax(-1, keepdim=True))


def _apply(node: type[torch.autograd.Function], dual: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Apply the node that has a forward-mode rule, except in torch.compile, which takes none that has."""
    return (node if torch.compiler.is_compiling() else dual).apply(*arguments)


def _uniform(u: Tensor | None, like: Tensor) -> Tensor:
    """The given uniform numbers, checked against the tensor that they are for, or fresh ones."""
    # Zero stands for a cell of the grid of uniform numbers, and becomes its middle.
    least = torch.finfo(like.dtype).eps / 4
    if u is None:
        return torch.rand_like(like).clamp(min=least)
    if not isinstance(u, Tensor):
        raise TypeError(f"u must be a tensor of uniform numbers in [0, 1), or None, got a {type(u).__name__}")
    if (u.shape, u.dtype, u.device) != (like.shape, like.dtype, like.device):
        raise ValueError(
            f"u must have one number a choice, shape {shape_text(like.shape)}, {like.dtype} on {like.device}, got "
            f"shape {shape_text(u.shape)}, {u.dtype} on {u.device}: nothing is broadcast or cast"
        )
    return u.detach().clamp(min=least)


def _floats(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of float32 or float64, got a {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a tensor of float32 or float64, got one of {value.dtype}")
    return value


def _check_classes(name: str, value: Tensor) -> None:
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(
            f"{name} of categorical must have shape (*batch, K) with at least one class, got {shape_text(value.shape)}"
        )


def _refuse_both(choice: str, probs: Tensor | None) -> None:
    if probs is not None:
        raise ValueError(f"{choice} takes probs or logits, got both: leave out one of them")


def _probs_and_tau(choice: str, probs: Tensor | None, tau: float) -> tuple[Tensor, float]:
    if probs is None:
        raise ValueError(f"{choice} takes probs or logits, got neither: pass one of them")
    return _floats("probs", probs), _at_most_one(choice, tau)


def _at_most_one(choice: str, tau: float) -> float:
    tau = _checks.positive("tau", tau)
    if tau > 1:
        remedy = "lower tau, or pass logits" if choice == "bernoulli" else "lower tau"
        raise ValueError(
            f"tau must be at most 1, got {tau}: for larger ones the slope of {choice}'s relaxation with respect to a "
            f"probability is infinite at 0 and 1; {remedy}"
        )
    return tau
