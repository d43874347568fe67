"""SwAV's codes and loss, and DeepCluster-v2's loss, against the stored results of the published implementation."""

import pytest
import torch

from cl_core.functional import prototype_nce_loss, sinkhorn, swav_loss
from cl_core.testing import parity

TOLERANCE = {
    torch.float64: parity.Tolerance(relative=1e-9, gradient_relative=1e-9, absolute=1e-12),
    torch.float32: parity.Tolerance(relative=2e-5, gradient_relative=1e-4, absolute=1e-6),
}
CODES = {
    torch.float64: TOLERANCE[torch.float64],
    torch.float32: parity.Tolerance(relative=1e-4, absolute=1e-6),
}


def balance(arrays):
    return {name: arrays.parameter(name) for name in ("epsilon", "iterations")}


def run_sinkhorn(arrays):
    arrays.compare("q", sinkhorn(arrays.tensor("scores"), **balance(arrays)), tolerance=CODES[arrays.dtype])


def half_codes(group, scores, options):
    return sinkhorn(scores.chunk(2)[torch.distributed.get_rank(group)], group=group, **options)


def run_sinkhorn_2ranks(arrays, ranks):
    scores, options, tolerance = arrays.tensor("scores"), balance(arrays), CODES[arrays.dtype]
    for rank, codes in enumerate(ranks.run(half_codes, scores, options, world_size=2)):
        arrays.compare(f"q_rank{rank}", codes, tolerance=tolerance)
    arrays.compare("q_single_process", sinkhorn(scores, **options), tolerance=tolerance)


def run_loss(arrays):
    embeddings, prototypes = arrays.leaves("embeddings", "prototypes")
    crops = arrays.parameter("crops_for_assign")
    scores = embeddings @ prototypes.t()
    of_crops = scores.chunk(arrays.parameter("n_crops"))
    options = balance(arrays)
    codes = torch.stack([sinkhorn(of_crops[crop], **options) for crop in crops])
    arrays.compare("codes", codes, tolerance=CODES[arrays.dtype])
    loss = swav_loss(
        *of_crops, assignment_crops=crops, temperature=arrays.parameter("temperature"), **options
    )
    arrays.compare("loss", loss)
    arrays.compare_gradients(loss, grad_embeddings=embeddings, grad_prototypes=prototypes, grad_scores=scores)


def run_queue_protocol(arrays):
    """Each step with the queue the step before left, once that is in use."""
    prototypes, temperature, options = (
        arrays.tensor("prototypes"),
        arrays.parameter("temperature"),
        balance(arrays),
    )
    queues, in_use = arrays.tensor("queue_after"), arrays.parameter("queue_in_use")
    losses, codes = [], []
    for step, embeddings in enumerate(arrays.tensor("embeddings")):
        scores = [crop @ prototypes.t() for crop in embeddings.chunk(2)]
        earlier = list(queues[step - 1] @ prototypes.t()) if in_use[step] else None
        losses.append(swav_loss(*scores, queue=earlier, temperature=temperature, **options))
        together = [torch.cat(pair) for pair in zip(earlier, scores, strict=True)] if earlier else scores
        codes.append(torch.stack([sinkhorn(s, **options)[-len(scores[0]) :] for s in together]))
    assert len(scores[0]) == arrays.parameter("batch")
    arrays.compare("losses", torch.stack(losses))
    arrays.compare("codes", torch.stack(codes), tolerance=CODES[arrays.dtype])
    arrays.waive("queue_length", reason="when rows enter the queue is the method's affair")


def run_deepcluster_v2(arrays):
    (embeddings,) = arrays.leaves("embeddings")
    heads = len(arrays.parameter("n_prototypes"))
    assignments = arrays.tensor("assignments")[:, arrays.tensor("batch_index")]
    loss = prototype_nce_loss(
        embeddings,
        [arrays.tensor(f"centroids_{head}") for head in range(heads)],
        assignments.repeat(1, arrays.parameter("n_crops")),
        temperature=arrays.parameter("temperature"),
        normalize=False,
    )
    arrays.compare("loss", loss, tolerance=TOLERANCE[torch.float32])
    arrays.compare_gradients(loss, grad_embeddings=embeddings)
    arrays.waive(
        "memory*", "init_rows_*", "kmeans_iters", reason="clustering the memory is the method's affair"
    )


def left_to_training(arrays):
    arrays.waive("*", reason="optimiser and schedule belong to the training of a method, not to its loss")


KINDS = {
    "sinkhorn": run_sinkhorn,
    "sinkhorn_2ranks": run_sinkhorn_2ranks,
    "loss": run_loss,
    "queue_protocol": run_queue_protocol,
    "deepcluster_v2": run_deepcluster_v2,
    "larc_sgd": left_to_training,
    "lr_schedule": left_to_training,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("swav", beside=__file__), ids=str)
def test_matches_official(case, dtype, ranks):
    run = case.claim(KINDS)
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays, ranks) if run is run_sinkhorn_2ranks else run(arrays)
