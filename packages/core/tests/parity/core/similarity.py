"""Softmax and sigmoid losses as lightly, pytorch-metric-learning, solo-learn, PyGCL and open_clip compute them."""

import pytest
import torch

from cl_core.functional import (
    clip_loss,
    dcl_loss,
    dclw_loss,
    info_nce_loss,
    nt_xent_loss,
    ressl_loss,
    siglip_loss,
    sup_con_loss,
)
from cl_core.testing import parity

IMPLS = ("dense", "tiled")


def on_both_impls(run):
    """Run a similarity loss in both forms; each must match."""

    def of_both(arrays):
        for impl in IMPLS:
            run(arrays, impl)

    return of_both


def checked(arrays, loss, temperature, anchors):
    arrays.check(
        loss, tolerance=parity.similarity_tolerance(arrays.dtype, temperature=temperature, anchors=anchors)
    )


def unit(given):
    """Both views at unit length. Peers take the queue as it is, which is of unit length in float32 only."""
    return [torch.nn.functional.normalize(given[name], dim=1) for name in ("z0", "z1")]


def two_views(function):
    """A loss of two views z0, z1 whose parameters carry our names."""

    @on_both_impls
    def run(arrays, impl):
        given, options = arrays.inputs(), arrays.parameters()
        loss = function(given["z0"], given["z1"], impl=impl, **options)
        checked(arrays, loss, options["temperature"], 2 * len(given["z0"]))

    return run


@on_both_impls
def run_ntxent_bank(arrays, impl):
    given, temperature = arrays.inputs(), arrays.parameter("param_temperature")
    loss = info_nce_loss(*unit(given), given["bank"], temperature=temperature, normalize=False, impl=impl)
    checked(arrays, loss, temperature, len(given["z0"]))
    arrays.waive(
        "out_bank_after",
        "out_ptr_after",
        "param_ptr",
        reason="the peer drops rows that pass the end; ours wraps",
    )


@on_both_impls
def run_clip(arrays, impl):
    given, temperature = arrays.inputs(), arrays.parameter("param_temperature")
    loss = clip_loss(given["z0"], given["z1"], logit_scale=given["logit_scale"], impl=impl)
    checked(arrays, loss, temperature, 2 * len(given["z0"]))


@on_both_impls
def run_siglip(arrays, impl):
    given = arrays.inputs()
    loss = siglip_loss(
        given["z0"], given["z1"], logit_scale=given["logit_scale"], logit_bias=given["logit_bias"], impl=impl
    )
    checked(arrays, loss, 1 / given["logit_scale"].item(), len(given["z0"]))


@on_both_impls
def run_moco(arrays, impl):
    given, temperature = arrays.inputs(), arrays.parameter("param_temperature")
    queue = given["queue"].t().contiguous()
    loss = info_nce_loss(*unit(given), queue, temperature=temperature, normalize=False, impl=impl)
    checked(arrays, loss, temperature, len(given["z0"]))


@on_both_impls
def run_mocov3(arrays, impl):
    given, temperature = arrays.inputs(), arrays.parameter("param_temperature")
    loss = info_nce_loss(given["z0"], given["z1"], temperature=temperature, impl=impl)
    checked(arrays, 2 * temperature * loss, temperature, len(given["z0"]))


@on_both_impls
def run_query_key(arrays, impl):
    given = arrays.inputs()
    temperature = arrays.parameter("param_tau" if "param_tau" in arrays else "param_temperature")
    if "pm" in given:
        assert torch.equal(given["pm"], torch.eye(len(given["pm"])).to(given["pm"])), (
            "positives off the diagonal"
        )
    loss = info_nce_loss(given["z0"], given["z1"], temperature=temperature, impl=impl)
    checked(arrays, loss, temperature, len(given["z0"]))


@on_both_impls
def run_infonce_intra(arrays, impl):
    given, temperature = arrays.inputs(), arrays.parameter("param_tau")
    assert torch.equal(given["pm"], torch.eye(len(given["pm"])).to(given["pm"])), "positives off the diagonal"
    each = nt_xent_loss(given["z0"], given["z1"], temperature=temperature, reduction="none", impl=impl)
    checked(arrays, each[: len(given["z0"])].mean(), temperature, len(given["z0"]))


@on_both_impls
def run_ressl(arrays, impl):
    given = arrays.inputs()
    temperature, teacher = arrays.parameter("param_temperature_q"), arrays.parameter("param_temperature_k")
    queue = given["queue"].t().contiguous()
    loss = ressl_loss(
        *unit(given),
        queue,
        temperature=temperature,
        teacher_temperature=teacher,
        normalize=False,
        impl=impl,
    )
    checked(arrays, loss, min(temperature, teacher), len(given["z0"]))


def labelled(form, *, classes="labels"):
    @on_both_impls
    def run(arrays, impl):
        given, temperature = arrays.inputs(), arrays.parameter("param_temperature")
        if "param_views" in arrays:
            assert (given["ids"].unique(return_counts=True)[1] == arrays.parameter("param_views")).all()
        loss = sup_con_loss(
            given["z"],
            given[classes],
            form=form,
            ref=given.get("ref"),
            ref_labels=given.get("ref_labels"),
            temperature=temperature,
            impl=impl,
        )
        checked(arrays, loss, temperature, len(given["z"]))

    return run


def run_batch_of_one_dcl(arrays):
    given, options = arrays.inputs(), arrays.parameters()
    with pytest.raises(ValueError, match="needs at least 2 rows"):
        dcl_loss(given["z0"], given["z1"], **options)
    arrays.waive(
        "loss_f64", "grad_*", reason="the formula has no value without negatives; the peer gives -inf"
    )


@on_both_impls
def run_one_class(arrays, impl):
    given, temperature = arrays.inputs(), arrays.parameter("param_temperature")
    loss = sup_con_loss(given["z"], given["labels"], temperature=temperature, impl=impl)
    bound = parity.similarity_tolerance(arrays.dtype, temperature=temperature, anchors=len(given["z"]))
    arrays.compare("formula_loss", loss, tolerance=bound)
    arrays.waive("loss_f64", "grad_z", reason="the peer returns 0 where the formula does not")


@on_both_impls
def run_singleton_in(arrays, impl):
    """The peer's infinity comes from classes of one; without them its formula and ours agree."""
    given, temperature = arrays.inputs(), arrays.parameter("param_temperature")
    each = sup_con_loss(
        given["z"], given["labels"], form="in", temperature=temperature, reduction="none", impl=impl
    )
    single = (given["labels"][:, None] == given["labels"][None]).sum(1) == 1
    assert single.any()
    assert (each[single] == 0).all()
    assert each.isfinite().all()
    arrays.waive("loss_f64", "grad_z", reason="the peer takes log(0) for a class of one; ours leaves it out")


def half(function, dtype):
    """Inputs exactly representable in a half type, given in it: the loss must be that of full precision."""

    @on_both_impls
    def run(arrays, impl):
        given, options = arrays.inputs(), arrays.parameters()
        narrow = [given[name].detach().to(dtype).requires_grad_() for name in ("z0", "z1")]
        loss = function(*narrow, impl=impl, **options)
        assert loss.dtype == torch.float32
        tolerance = parity.similarity_tolerance(torch.float32, temperature=options["temperature"], anchors=12)
        arrays.compare("loss_f64", loss, tolerance=tolerance)
        loss.backward()
        rounding = parity.Tolerance(gradient_relative=torch.finfo(dtype).eps)
        for name, z in zip(("grad_z0", "grad_z1"), narrow, strict=True):
            assert z.grad.dtype == dtype
            arrays.compare_gradient(name, z.grad.float(), tolerance=rounding)

    return run


KINDS = {
    "lightly_ntxent": two_views(nt_xent_loss),
    "lightly_ntxent_bank": run_ntxent_bank,
    "lightly_dcl": two_views(dcl_loss),
    "lightly_dclw": two_views(dclw_loss),
    "openclip_clip": run_clip,
    "openclip_siglip": run_siglip,
    "solo_moco": run_moco,
    "solo_mocov3": run_mocov3,
    "solo_nnclr": run_query_key,
    "solo_ressl": run_ressl,
    "solo_simclr_ids": labelled("in", classes="ids"),
    "solo_supcon": labelled("in"),
    "pygcl_infonce": run_query_key,
    "pygcl_infonce_intra": run_infonce_intra,
    "pml_supcon": labelled("out"),
    "pml_supcon_ref": labelled("out"),
    "pml_ntxent": labelled("pair"),
    "edge_zero_row_ntxent": two_views(nt_xent_loss),
    "edge_duplicate_rows_ntxent": two_views(nt_xent_loss),
    "edge_identical_views_ntxent": two_views(nt_xent_loss),
    "edge_small_tau_ntxent": two_views(nt_xent_loss),
    "edge_small_tau_dcl": two_views(dcl_loss),
    "edge_small_tau_solo": two_views(nt_xent_loss),
    "edge_antipodal_small_tau_ntxent": two_views(nt_xent_loss),
    "edge_huge_norm_ntxent": two_views(nt_xent_loss),
    "edge_tiny_norm_ntxent": two_views(nt_xent_loss),
    "edge_batch1_ntxent": two_views(nt_xent_loss),
    "edge_batch1_dcl": run_batch_of_one_dcl,
    "edge_singleton_supcon": labelled("out"),
    "edge_all_unique_supcon": labelled("out"),
    "edge_one_class_supcon": run_one_class,
    "edge_singleton_solo": run_singleton_in,
    "edge_bf16_ntxent": half(nt_xent_loss, torch.bfloat16),
    "edge_bf16_dcl": half(dcl_loss, torch.bfloat16),
    "edge_fp16_ntxent": half(nt_xent_loss, torch.float16),
    "edge_fp16_dcl": half(dcl_loss, torch.float16),
}
