"""Train with batches whose activations do not fit: the loss sees all embeddings, the encoder a chunk at a time.

The gradient of a loss with respect to the weights goes through the embeddings only. So encode all rows without a
graph, take the loss once, keep its gradient for every embedding, then encode chunk by chunk again, this time with
a graph, and hand each chunk its share. The memory is that of one chunk's activations, the price one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from cl_core import _checks
from cl_core.memory._base import Memory
from cl_core.method import Method

Encoder = Callable[[Any], Tensor]
"""From inputs, with one entry a row along dimension 0 of every tensor, to embeddings (N, D)."""


def gradient_cache(
    loss: Callable[..., Tensor], towers: Sequence[tuple[Encoder, Any]], *, chunk_size: int
) -> tuple[Tensor, Portions]:
    """Loss of embeddings, and its gradient in portions that fit.

    ::

        value, portions = gradient_cache(loss, [(encoder, view1), (encoder, view2)], chunk_size=64)
        for portion in portions:
            portion.backward()

    The sum of the portions' gradients is the gradient of ``loss(encoder(view1), encoder(view2))``, for the weights
    of the encoders and the parameters of the loss. The random state of each chunk is replayed, so that dropout
    masks agree, and so is autocast. Rows must not see one another in the encoder: batch normalisation in training mode
    is refused, and so are memories, which would take in each row twice.

    Args:
        loss: called once, with one (N, D) tensor a tower; a module's own parameters get their gradient.
        towers: pairs of encoder and its inputs, whose tensors all have N rows.
        chunk_size: rows encoded at a time.

    Returns:
        The loss, detached, and the portions: one scalar a chunk of each tower, made when it is asked for; their length
        is the number of those to come.

    Raises:
        ValueError: if there is no tower or no row, rows differ, or an encoder looks at or remembers other rows.

    Cost: two forward passes and one backward pass of the encoders; memory of one chunk and of N D embeddings.
    Reference: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP
    2021, arXiv 2101.06983.
    """
    _checks.count("chunk_size", chunk_size)
    if not towers:
        raise ValueError("towers must hold at least one pair of encoder and inputs, got none.")
    for encoder, _ in towers:
        if isinstance(encoder, nn.Module):
            check_rows_are_alone(encoder)
    passes = [_Pass(encoder, inputs, chunk_size) for encoder, inputs in towers]
    embeddings = [one.embeddings.requires_grad_() for one in passes]
    parameters = [p for p in loss.parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []
    with torch.enable_grad():
        value = loss(*embeddings)
    gradients = torch.autograd.grad(value, [*embeddings, *parameters], allow_unused=True)

    # The loss's own parameters go with the last chunk, so that there is one portion that holds all parameters
    # of a single tower: what DistributedDataParallel has to see in the backward pass that it synchronises.
    own = [
        (parameter * gradient).sum()
        for parameter, gradient in zip(parameters, gradients[len(passes) :], strict=True)
        if gradient is not None
    ]
    used = [(one, g) for one, g in zip(passes, gradients, strict=False) if g is not None]

    def made() -> Iterator[Tensor]:
        for place, (one, gradient) in enumerate(used):
            last = place == len(used) - 1
            yield from one.portions(gradient, also=own if last else [])

    return value.detach(), Portions(made(), sum(len(one.states) for one, _ in used))


class Portions(Iterator[Tensor]):
    """Scalars to back-propagate one after the other; their length is the number of those to come.

    Args:
        made: makes each when it is asked for.
        count: how many.
    """

    def __init__(self, made: Iterator[Tensor], count: int) -> None:
        self._made, self._left = made, count

    def __next__(self) -> Tensor:
        portion = next(self._made)
        self._left -= 1
        return portion

    def __len__(self) -> int:
        return self._left


def method_gradient_cache(method: Method, batch: Any, *, chunk_size: int) -> tuple[Tensor, Portions]:
    """:func:`gradient_cache` of a method whose loss is ``criterion(...)`` of embeddings, without its help.

    ``method.loss`` is run on chunks of the batch with a stand-in for the criterion that notes the embeddings.

    Args:
        method: whose ``loss(batch)`` returns what its ``criterion`` returned for tensors of one row an item.
        batch: tensors, or tuples and dicts of such, with N rows each.
        chunk_size: rows of the batch at a time.

    Returns:
        As :func:`gradient_cache`.

    Raises:
        ValueError: if the method adds to its criterion or does not call it exactly once, normalises over the
            batch, or has a memory.
    """
    _checks.count("chunk_size", chunk_size)
    check_rows_are_alone(method)
    criterion = cast(nn.Module, method.criterion)
    widths: list[int] = []

    def encode(chunk: Any) -> Tensor:
        stand_in = _StandIn()
        method.criterion = stand_in
        try:
            returned = method.loss(chunk)
        finally:
            method.criterion = criterion
        returned = returned["loss"] if isinstance(returned, dict) else returned
        if len(stand_in.calls) != 1 or returned is not stand_in.returned:
            raise ValueError(
                f"{type(method).__name__} cannot be trained with a gradient cache: its loss must be what one call "
                "of its criterion returns."
            )
        widths[:] = [z.shape[1] for z in stand_in.calls[0]]
        return torch.cat(stand_in.calls[0], dim=1)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = criterion

        def forward(self, z: Tensor) -> Tensor:
            return cast(Tensor, self.criterion(*(part.contiguous() for part in z.split(widths, dim=1))))

    return gradient_cache(Joined(), [(encode, batch)], chunk_size=chunk_size)


class _StandIn(nn.Module):
    """Notes what a criterion is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []
        self.returned: Tensor | None = None

    def forward(self, *embeddings: Tensor, **options: Any) -> Tensor:
        others = [option for option in options.values() if option is not None]
        if others or any(not isinstance(z, Tensor) or z.ndim != 2 for z in embeddings):
            raise ValueError(
                "a gradient cache needs a criterion of embeddings (N, D) only, got something else."
            )
        self.calls.append(embeddings)
        self.returned = embeddings[0].sum()
        return self.returned


class _Pass:
    """Embeddings of one tower without a graph, and the chunks to encode again."""

    def __init__(self, encoder: Encoder, inputs: Any, chunk_size: int) -> None:
        self.encoder = encoder
        tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
        rows = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
        if len(rows) != 1 or 0 in rows:
            raise ValueError(f"inputs must be tensors of one number of rows >= 1, got {sorted(rows)}.")
        self.size, self.chunk_size, self.inputs = rows.pop(), chunk_size, inputs
        self.devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", *(tensor.device.type for tensor in tensors)}
        }
        self.states: list[list[Tensor]] = []
        with torch.no_grad():
            parts = []
            for chunk in self._chunks():
                self.states.append(self._random_state())
                parts.append(encoder(chunk))
        self.embeddings = torch.cat(parts).detach()

    def portions(self, gradient: Tensor, *, also: Sequence[Tensor]) -> Iterator[Tensor]:
        """Scalars whose gradients add up to that of the loss through this tower; ``also`` goes with the last."""
        places = gradient.split(self.chunk_size)
        for place, (chunk, state, part) in enumerate(zip(self._chunks(), self.states, places, strict=True)):
            with self._replayed(state), torch.enable_grad():
                z = self.encoder(chunk)
            portion = (z * part).sum()
            yield portion + sum(also) if place == len(places) - 1 else portion

    def _chunks(self) -> Iterator[Any]:
        for start in range(0, self.size, self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            yield tree_map(
                lambda leaf, rows=rows: leaf[rows] if isinstance(leaf, Tensor) else leaf, self.inputs
            )

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    @contextmanager
    def _replayed(self, state: list[Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self.devices))
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            torch.set_rng_state(state[0])
            for device, one in zip(self.devices, state[1:], strict=True):
                torch.cuda.set_rng_state(one, device)
            yield


def check_rows_are_alone(module: nn.Module) -> None:
    """Refuse a module that normalises over the batch it is trained on, or remembers rows of it."""
    for name, child in module.named_modules():
        if isinstance(child, Memory):
            raise ValueError(
                "a gradient cache encodes each chunk twice, so its rows must not be remembered on the way, got "
                f"{type(child).__name__} {name!r}."
            )
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            raise ValueError(
                f"a gradient cache encodes chunks, so rows must not see one another, got {type(child).__name__} "
                f"{name!r} in training mode; use group or layer normalisation."
            )
