r"""Miners: which pairs and triplets of a batch, or of a batch and a queue, are worth a loss.

Every miner looks at embeddings z (N, D) with integer labels (N,) and returns row numbers. Candidates for
positives and negatives are the other rows of z or, with ``ref`` and ``ref_labels``, the rows of ref (a
queue); the anchor always is a row of z. Where ref holds copies of rows of z, ``ids`` and ``ref_ids`` tell
which: rows of equal id are no pair.

- An anchor without a positive never counts, not even with its negatives.
- Distances are Euclidean; ``normalize=True`` scales rows to unit length first. No gradient is kept.
- Anchors are taken some at a time: no N x N x N, and no N x M matrix unless it is small. What grows is the
  result.
- Results are sorted by anchor and depend on nothing but the arguments; what is drawn comes from
  ``generator``.

Each function has a class of the same arguments, to be handed to a loss module or named in a configuration.

Example:
    >>> import torch
    >>> from cl_core.losses.margin import TripletMarginLoss
    >>> from cl_core.miners import BatchHardMiner
    >>> z, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> miner = BatchHardMiner()
    >>> miner(z, labels).positive
    tensor([1, 0, 3, 2])
    >>> TripletMarginLoss(margin=0.2, miner=miner)(z, labels)
    tensor(0.2000)
"""

from cl_core.miners.nearest import mine_nearest_negatives
from cl_core.miners.pairs import (
    MultiSimilarityMiner,
    PairMarginMiner,
    PairMiner,
    Pairs,
    mine_multi_similarity,
    mine_pair_margin,
)
from cl_core.miners.triplets import (
    BatchHardMiner,
    DistanceWeightedMiner,
    TripletMarginMiner,
    TripletMiner,
    Triplets,
    mine_batch_hard,
    mine_distance_weighted,
    mine_triplets,
)

__all__ = [
    "BatchHardMiner",
    "DistanceWeightedMiner",
    "MultiSimilarityMiner",
    "PairMarginMiner",
    "PairMiner",
    "Pairs",
    "TripletMarginMiner",
    "TripletMiner",
    "Triplets",
    "mine_batch_hard",
    "mine_distance_weighted",
    "mine_multi_similarity",
    "mine_nearest_negatives",
    "mine_pair_margin",
    "mine_triplets",
]
