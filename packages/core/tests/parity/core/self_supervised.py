"""Losses without pairs of rows as lightly and solo-learn compute them: redundancy, prediction, clustering."""

from cl_core.functional import (
    barlow_twins_loss,
    byol_loss,
    negative_cosine_similarity,
    sinkhorn,
    swav_loss,
    vicreg_loss,
)
from cl_core.testing import parity


def two_views(function, names=None, **fixed):
    """A loss of z0 and z1 whose parameters are called otherwise; ``names`` maps theirs to ours."""

    def run(arrays):
        given = arrays.inputs()
        options = {(names or {})[name]: value for name, value in arrays.parameters().items()}
        loss = function(given["z0"], given["z1"], **fixed, **options)
        arrays.check(loss, tolerance=parity.similarity_tolerance(arrays.dtype, anchors=len(given["z0"])))

    return run


def vicreg_with_summed_variances(z1, z2, *, var_weight, **options):
    """The peer adds the variance terms of the two views, ours and the authors' code take their mean."""
    return vicreg_loss(z1, z2, var_weight=2 * var_weight, **options)


def run_swav(arrays):
    given, options = arrays.inputs(), arrays.parameters()
    scores = [given[f"{kind}{i}"] for kind in ("hi", "low") for i in range(6) if f"{kind}{i}" in given]
    queue = [given[f"q{i}"] for i in range(2)] if "q0" in given else None
    assert len(scores) + 2 * (queue is not None) == len(given), "an input was not used"
    balance = {
        name.removeprefix("sinkhorn_"): v for name, v in options.items() if name.startswith("sinkhorn_")
    }
    tolerance = parity.similarity_tolerance(
        arrays.dtype, temperature=min(options["temperature"], balance["epsilon"]), anchors=len(scores[0])
    )
    loss = swav_loss(*scores, queue=queue, temperature=options["temperature"], **balance)
    arrays.check(loss, tolerance=tolerance)
    if "out_code0" in arrays:
        arrays.compare("out_code0", sinkhorn(scores[0], **balance), tolerance=tolerance)


def run_sinkhorn_large(arrays):
    scores, options = arrays.inputs()["x"], arrays.parameters()
    # Logits of size |score| / epsilon carry that many roundings.
    size = scores.abs().max().item() / options["epsilon"]
    tolerance = parity.similarity_tolerance(arrays.dtype, temperature=1 / size)
    arrays.compare("out_code", sinkhorn(scores, **options), tolerance=tolerance)
    arrays.waive("code_f32_isnan", reason="tells that the peer failed in float32")


VICREG = {"lambda_param": "sim_weight", "mu_param": "var_weight", "nu_param": "cov_weight"}
SOLO_VICREG = {"sim": "sim_weight", "var": "var_weight", "cov": "cov_weight"}
KINDS = {
    "lightly_barlow": two_views(barlow_twins_loss, {"lambda_param": "lambd"}),
    "lightly_vicreg": two_views(vicreg_loss, VICREG),
    "lightly_negcos": two_views(negative_cosine_similarity, detach=False),
    "lightly_swav": run_swav,
    "lightly_swav_queue": run_swav,
    "solo_byol": two_views(byol_loss),
    "solo_simsiam": two_views(negative_cosine_similarity),
    "solo_vicreg": two_views(vicreg_with_summed_variances, SOLO_VICREG),
    "edge_const_barlow": two_views(barlow_twins_loss),
    "edge_collapsed_vicreg": two_views(vicreg_loss),
    "edge_sinkhorn_large": run_sinkhorn_large,
}
