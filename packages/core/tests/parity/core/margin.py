"""Miners and margin losses as pytorch-metric-learning computes them."""

import torch

from cl_core.losses.margin import (
    circle_loss,
    contrastive_margin_loss,
    multi_similarity_loss,
    triplet_margin_loss,
)
from cl_core.miners import (
    Pairs,
    mine_batch_hard,
    mine_multi_similarity,
    mine_pair_margin,
    mine_triplets,
)
from cl_core.testing import parity

TRIPLETS = ("out_a", "out_p", "out_n")
PAIRS = ("out_a1", "out_p"), ("out_a2", "out_n")


def checked(arrays, loss):
    arrays.check(
        loss, tolerance=parity.similarity_tolerance(arrays.dtype, anchors=len(arrays.tensor("in_z")))
    )


def run_triplet(arrays):
    """All triplets; without a stored margin there is no positive and any margin gives zero."""
    given, options = arrays.inputs(), arrays.parameters()
    checked(arrays, triplet_margin_loss(given["z"], given["labels"], **options))


def run_triplet_miner(arrays):
    given, margin = arrays.inputs(), arrays.parameter("param_margin")
    kind = arrays.case.kind.rpartition("_")[2].replace("semihard", "semi-hard")
    triplets = mine_triplets(given["z"], given["labels"], kind=kind, margin=margin)
    arrays.compare_tuples(TRIPLETS, triplets)
    checked(arrays, triplet_margin_loss(given["z"], given["labels"], margin=margin, triplets=triplets))


def run_batch_hard(arrays):
    given, margin = arrays.inputs(), arrays.parameter("param_margin")
    triplets = mine_batch_hard(given["z"], given["labels"])
    arrays.compare_tuples(TRIPLETS, triplets)
    checked(arrays, triplet_margin_loss(given["z"], given["labels"], margin=margin, triplets=triplets))


def run_easy_semi_hard(arrays):
    """The peer repeats the anchors: one positive pair and one negative pair each."""
    given = arrays.inputs()
    triplets = mine_batch_hard(given["z"], given["labels"], positive="easy", negative="semi-hard")
    arrays.compare_tuples(PAIRS[0], (triplets.anchor, triplets.positive))
    arrays.compare_tuples(PAIRS[1], (triplets.anchor, triplets.negative))


def compare_pairs(arrays, pairs):
    arrays.compare_tuples(PAIRS[0], (pairs.positive_anchor, pairs.positive))
    arrays.compare_tuples(PAIRS[1], (pairs.negative_anchor, pairs.negative))


def run_pair_margin(arrays):
    """The margins are the peer's defaults unless the file holds others."""
    given, options = arrays.inputs(), arrays.parameters()
    margins = {
        "positive_margin": options.get("pos_margin", 0.2),
        "negative_margin": options.get("neg_margin", 0.8),
    }
    pairs = mine_pair_margin(given["z"], given["labels"], **margins)
    compare_pairs(arrays, pairs)
    checked(arrays, contrastive_margin_loss(given["z"], given["labels"], pairs=pairs, **margins))


def run_contrastive(arrays):
    given, options = arrays.inputs(), arrays.parameters()
    loss = contrastive_margin_loss(
        given["z"],
        given["labels"],
        positive_margin=options.get("pos_margin", 0.0),
        negative_margin=options.get("neg_margin", 1.0),
    )
    checked(arrays, loss)


def run_multi_similarity(arrays):
    given, options = arrays.inputs(), arrays.parameters()
    checked(arrays, multi_similarity_loss(given["z"], given["labels"], **options))


def run_multi_similarity_mined(arrays):
    given = arrays.inputs()
    pairs = mine_multi_similarity(given["z"], given["labels"], epsilon=arrays.parameter("param_epsilon"))
    compare_pairs(arrays, pairs)
    checked(arrays, multi_similarity_loss(given["z"], given["labels"], pairs=pairs))


def run_circle(arrays):
    given = arrays.inputs()
    margin, gamma = arrays.parameter("param_m"), arrays.parameter("param_gamma")
    checked(arrays, circle_loss(given["z"], given["labels"], margin=margin, gamma=gamma))


def run_cross_batch_memory(arrays):
    """A ring that already holds the batch; a row and its own copy there are no pair.

    The peer counts the negative pairs of rows without a positive too, so the pairs are listed here.
    """
    given, size = arrays.inputs(), arrays.parameter("param_memory_size")
    rows, width = given["Z"].shape[1:]
    memory = torch.zeros(size, width, dtype=arrays.dtype)
    labels = torch.zeros(size, dtype=torch.int64)
    losses = []
    for step, (z, y) in enumerate(zip(given["Z"], given["Y"], strict=True)):
        own = (torch.arange(rows) + step * rows) % size
        memory[own], labels[own] = z.detach(), y
        filled = min(size, (step + 1) * rows)
        same = y[:, None] == labels[:filled]
        other = own[:, None] != torch.arange(filled)
        pairs = Pairs(*(same & other).nonzero().T, *(~same).nonzero().T)
        losses.append(
            contrastive_margin_loss(z, y, ref=memory[:filled], ref_labels=labels[:filled], pairs=pairs)
        )
    tolerance = parity.similarity_tolerance(arrays.dtype, anchors=rows)
    arrays.check(losses[-1], tolerance=tolerance)
    arrays.compare("out_losses", torch.stack(losses), tolerance=tolerance)
    arrays.compare("out_memory", memory, tolerance=tolerance)
    arrays.compare("out_labels_mem", labels)
    arrays.compare("out_queue_idx", len(losses) * rows % size)


KINDS = {
    "edge_all_unique_triplet": run_triplet,
    "pml_batchhard": run_batch_hard,
    "pml_circle": run_circle,
    "pml_contrastive": run_contrastive,
    "pml_easysemihard": run_easy_semi_hard,
    "pml_multisim": run_multi_similarity,
    "pml_multisim_mined": run_multi_similarity_mined,
    "pml_pairmargin": run_pair_margin,
    "pml_triplet": run_triplet,
    "pml_tripletminer": run_triplet_miner,
    "pml_xbm": run_cross_batch_memory,
}
