"""What every batch sampler is: a plan of global batches for one epoch, shared out among the ranks."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cl_core import _checks


class DistributedBatchSampler(Sampler[list[int]], ABC):
    """Base of all batch samplers; iterating yields this rank's batches as lists of row numbers.

    A subclass lays out the *global* batches of an epoch in :meth:`plan`, drawing from the generator it is
    given and from nothing else. The rest is done here and is the same for all:

    - The order depends on (seed, epoch) only, so all ranks agree on it without talking to each other.
    - Every rank gets the same number of batches and no place of a batch goes to two ranks. The shares of one
      global batch differ by at most one unit; a share is empty only where a global batch has fewer units than
      there are ranks, which happens only with ``drop_last=False``.
    - ``start_batch`` batches of the epoch are skipped: set it, or load a state, to go on in the middle of an
      epoch. It returns to 0 when the epoch ends or, once used, when :meth:`set_epoch` names another epoch.

    Args:
        batch_size: rows of a batch on one rank, a multiple of ``unit``.
        batches: number of batches of an epoch.
        seed: seed of all epochs.
        unit: rows that stay together on one rank, such as the two of a pair.
        rank: number of this process; by default, as ``torch.distributed`` says if it is initialised when the
            sampler is made, else 0 of 1.
        world_size: number of processes that share every global batch; given together with ``rank``.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        batches: int,
        seed: int = 0,
        unit: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        _checks.count("batch_size", batch_size)
        _checks.count("seed", seed, at_least=0)
        self.rank, self.world_size = resolve_ranks(rank, world_size)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self._batches = batches
        self._unit = unit
        self._start_batch = 0
        self._started = False  # an iteration of this epoch has begun
        self._position = 0  # batches of this epoch handed out so far

    @abstractmethod
    def plan(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Global batches of one epoch, each an int64 vector of row numbers; ``len(self)`` of them."""

    @property
    def global_batch_size(self) -> int:
        """Rows of a full batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def start_batch(self) -> int:
        """Batches of this epoch that the next iteration skips."""
        return self._start_batch

    @start_batch.setter
    def start_batch(self, value: int) -> None:
        _checks.count("start_batch", value, at_least=0)
        if value > len(self):
            raise ValueError(f"start_batch must be at most the {len(self)} batches of an epoch, got {value}.")
        self._start_batch = self._position = value
        self._started = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        _checks.count("epoch", epoch, at_least=0)
        at_the_end = self._start_batch == len(self)  # a state taken there has nothing left of its epoch
        if epoch != self.epoch and (self._started or at_the_end):
            self.start_batch = 0
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, those that ``start_batch`` skips included."""
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.plan(self._generator())
        self._started = True
        self._position = self._start_batch
        for batch in batches[self._start_batch :]:
            self._position += 1
            yield self._share(batch).tolist()
        self._start_batch = 0

    def state_dict(self) -> dict[str, int]:
        """Where this sampler stands, as plain integers.

        ``start_batch`` counts the batches handed out. A loader with workers asks for batches ahead of their
        use; it has to overwrite that entry by the number of batches that were really used.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "start_batch": self._position,
            "batches": len(self),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken: same seed, same epoch, next batch.

        Raises:
            ValueError: if the state is not one of a sampler, or counts another number of batches an epoch (so other
                data, batch size or number of processes) and its position means nothing here. Nothing changes then.
        """
        expected = self.state_dict()
        if not isinstance(state, dict) or state.keys() != expected.keys():
            got = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state must hold {', '.join(expected)}, got {got or 'nothing'}.")
        for name, value in state.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"state must hold integers >= 0, got {value!r:.40} for {name}.")
        if state["batches"] != len(self):
            raise ValueError(
                f"state must come from a sampler with {len(self)} batches an epoch, "
                f"got one with {state['batches']}."
            )
        self.start_batch = state["start_batch"]  # refuses one beyond the epoch
        self.seed = state["seed"]
        self.epoch = state["epoch"]

    def _generator(self) -> torch.Generator:
        # A hash, because seed + epoch would give seed 0 in epoch 1 the order of seed 1 in epoch 0.
        digest = hashlib.sha256(f"{self.seed},{self.epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def _share(self, batch: Tensor) -> Tensor:
        units, left_over = divmod(len(batch) // self._unit, self.world_size)
        first = self.rank * units + min(self.rank, left_over)
        last = first + units + (self.rank < left_over)
        return batch[first * self._unit : last * self._unit]


def resolve_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size as given, or as ``torch.distributed`` says if it is initialised, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given together, got {rank} and {world_size}.")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    _checks.count("world_size", world_size)
    _checks.count("rank", rank, at_least=0)
    if rank >= world_size:
        raise ValueError(f"rank must be less than world_size, got {rank} of {world_size}.")
    return rank, world_size


def integer_vector(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """``values`` as an int64 vector on the CPU; anything but a non-empty vector of integers is refused."""
    try:
        vector = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a vector of integers, got {type(values).__name__}.") from None
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"{name} must be a vector with at least one entry, got shape {tuple(vector.shape)}.")
    if vector.is_floating_point() or vector.is_complex() or vector.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {vector.dtype}.")
    return vector.detach().to("cpu", torch.int64)


def full_batches(rows: int, batch_size: int, world_size: int, *, drop_last: bool) -> int:
    """Number of global batches that ``rows`` rows make; refuses none at all."""
    size = batch_size * world_size
    batches = rows // size if drop_last else -(-rows // size)
    if batches == 0:
        raise ValueError(
            f"{rows} rows make no full batch of batch_size {batch_size} on each of {world_size} ranks; "
            "lower batch_size or pass drop_last=False."
        )
    return batches
