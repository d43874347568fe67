"""Gates of class pairs: symmetric, single pairs while training, looked up without a trace, and what they share."""

import itertools
import math

import pytest
import torch
from torch import nn

from cl_core.gates import (
    PairGate,
    dimension_usage,
    gate_entropy,
    gate_overlap,
    most_alike,
    open_dimensions,
)
from cl_core.method import Method


def gate(fusion="mean", seed=0):
    torch.manual_seed(seed)
    made = PairGate(6, 8, embedding_dim=5, hidden_dim=7, fusion=fusion).double()
    made(torch.arange(6), torch.arange(6).flip(0))  # running statistics other than those of the start
    return made


def pairs(rows=10, seed=0):
    return torch.randint(0, 6, (2, rows), generator=torch.Generator().manual_seed(seed))


def random_gates(rows=7, width=12, seed=0):
    logits = 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.sigmoid()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fusion", ["mean", "product"])
def test_symmetric(fusion, training):
    made, (labels, partners) = gate(fusion).train(training), pairs()
    found = made(labels, partners)
    assert found.shape == (10, 8)
    assert ((found > 0) & (found < 1)).all()
    torch.testing.assert_close(made(partners, labels), found)


@pytest.mark.parametrize("fusion", ["mean", "product"])
def test_is_its_definition(fusion):
    made, (labels, partners) = gate(fusion), pairs()
    e = made.embedding.weight

    def mlp(x):
        for norm, linear in ((made.mlp[1], made.mlp[2]), (made.mlp[4], made.mlp[5])):
            x = x.clamp_min(0)
            x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            x = x @ linear.weight.T + linear.bias
        return x.sigmoid()

    first, second = e[labels], e[partners]
    wanted = mlp((first + second) / 2) if fusion == "mean" else mlp(first) * mlp(second)
    torch.testing.assert_close(made.lookup(labels, partners), wanted.detach())
    torch.testing.assert_close(made.lookup(labels), mlp(first).detach())


def test_a_single_pair_while_training_takes_the_running_statistics():
    made, (labels, partners) = gate(), pairs(rows=1)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    found = made(labels, partners)
    torch.testing.assert_close(found.detach(), made.lookup(labels, partners))
    found.sum().backward()
    assert made.embedding.weight.grad.abs().sum() > 0
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    assert made(labels[:0], partners[:0]).shape == (0, 8)  # a rank without rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    made, (labels, partners) = gate().eval(), pairs()
    assert torch.equal(made(labels.to(dtype), partners.to(dtype)), made(labels, partners))
    assert torch.equal(made.lookup(labels.to(dtype), partners), made(labels, partners))
    some = torch.tensor([1, 4])
    assert torch.equal(made.gates_of_all_pairs(some.to(dtype)).gates, made.gates_of_all_pairs(some).gates)


def test_lookups_leave_no_trace():
    made, (labels, partners) = gate(), pairs()
    made.mlp[1].eval()  # frozen by its owner
    before = {name: value.clone() for name, value in made.state_dict().items()}
    found = made.lookup(labels, partners, tile=3)
    assert not found.requires_grad
    assert made.training and made.mlp[4].training and not made.mlp[1].training
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    torch.testing.assert_close(found, made.eval()(labels, partners).detach())


def test_all_pairs():
    made = gate()
    first, second, gates = made.gates_of_all_pairs(tile=4)
    wanted = list(itertools.combinations_with_replacement(range(6), 2))
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == wanted
    torch.testing.assert_close(gates, made.lookup(first, second))
    some = made.gates_of_all_pairs(torch.tensor([4, 1]))
    assert list(zip(some.first.tolist(), some.second.tolist(), strict=True)) == [(4, 4), (4, 1), (1, 1)]
    torch.testing.assert_close(some.gates[1], gates[wanted.index((1, 4))])


def test_gates_are_float32_under_autocast():
    made, (labels, partners) = gate().float(), pairs()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(labels, partners).dtype == torch.float32


@pytest.mark.parametrize("fusion", ["mean", "product"])
def test_compiles_to_one_graph(fusion):
    made, (labels, partners) = gate(fusion).eval(), pairs()
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(labels, partners), made(labels, partners))


def test_the_embedding_does_not_decay():
    method = Method()
    method.gate = gate()
    decayed, exempt = method.parameter_groups(0.1)
    assert any(p is method.gate.embedding.weight for p in exempt["params"])
    assert [p.ndim for p in decayed["params"]] == [2, 2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gate()(torch.tensor([0, 6]), torch.tensor([0, 1])), r"labels must lie in \[0, 6\)"),
        (lambda: gate()(torch.tensor([0, 1]), torch.tensor([0, -1])), r"partners must lie in \[0, 6\)"),
        (lambda: gate()(torch.tensor([0, 1]), torch.tensor([0])), "partners must have shape"),
        (lambda: gate()(torch.tensor([0.0, 1.0])), "labels must hold integers"),
        (lambda: gate()(3), "labels must be an integer tensor"),
        (lambda: gate()(torch.tensor(3)), "labels must have shape"),
        (lambda: gate().lookup([0, 1]), "labels must be an integer tensor"),
        (lambda: gate().lookup(*pairs(4).split([1, 1])), "labels must have shape"),
        (lambda: gate().gates_of_all_pairs([0, 1]), "labels must be an integer tensor"),
        (lambda: PairGate(6, 8, fusion="sum"), "fusion must be one of"),
        (lambda: PairGate(0, 8), "num_classes must be at least 1"),
        (lambda: gate_entropy(torch.full((2, 3), 1.5)), r"gates must lie in \[0, 1\]"),
        (lambda: open_dimensions(torch.rand(2, 3), threshold=1.0), r"threshold must be in \[0, 1\)"),
        (lambda: gate_overlap(torch.rand(2, 3), torch.rand(2, 4)), "number of columns"),
        (lambda: gate_overlap(torch.rand(2, 3), kind="dice"), "kind must be one of"),
        (lambda: most_alike(torch.rand(2, 3), 0), "count must be at least 1"),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call()
    assert str(error.value).endswith(".")


def test_entropy_of_gates():
    torch.testing.assert_close(gate_entropy(torch.full((3, 4), 0.5)).item(), math.log(2))
    gates = random_gates()
    wanted = -(gates * gates.log() + (1 - gates) * (1 - gates).log()).mean()
    torch.testing.assert_close(gate_entropy(gates), wanted)
    torch.autograd.gradcheck(gate_entropy, random_gates().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entropy_pushes_to_the_ends_and_is_finite_there(dtype):
    gates = torch.tensor([[0.0, 0.25, 0.75, 1.0]], dtype=dtype, requires_grad=True)
    penalty = gate_entropy(gates)
    assert penalty.dtype == torch.float32
    (gradient,) = torch.autograd.grad(penalty, gates)
    assert gradient.sign().tolist() == [[0.0, 1.0, -1.0, 0.0]]
    logits = torch.tensor([[-200.0, 200.0, 0.1]], requires_grad=True)
    (gradient,) = torch.autograd.grad(gate_entropy(logits.sigmoid()), logits)
    assert gradient.isfinite().all()


def entropy_of_a_part(group, parts):
    gates = parts[torch.distributed.get_rank(group)].requires_grad_()
    penalty = gate_entropy(gates, group=group)
    return penalty.detach(), torch.autograd.grad(penalty, gates)[0]


def test_entropy_over_ranks(ranks):
    gates = random_gates().requires_grad_()
    penalty = gate_entropy(gates)
    (gradient,) = torch.autograd.grad(penalty, gates)
    results = ranks.run(entropy_of_a_part, gates.detach().split([4, 0, 3]), world_size=3)
    losses, gradients = zip(*results, strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), penalty.detach())
    torch.testing.assert_close(torch.cat(gradients) / 3, gradient)


def test_what_gates_open():
    gates = torch.tensor([[0.9, 0.2, 0.6], [0.7, 0.1, 0.2], [0.1, 0.2, 0.3]])
    assert open_dimensions(gates).tolist() == [2, 1, 0]
    assert open_dimensions(gates, threshold=0.15).tolist() == [3, 2, 2]
    torch.testing.assert_close(dimension_usage(gates), torch.tensor([2 / 3, 0, 1 / 3]))
    wanted = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(gate_overlap(gates, kind="jaccard"), torch.tensor(wanted))


def test_cosine_overlap():
    gates, others = random_gates(), random_gates(rows=4, seed=1)
    wanted = nn.functional.cosine_similarity(gates[:, None], others[None], dim=2)
    torch.testing.assert_close(gate_overlap(gates, others), wanted)
    torch.testing.assert_close(gate_overlap(gates).diagonal(), torch.ones(7, dtype=torch.float64))
    assert not gate_overlap(gates.requires_grad_()).requires_grad
    torch.testing.assert_close(gate_overlap(gates, others.float()), wanted.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "jaccard"])
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_most_alike(tile, kind):
    gates = random_gates(rows=20)
    overlaps = gate_overlap(gates, kind=kind)
    of_pairs = {(p, q): overlaps[p, q].item() for p, q in itertools.combinations(range(20), 2)}
    first, second, values = most_alike(gates, 8, kind=kind, tile=tile)
    torch.testing.assert_close(
        values.double(), torch.tensor(sorted(of_pairs.values(), reverse=True)[:8]).double()
    )
    for p, q, value in zip(first.tolist(), second.tolist(), values.tolist(), strict=True):
        assert p < q
        assert of_pairs[p, q] == pytest.approx(value)
    assert len(most_alike(gates[:3], 10, kind=kind, tile=tile)[0]) == 3
    assert len(most_alike(gates[:1], 10, kind=kind, tile=tile)[0]) == 0
