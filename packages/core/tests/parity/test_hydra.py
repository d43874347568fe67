"""SimLAP's loss, gate and draws of class pairs against the stored results of the published functions."""

import pytest
import torch

from cl_core.functional import gated_pair_loss, gated_similarity, info_nce_loss
from cl_core.gates import PairGate, gate_entropy
from cl_core.samplers import WeightedPartners
from cl_core.testing import parity

TOLERANCE = {
    torch.float64: parity.Tolerance(
        relative=1e-10, gradient_relative=1e-8, absolute=1e-14, gradient_absolute=1e-14
    ),
    torch.float32: parity.Tolerance(
        relative=2e-5, gradient_relative=2e-5, absolute=1e-7, gradient_absolute=1e-7
    ),
}


def run_loss_and_gate(arrays):
    for impl in ("dense", "tiled"):
        compare_losses(arrays, impl)
    gates = arrays.tensor("gate_eval")
    given = arrays.tensor("z_query"), arrays.tensor("z_key"), gates
    arrays.compare("gated_cosine_logits", gated_similarity(*given))
    arrays.compare("gate_entropy_mean", gate_entropy(gates))
    arrays.compare("gate_activation", gates.sum(1).mean())
    temperature = arrays.parameter("temperature")
    arrays.compare("infonce_q_k_loss", info_nce_loss(given[0], given[1], temperature=temperature))
    compare_gates(arrays)
    compare_pair_weights(arrays)


def compare_losses(arrays, impl):
    query, key, gates = arrays.leaves("z_query", "z_key", "gate_eval")
    labels, partners = arrays.tensor("y1"), arrays.tensor("y2")
    assert torch.equal(partners, labels[arrays.tensor("perm")])
    options = {"temperature": arrays.parameter("temperature"), "impl": impl}
    given = query, key, labels, partners, gates

    def anchor_mean(given=given, **form):
        """As published: each anchor's sum over the count of its positives + 1e-6, then the mean over all anchors."""
        sums = gated_pair_loss(*given, reduction="none", **options, **form)
        count = (given[3][:, None] == labels).sum(1)
        if (count > 0).all():
            ours = gated_pair_loss(*given, per="anchor", **options, **form)
            torch.testing.assert_close(ours, (sums / count).mean())
        return (sums / (count + 1e-6)).mean()

    dot = {"similarity": "gated_dot"}
    forms = {
        "gated_cosine_globalmean": gated_pair_loss(*given, **options),
        "gated_cosine_anchormean": anchor_mean(),
        "gatesq_dot_anchormean": anchor_mean(**dot),
        "gatesq_dot_minus_alpha": anchor_mean(alpha=arrays.parameter("alpha"), **dot),
    }
    for name, loss in forms.items():
        arrays.compare(f"{name}_loss", loss)
        leaves = {"query": query, "key": key, "gate": gates}
        arrays.compare_gradients(loss, **{f"{name}_grad_{of}": leaf for of, leaf in leaves.items()})
    arrays.compare("open_gate_loss", anchor_mean((query, key, labels, partners, torch.ones_like(gates))))
    identical = gated_pair_loss(query, key, labels, labels, gates, **options)
    arrays.compare("identical_pairs_loss", identical)
    absent = query, key, labels, arrays.tensor("y2_no_positive"), gates
    arrays.compare("no_positive_newest_loss", anchor_mean(absent, **dot))
    arrays.compare("no_positive_newest_loss", gated_pair_loss(*absent, **options))


def compare_gates(arrays):
    state = {}
    for name in arrays.matching("gateparam_*"):
        state[name.removeprefix("gateparam_").replace("label_embedding", "embedding")] = arrays.tensor(name)
    classes, embedding_dim = state["embedding.weight"].shape
    hidden_dim, dim = state["mlp.2.weight"].shape[0], state["mlp.5.weight"].shape[0]
    labels, partners = arrays.tensor("y1"), arrays.tensor("y2")
    for fusion in ("mean", "product"):
        gate = PairGate(classes, dim, embedding_dim=embedding_dim, hidden_dim=hidden_dim, fusion=fusion)
        gate.to(arrays.dtype).load_state_dict(state)
        single = gate.lookup(labels)
        arrays.compare("gate_single_eval", single)
        if fusion == "product":
            arrays.compare("gate_product_eval", gate.eval()(labels, partners))
        else:
            arrays.compare("gate_eval", gate.lookup(labels, partners))
            arrays.compare("gate_train_bnbatch", gate(labels, partners))


def compare_pair_weights(arrays):
    distances = (torch.arange(12)[:, None] - torch.arange(12)).abs()  # those of class 0 are 0 to 11
    for name in arrays.matching("pair_weight_alpha*"):
        drawn = WeightedPartners(distances, float(name.removeprefix("pair_weight_alpha")))
        arrays.compare(name, drawn.probabilities[0])


KINDS = {name.removeprefix("run_"): run for name, run in list(globals().items()) if name.startswith("run_")}
WAIVED = {"proj*": "the projector is a torch.nn.Sequential of whoever hosts the loss, no code of the core"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("hydra", beside=__file__), ids=str)
def test_matches_official(case, dtype):
    run = case.claim(KINDS)
    with case.open(dtype, TOLERANCE[dtype], waived=WAIVED) as arrays:
        run(arrays)
