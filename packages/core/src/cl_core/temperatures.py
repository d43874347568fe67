"""Temperatures of pairs of embeddings, predicted from the two, for losses that divide each similarity by its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from cl_core import _checks
from cl_core._dense import product

_LARGEST_LOGIT = 10.0  # beyond, the sigmoid is within 5e-5 of its ends


class PairTemperature(nn.Module):
    r"""A temperature in (minimum, maximum) for every pair of rows: a two-layer perceptron on both, one a head.

        tau(u, v) = minimum + (maximum - minimum) sigmoid(w2 relu(W1 [u; v] + b1) + b2)

    where the logit is clamped to +-10. Not symmetric: the anchor comes first. All heads are computed at once.

    Args:
        dim: d, columns of a head.
        heads: C.
        hidden_dim: width of the hidden layer.
        shared: one perceptron for all heads, as the paper's figure draws it; the authors' code has one a head.
        minimum: least temperature > 0.
        maximum: largest temperature > minimum.
        detach_input: give the rows no gradient through the temperature, so that the encoder cannot make them similar
            or not for its sake.

    The parameters ``weight1`` (C, hidden_dim, 2 d) and ``weight2`` (C, 1, hidden_dim) start as those of
    ``torch.nn.Linear``; biases are vectors, so that what exempts vectors from weight decay exempts them. They learn at
    a tenth of the rate (``lr_scale``, which :meth:`cl_core.method.Method.parameter_groups` reads).
    """

    lr_scale: ClassVar[float] = 0.1

    def __init__(
        self,
        dim: int = 128,
        *,
        heads: int = 3,
        hidden_dim: int = 128,
        shared: bool = False,
        minimum: float = 0.05,
        maximum: float = 2.0,
        detach_input: bool = False,
    ) -> None:
        super().__init__()
        for name, count in (("dim", dim), ("heads", heads), ("hidden_dim", hidden_dim)):
            _checks.count(name, count)
        _checks.flag("shared", shared)
        _checks.flag("detach_input", detach_input)
        check_range(minimum, maximum, "minimum", "maximum")
        if minimum == maximum:
            raise ValueError(f"maximum must exceed minimum, got {maximum} for both.")
        self.dim, self.heads, self.hidden_dim, self.shared = dim, heads, hidden_dim, shared
        self.minimum, self.maximum, self.detach_input = minimum, maximum, detach_input
        networks = 1 if shared else heads
        self.weight1 = nn.Parameter(torch.empty(networks, hidden_dim, 2 * dim))
        self.bias1 = nn.Parameter(torch.empty(networks * hidden_dim))
        self.weight2 = nn.Parameter(torch.empty(networks, 1, hidden_dim))
        self.bias2 = nn.Parameter(torch.empty(networks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2)):
            bound = weight.shape[2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Temperatures of anchors u with others v, stacks (C, N, d) both; shape (C, N), in the dtype of u."""
        for name, stack in (("u", u), ("v", v)):
            if not isinstance(stack, Tensor) or stack.ndim != 3 or stack.shape[::2] != (self.heads, self.dim):
                came = tuple(stack.shape) if isinstance(stack, Tensor) else type(stack).__name__
                raise ValueError(f"{name} must have shape ({self.heads}, N, {self.dim}), got {came}.")
        _checks.same_shape(u=u, v=v)
        return self.between(self.of_anchors(u), self.of_others(v))

    # The first layer is linear in both rows, so its part of each is computed once, whatever it is paired with.

    def of_anchors(self, u: Tensor) -> Tensor:
        """The anchors' part of the hidden layer, shape (C, N, hidden_dim)."""
        bias = self.bias1.view(-1, 1, self.hidden_dim)
        return self._product(u, self.weight1[..., : self.dim]) + bias.to(u.dtype)

    def of_others(self, v: Tensor) -> Tensor:
        """The others' part of the hidden layer, shape (C, N, hidden_dim)."""
        return self._product(v, self.weight1[..., self.dim :])

    def between(self, anchors: Tensor, others: Tensor) -> Tensor:
        """Temperatures from the parts of both, whose middle dimensions are broadcast, in which shape they return."""
        hidden = (anchors + others).relu_()
        logits = product(hidden.flatten(1, -2), self._of_heads(self.weight2, hidden).mT)
        logits = logits.view(hidden.shape[:-1])
        bias = self.bias2.to(hidden.dtype).view(-1, *[1] * (hidden.ndim - 2))
        return scaled_sigmoid(logits + bias, self.minimum, self.maximum)

    def _product(self, rows: Tensor, weight: Tensor) -> Tensor:
        return product(rows.detach() if self.detach_input else rows, self._of_heads(weight, rows).mT)

    def _of_heads(self, weight: Tensor, like: Tensor) -> Tensor:
        return weight.to(like.dtype).expand(self.heads, -1, -1)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        names = ("dim", "heads", "hidden_dim", "shared", "minimum", "maximum", "detach_input")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def scaled_sigmoid(logits: Tensor, minimum: float, maximum: float) -> Tensor:
    """Logits, clamped to +-10, to temperatures in the range."""
    return minimum + (maximum - minimum) * logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).sigmoid()


def check_range(minimum: float, maximum: float, least: str, largest: str) -> None:
    """Refuse a range of temperatures that is none; ``least`` and ``largest`` name its ends in the message."""
    _checks.temperature(least, minimum)
    _checks.positive(largest, maximum)
    if minimum > maximum:
        raise ValueError(f"{least} must not exceed {largest}, got {minimum} and {maximum}.")
