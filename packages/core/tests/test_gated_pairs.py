"""The loss over gated class pairs against its definition, and what must hold of it for any data."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cl_core.functional import gated_pair_loss, gated_similarity, sup_con_loss
from cl_core.losses import GatedPairLoss
from cl_core.losses.gated_pairs import _Walk


def batch(rows=9, width=5, classes=4, seed=0, dtype=torch.float64):
    """Query, key, labels, partner classes and gates; the partners are those of a permutation of the batch."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    labels = torch.arange(rows) % classes
    partners = labels[torch.randperm(rows, generator=generator)]
    gates = torch.randn(rows, width, generator=generator, dtype=torch.float64).sigmoid()
    leaves = [t.to(dtype).requires_grad_() for t in (query, key, gates)]
    return leaves[0], leaves[1], labels, partners, leaves[2]


def similarities(query, key, gates, similarity="gated_cosine", alpha=0.0):
    """With all gated keys written out, one set for each anchor, shape (B, N, K)."""
    if similarity == "gated_cosine":
        ours, theirs = F.normalize(gates * query, dim=1), F.normalize(gates[:, None] * key, dim=2)
        return (ours[:, None] * theirs).sum(2)
    ours, theirs = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return (ours[:, None] * theirs * (gates.square() - alpha)[:, None]).sum(2)


def definition(
    query, key, labels, partners, gates, *, key_labels=None, temperature=0.1, self_pairs=True, **form
):
    """Losses of the positive pairs of each anchor, pair by pair."""
    key_labels = labels if key_labels is None else key_labels
    logits = similarities(query, key, gates, **form) / temperature
    losses = []
    for i in range(len(query)):
        others = [j for j in range(len(key)) if key_labels[j] not in (labels[i], partners[i])]
        denominator = logits[i, others].exp().sum()
        of_anchor = [
            -(logits[i, j].exp() / (logits[i, j].exp() + denominator)).log()
            for j in range(len(key))
            if key_labels[j] == partners[i] and (self_pairs or j != i)
        ]
        losses.append(torch.stack(of_anchor) if of_anchor else logits.new_zeros(0))
    return losses


def reduced(losses, per, reduction):
    each = torch.stack([x.sum() if per == "pair" or not len(x) else x.mean() for x in losses])
    if reduction != "mean":
        return each if reduction == "none" else each.sum()
    counted = sum(len(x) if per == "pair" else min(1, len(x)) for x in losses)
    return each.sum() / max(1, counted)


FORMS = [{}, {"similarity": "gated_dot"}, {"similarity": "gated_dot", "alpha": 0.5}]


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("per", ["pair", "anchor"])
@pytest.mark.parametrize("self_pairs", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_is_its_definition(form, self_pairs, per, reduction, impl):
    query, key, labels, partners, gates = given = batch()
    assert (labels == partners).any()  # so that self_pairs matters
    options = {"temperature": 0.3, "self_pairs": self_pairs, **form}
    found = gated_pair_loss(*given, per=per, reduction=reduction, impl=impl, **options)
    wanted = reduced(definition(*given, **options), per, reduction)
    torch.testing.assert_close(found, wanted)
    leaves = query, key, gates
    gradients = (torch.autograd.grad(value.sum(), leaves) for value in (found, wanted))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("per", ["pair", "anchor"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_other_keys_than_the_batch(form, per, impl):
    """Fewer keys than queries, with classes that only they have; class 3 has none, so some anchors do not count."""
    query, _, labels, partners, gates = batch()
    key = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    key_labels = torch.tensor([0, 5, 1, 1, 2, 0, 7])
    assert (partners == 3).any()
    given = query, key, labels, partners, gates
    found = gated_pair_loss(*given, key_labels=key_labels, per=per, impl=impl, **form)
    wanted = reduced(definition(*given, key_labels=key_labels, **form), per, "mean")
    torch.testing.assert_close(found, wanted)
    gradients = (torch.autograd.grad(value, (query, key, gates)) for value in (found, wanted))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("form", [{"self_pairs": False}, {"similarity": "gated_dot", "alpha": 0.2}], ids=str)
def test_several_panels(form):
    given = batch(rows=1500, width=4, classes=30)
    with torch.no_grad():
        assert _Walk(given[0], given[4], given[1])._height < 1500
    results = []
    for impl in ("dense", "tiled"):
        loss = gated_pair_loss(*given, impl=impl, **form)
        results.append((loss, *torch.autograd.grad(loss, [given[0], given[1], given[4]])))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("form", [{}, {"similarity": "gated_dot"}], ids=str)
def test_gradients_of_some_inputs_alone(form, wanted):
    leaves = [0, 1, 4]
    given = batch()
    whole = torch.autograd.grad(gated_pair_loss(*given, **form), [given[i] for i in leaves])
    detached = [t.detach() for t in given]
    for i in wanted:
        detached[leaves[i]].requires_grad_()
    loss = gated_pair_loss(*detached, impl="tiled", **form)
    found = torch.autograd.grad(loss, [detached[leaves[i]] for i in wanted])
    torch.testing.assert_close(found, tuple(whole[i] for i in wanted))


@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_gradients_of_temperature_and_alpha(impl):
    given = [t.detach() for t in batch()]

    def loss(temperature, alpha):
        options = {"similarity": "gated_dot", "temperature": temperature, "alpha": alpha, "impl": impl}
        return gated_pair_loss(*given, **options)

    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.5)]
    torch.autograd.gradcheck(loss, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 2), (40, 17, 64), (8, 40, 256)])
def test_similarities_are_those_of_the_gated_rows(shape, form, dtype):
    rows, keys, width = shape
    generator = torch.Generator().manual_seed(rows)
    query, key = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, keys))
    gates = torch.rand(rows, width, generator=generator).to(dtype)
    found = gated_similarity(query, key, gates, **form)
    assert found.dtype == torch.float32
    wanted = similarities(query.double(), key.double(), gates.double(), **form)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_lengths_do_not_matter(form):
    query, key, labels, partners, gates = batch()
    loss = gated_pair_loss(query, key, labels, partners, gates, **form)
    lengths = torch.linspace(0.1, 30, len(query), dtype=torch.float64)[:, None]
    scaled = gated_pair_loss(query * lengths, key / lengths, labels, partners, gates, **form)
    torch.testing.assert_close(scaled, loss)
    for leaf, gradient in zip((query, key), torch.autograd.grad(loss, (query, key)), strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close((gradient * leaf).sum(1), torch.zeros(len(leaf), dtype=torch.float64))


@pytest.mark.parametrize("factor", [1e20, 1e-9, 1e-20])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_of_any_length(form, factor):
    query, key, labels, partners, gates = (t.detach() for t in batch(dtype=torch.float32))
    loss = gated_pair_loss(query, key, labels, partners, gates, **form)
    given = [(factor * t).requires_grad_() for t in (query, key)]
    found = gated_pair_loss(*given, labels, partners, gates, **form)
    if factor > 1e-12:  # shorter rows are divided by that instead of their length
        torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, given))


def test_a_cosine_knows_the_direction_of_a_gate_alone():
    query, key, labels, partners, gates = batch()
    loss = gated_pair_loss(query, key, labels, partners, gates)
    sizes = torch.logspace(-6, 0, len(gates), dtype=torch.float64)[:, None]
    torch.testing.assert_close(gated_pair_loss(query, key, labels, partners, gates * sizes), loss)
    (gradient,) = torch.autograd.grad(loss, gates)
    torch.testing.assert_close((gradient * gates).sum(1), torch.zeros(len(gates), dtype=torch.float64))
    constant = torch.full_like(gates, 0.3)
    plain = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    torch.testing.assert_close(gated_similarity(query, key, constant), plain)
    # A dot product falls with the gate.
    torch.testing.assert_close(gated_similarity(query, key, constant, similarity="gated_dot"), 0.3**2 * plain)


def test_only_its_own_gate_opens_an_anchor():
    query, key, _, _, gates = batch()
    found = gated_similarity(query, query, gates)
    torch.testing.assert_close(found.diagonal(), torch.ones(len(query), dtype=torch.float64))
    assert not torch.allclose(found, found.T)
    other = torch.cat([gates[:1], gates[1:].flip(0)])
    torch.testing.assert_close(gated_similarity(query, key, other)[0], gated_similarity(query, key, gates)[0])


def test_identical_pairs_with_open_gates_are_sup_con_pair_by_pair():
    query, _, labels, _, gates = batch()
    found = gated_pair_loss(query, query, labels, labels, torch.ones_like(gates), self_pairs=False)
    torch.testing.assert_close(found, sup_con_loss(query, labels, form="pair"))


def test_a_closed_key_is_no_direction():
    """A key with nothing behind the gate: similarity 0, and a gradient that is 0 instead of without bound."""
    query = torch.eye(4, requires_grad=True)
    key = torch.eye(4, requires_grad=True)
    gates = torch.eye(4, requires_grad=True)
    labels = torch.arange(4)
    torch.testing.assert_close(gated_similarity(query, key, gates), torch.eye(4))
    for impl in ("dense", "tiled"):
        loss = gated_pair_loss(query, key, labels, labels, gates, impl=impl)
        gradients = torch.autograd.grad(loss, (query, key, gates))
        assert max(g.abs().max() for g in gradients) < 10


EDGES = {
    "two classes": ([0, 1, 0, 1], [1, 0, 1, 0]),
    "one row": ([0], [0]),
    "absent partner": ([0, 1, 2, 0], [7, 0, 8, 1]),
    "no partner at all": ([0, 1, 2, 3], [7, 8, 9, 9]),
    "one class": ([3, 3, 3], [3, 3, 3]),
    "one class, absent partner": ([3, 3, 3], [4, 4, 4]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_edges_are_finite_and_attached(name, form, impl, dtype):
    labels, partners = (torch.tensor(x) for x in EDGES[name])
    query, key, _, _, gates = batch(rows=len(labels), dtype=dtype)
    for options in ({}, {"per": "anchor"}, {"self_pairs": False}):
        loss = gated_pair_loss(query, key, labels, partners, gates, impl=impl, **options, **form)
        gradients = torch.autograd.grad(loss, (query, key, gates))
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients)
        if name != "absent partner":  # no positive or no negative anywhere
            assert loss == 0
            assert not any(g.any() for g in gradients)
        else:
            assert loss > 0
            assert gradients[0][[0, 2]].abs().sum() == 0  # they have no positive
            assert gradients[0][[1, 3]].abs().min() > 0


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_60_stay_finite(dtype, impl):
    """Where exp(l) and exp(l - mean) overflow float16, and exp(-l) vanishes."""
    query, _, labels, partners, gates = batch(dtype=dtype)
    key = -query.detach()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gated_pair_loss(query, key, labels, partners, gates, temperature=1 / 60, impl=impl)
    wide = query.double(), key.double(), labels, partners, gates.double()
    assert (gated_similarity(*wide[:2], wide[4]) * 60).min() < -59.9
    assert loss.dtype == torch.float32
    wanted = gated_pair_loss(*wide, temperature=1 / 60)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (query, gates)))


def test_gates_in_another_precision():
    """As under autocast: rows in half precision, gates in float32."""
    query, key, labels, partners, gates = batch(dtype=torch.bfloat16)
    wide = gates.detach().float().requires_grad_()
    loss = gated_pair_loss(query, key, labels, partners, wide)
    torch.testing.assert_close(loss, gated_pair_loss(query, key, labels, partners, gates))
    assert torch.autograd.grad(loss, wide)[0].dtype == torch.float32


def gathered(group, given, key_labels, options):
    """Loss of a rank and its gradients, as zeros for the rows of the others."""
    rank = torch.distributed.get_rank(group)
    query, key, labels, partners, gates, of_keys = (part[rank] for part in (*given, key_labels))
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, gates)]
    loss = gated_pair_loss(
        leaves[0], leaves[1], labels, partners, leaves[2], key_labels=of_keys, group=group, **options
    )
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("options", [{}, {"per": "anchor", "similarity": "gated_dot"}], ids=str)
def test_keys_of_other_number_on_every_rank(options, world_size, ranks):
    """Queries and keys split differently, a rank without queries and one without keys."""
    query, _, labels, partners, gates = (t.detach() for t in batch(rows=8))
    key = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    key_labels = torch.arange(9) % 5
    leaves = [t.clone().requires_grad_() for t in (query, key, gates)]
    single = gated_pair_loss(
        leaves[0], leaves[1], labels, partners, leaves[2], key_labels=key_labels, **options
    )
    wanted = torch.autograd.grad(single, leaves)
    rows, keys = {2: ([8, 0], [5, 4]), 3: ([3, 0, 5], [0, 5, 4])}[world_size]
    sizes = rows, keys, rows, rows, rows
    given = [t.split(n) for t, n in zip((query, key, labels, partners, gates), sizes, strict=True)]
    results = ranks.run(gathered, given, key_labels.split(keys), options, world_size=world_size)
    losses, gradients = zip(*results, strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), single.detach())
    for parts, whole in zip(zip(*gradients, strict=True), wanted, strict=True):
        torch.testing.assert_close(torch.cat(parts) / world_size, whole)


MEMORY = """
import sys
from pathlib import Path
import torch
from cl_core.functional import gated_pair_loss
torch.set_num_threads(1)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))

for rows in (64, 2048):
    query, key, gates = (torch.rand(rows, 256, requires_grad=True) for _ in range(3))
    labels = torch.arange(rows) % 100
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    gated_pair_loss(query, key, labels, labels.roll(1), gates, impl=sys.argv[1]).backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("impl", "limit"), [("auto", 100), ("dense", 300)])
def test_resident_memory(impl, limit):
    """The gated keys of 2048 anchors take 4 GB, one matrix of similarities 16 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, impl], capture_output=True, text=True, check=True)
    assert float(done.stdout) < limit


@pytest.mark.parametrize(
    "options", [{"similarity": "gated_dot", "alpha": 0.5}, {"self_pairs": False, "per": "anchor"}], ids=str
)
@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_other_forms_compile_to_one_graph(impl, options):
    module = GatedPairLoss(impl=impl, **options)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for form in (compiled, module):
        given = batch()
        loss = form(*given)
        results.append((loss, *torch.autograd.grad(loss, [given[0], given[1], given[4]])))
    torch.testing.assert_close(*results)


def changed(**replaced):
    names = ["query", "key", "labels", "partners", "gates"]
    given = dict(zip(names, (t.detach() for t in batch()), strict=True))
    return gated_pair_loss(**given | replaced)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: changed(gates=torch.rand(9, 5) * 2), r"gates must lie in \[0, 1\]"),
        (lambda: changed(gates=torch.rand(8, 5)), "gates must have one row for each of query, 9, got 8"),
        (lambda: changed(gates=torch.rand(9, 4)), "number of columns"),
        (lambda: changed(gates=torch.full((9, 5), torch.nan)), "gates must be finite"),
        (lambda: changed(key=torch.rand(8, 5).double()), "same shape"),
        (lambda: changed(partners=torch.zeros(8).long()), "partners must have shape"),
        (lambda: changed(key_labels=torch.zeros(8).long()), "key_labels must have shape"),
        (
            lambda: changed(key_labels=torch.zeros(9).long(), self_pairs=False),
            "self_pairs must be True with key_labels",
        ),
        (lambda: changed(similarity="cosine"), "similarity must be one of"),
        (lambda: changed(alpha=0.5), "alpha must be 0 unless similarity='gated_dot'"),
        (lambda: changed(alpha=float("inf"), similarity="gated_dot"), "alpha must be a finite number"),
        (lambda: changed(per="row"), "per must be one of"),
        (lambda: changed(self_pairs=1), "self_pairs must be True or False"),
        (lambda: GatedPairLoss(alpha=0.5), "alpha must be 0 unless"),
        (lambda: GatedPairLoss(per="row"), "per must be one of"),
        (lambda: GatedPairLoss(learn_alpha=True), "learn_alpha needs similarity='gated_dot'"),
        (lambda: GatedPairLoss(0.001, learn_temperature=True), "temperature must be at least 0.01"),
        (lambda: GatedPairLoss("warm", learn_temperature=True), "temperature must be a number"),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call()
    assert str(error.value).endswith(".")


def test_module_passes_everything_on():
    query, key, labels, partners, gates = given = batch()
    options = {"similarity": "gated_dot", "alpha": 0.4, "per": "anchor", "self_pairs": False}
    torch.testing.assert_close(
        GatedPairLoss(0.2, **options)(*given), gated_pair_loss(*given, temperature=0.2, **options)
    )
    found = GatedPairLoss(0.2)(query, key[:5], labels, partners, gates, labels[:5])
    wanted = gated_pair_loss(query, key[:5], labels, partners, gates, key_labels=labels[:5], temperature=0.2)
    torch.testing.assert_close(found, wanted)
    assert GatedPairLoss(0.2).state_dict() == {}


def test_learnt_temperature_and_alpha():
    given = batch()
    fixed = GatedPairLoss(0.2, similarity="gated_dot", alpha=0.5)
    module = GatedPairLoss(
        0.2, similarity="gated_dot", alpha=0.5, learn_temperature=True, learn_alpha=True
    ).double()
    assert set(module.state_dict()) == {"log_scale", "learnt_alpha"}
    torch.testing.assert_close(module(*given), fixed(*given), rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(module(*given), list(module.parameters()))
    assert all(g.abs() > 1e-3 for g in gradients)
    with torch.no_grad():
        module.log_scale.fill_(10.0)
    torch.testing.assert_close(
        module(*given), GatedPairLoss(0.01, similarity="gated_dot", alpha=0.5)(*given), rtol=1e-6, atol=0
    )
    assert (-module.log_scale).exp() > 0.0099


def test_measures():
    query, key, labels, partners, gates = given = batch()
    found = GatedPairLoss().measures(*given)
    s = gated_similarity(query, key, gates)
    partner = partners[:, None] == labels
    own = (labels[:, None] == labels) & ~partner
    torch.testing.assert_close(found["partner_similarity"], s[partner].mean())
    torch.testing.assert_close(found["own_similarity"], s[own].mean())
    torch.testing.assert_close(found["other_similarity"], s[~(partner | own)].mean())
    torch.testing.assert_close(found["open_dimensions"], (gates > 0.5).sum(1).float().mean())
    assert 0 < found["gate_entropy"] < 0.7
    assert not any(value.requires_grad for value in found.values())
    alone = GatedPairLoss(self_pairs=False).measures(query, query, labels, labels, gates)
    assert set(alone) == {"partner_similarity", "other_similarity", "gate_entropy", "open_dimensions"}
    assert (
        alone["partner_similarity"]
        < GatedPairLoss().measures(query, query, labels, labels, gates)["partner_similarity"]
    )


def test_gates_and_rows_learn_to_satisfy_it():
    """Loss goes down in a few steps, and far lower with a gate a pair than with open gates."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 6
    final = []
    for gated in (True, False):
        z = torch.randn(60, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        table = torch.zeros(6, 6, 16, requires_grad=True)
        optimizer = torch.optim.Adam([z, table], lr=0.1)
        for _ in range(150):
            partners = labels[torch.randperm(60, generator=generator)]
            logits = table[labels, partners] + table[partners, labels]
            gates = logits.sigmoid() if gated else torch.ones_like(logits)
            loss = gated_pair_loss(z, z, labels, partners, gates, self_pairs=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        final.append(loss.item())
    assert final[0] < 0.5 < 1.5 < final[1]
