"""Feature transformation against the stored results of the published queue module."""

import pytest
import torch

from cl_core.functional import info_nce_loss, transformed_info_nce_loss
from cl_core.memory import FeatureQueue
from cl_core.scores import ScoreRecorder
from cl_core.testing import parity
from cl_core.transforms import extrapolate_positives, interpolate_negatives

TOLERANCE = {
    torch.float64: parity.Tolerance(
        relative=1e-9, gradient_relative=1e-9, absolute=1e-14, gradient_absolute=1e-14
    ),
    torch.float32: parity.Tolerance(
        relative=5e-5, gradient_relative=5e-5, absolute=1e-6, gradient_absolute=1e-6
    ),
}


def run_moco_baseline(arrays):
    (q,), k, queue = arrays.leaves("q"), arrays.tensor("k"), arrays.tensor("queue")
    temperature = arrays.parameter("temperature")
    arrays.compare("logits", logits(q, k, q, queue, temperature))
    for loss in (
        info_nce_loss(q, k, queue, temperature=temperature, normalize=False),
        transformed_info_nce_loss(q, k, queue, temperature=temperature, normalize=False),
    ):
        arrays.compare("loss", loss)
        arrays.compare_gradients(loss, grad_q=q)


def run_mixing(arrays):
    (q,), k, queue = arrays.leaves("q"), arrays.tensor("k"), arrays.tensor("queue")
    lam = arrays.tensor("lambda_pos") if "lambda_pos" in arrays else None
    mu = arrays.tensor("lambda_neg") if "lambda_neg" in arrays else None
    if lam is not None:
        arrays.compare("lambda_pos_raw", lam - (lam >= 1).to(lam.dtype))  # 1 where extrapolated
    permutation, temperature = arrays.tensor("permutation"), arrays.parameter("temperature")
    renormalize = "postmix_norm" in arrays.case.name

    arrays.compare("pos_score_before", (q * k).sum(1))
    pair = (q, k) if lam is None else extrapolate_positives(q, k, lam, renormalize=renormalize)
    memory = FeatureQueue(len(queue), queue.shape[1], dtype=queue.dtype)
    fill(memory, queue, arrays.parameter("pointer_before"))
    mixed = queue if mu is None else interpolate_negatives(memory.embeddings, mu, permutation)
    arrays.compare("pos_score_after", (pair[0] * pair[1]).sum(1))
    arrays.compare("logits", logits(*pair, pair[0], mixed, temperature))
    arrays.compare("logits_negatives_vs_original_q", logits(*pair, q, mixed, temperature))
    compare_scores(arrays, *pair, mixed, temperature)

    given = {"positive_lam": lam, "negative_lam": mu, "permutation": None if mu is None else permutation}
    given |= {"renormalize": renormalize, "temperature": temperature, "normalize": False}
    for impl in ("dense", "tiled"):
        loss = transformed_info_nce_loss(q, k, memory.embeddings, impl=impl, **given)
        arrays.compare("loss", loss)
        arrays.compare_gradients(loss, grad_q=q)
        original = transformed_info_nce_loss(
            q, k, memory.embeddings, impl=impl, negatives_use="original", **given
        )
        arrays.compare("loss_negatives_vs_original_q", original)

    memory.enqueue(k)
    arrays.compare("memory_after", memory.embeddings)
    arrays.compare("pointer_after", memory.pointer)


def run_positive_score_law(arrays):
    lams, scores = arrays.tensor("lambda_ex"), arrays.tensor("score")
    query = torch.eye(2, dtype=scores.dtype)[:1].expand(len(scores), 2)
    key = torch.stack([scores, (1 - scores.square()).clamp_min(0).sqrt()], 1)
    found = [torch.linalg.vecdot(*extrapolate_positives(query, key, lam)) for lam in lams]
    arrays.compare("score_after", torch.stack(found))


def logits(query, key, anchors, negatives, temperature):
    return torch.cat([(query * key).sum(1, keepdim=True), anchors @ negatives.T], 1) / temperature


def fill(memory, rows, pointer):
    """Make a queue hold these rows, with its pointer there."""
    memory.enqueue(rows[:pointer])
    memory.enqueue(torch.cat([rows[pointer:], rows[:pointer]]))
    assert memory.pointer == pointer


def compare_scores(arrays, query, key, negatives, temperature):
    """Query by query, as they are stored."""
    recorder = ScoreRecorder()
    for i in range(len(query)):
        recorder.update(query[i : i + 1], key[i : i + 1], negatives, temperature=temperature, normalize=False)
    found = recorder.flush()
    columns = [
        found["negative_mean"],
        found["negative_variance"],
        found["positive_mean"],
        found["negative_log_mean_exp"].exp(),
        found["positive_log_mean_exp"].exp(),
    ]
    found, exact = torch.stack(columns, 1), arrays.tensor("score_stats_exact").double()
    rounding = 1e-9 if arrays.dtype == torch.float64 else 5e-5
    torch.testing.assert_close(found, exact, rtol=rounding, atol=rounding / 50)
    shipped = arrays.tensor("score_float16_as_shipped").double()
    torch.testing.assert_close(found, shipped, rtol=1e-3, atol=1e-3)


KINDS = {
    "moco_baseline": run_moco_baseline,
    "positive_score_law": run_positive_score_law,
    "neg": run_mixing,
    "pos": run_mixing,
    "posneg": run_mixing,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("feature-transformation", beside=__file__), ids=str)
def test_matches_official(case, dtype):
    run = case.claim(KINDS)
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays)
