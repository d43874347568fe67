"""The primitive against its definition, in every form."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cl_core import _tiles, similarity
from cl_core._tiles import Pairing

ROWS, COLUMNS, WIDTH, TILE = 70, 53, 8, (16, 24)
IMPLS = ("dense", "tiled")
INDEX = torch.arange(ROWS)


def random_rows(count, *, seed, logit=5.0, dtype=torch.float64):
    z = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.nn.functional.normalize(z, dim=1) * logit**0.5).to(dtype).requires_grad_()


def random_keys(count, *, seed):
    return torch.randint(0, 9, (count,), generator=torch.Generator().manual_seed(seed))


def naive(rows, columns, excluded, log_weight=0.0):
    logits = rows.double() @ columns.double().t() + log_weight
    return logits.masked_fill(excluded, -torch.inf).logsumexp(1)


def same_value_and_gradients(value, expected, leaves, *, tolerance):
    """Compare finite values and the gradients of a random combination of them."""
    assert torch.equal(value.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(value[finite].double(), expected[finite], rtol=tolerance, atol=tolerance)
    weight = torch.randn(int(finite.sum()), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given = torch.autograd.grad((value[finite] * weight.to(value)).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected[finite] * weight).sum(), leaves, retain_graph=True)
    for one, other in zip(given, wanted, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("logit", [1.0, 20.0, 250.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("pairs", ["self", "pairs", "sevens", "keys", "same"])
def test_self(pairs, dtype, tolerance, logit, impl):
    z = random_rows(ROWS, seed=0, logit=logit, dtype=dtype)
    keys = random_keys(ROWS, seed=1)
    size = {"self": 1, "pairs": 2, "sevens": 7}.get(pairs)
    if size is not None:
        result = similarity.self_log_sum_exp(z, group_size=size, impl=impl, tile=TILE)
        excluded = (INDEX // size)[:, None] == (INDEX // size)[None]
    elif pairs == "keys":
        result = similarity.self_log_sum_exp(z, keys=keys, impl=impl, tile=TILE)
        excluded = keys[:, None] == keys[None]
    else:
        result = similarity.self_log_sum_exp(z, keys=keys, over="same", impl=impl, tile=TILE)
        excluded = (keys[:, None] != keys[None]) | torch.eye(ROWS, dtype=torch.bool)
    same_value_and_gradients(result, naive(z, z, excluded), [z], tolerance=tolerance)


def one_node(z1, z2, temperature, *, normalize=True, impl="auto"):
    return similarity._two_view_terms(
        z1, z2, temperature=temperature, normalize=normalize, impl=impl, source=z1.dtype
    )


def in_parts(z1, z2, temperature):
    """What the one node computes, in several."""
    n = len(z1)
    rows = similarity.scaled_rows(torch.stack([z1, z2], 1).view(2 * n, -1), scale=temperature**-0.5)
    x, y = rows.view(n, 2, -1).unbind(1)
    return similarity.row_products(x, y)[:, None], similarity.self_log_sum_exp(rows, group_size=2).view(n, 2)


# 100 and 200 samples: panels of 256 rows hold both views, or end inside one.
@pytest.mark.parametrize("samples", [1, 2, 100, 200, 256])
@pytest.mark.parametrize("norm", [1.0, 1e-14, 0.0, 1e200])
def test_two_views_in_one_node(samples, norm):
    z = [random_rows(samples, seed=seed).detach() for seed in (1, 2)]
    z[0][0] *= norm
    z = [view.requires_grad_() for view in z]
    given, wanted = one_node(*z, 0.2), in_parts(*z, 0.2)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in wanted]
    if samples == 1:
        weights[1].zero_()  # nothing to compare with
    gradients = [torch.autograd.grad(terms, z, weights) for terms in (given, wanted)]
    for one, other in zip(*gradients, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12 * scale)


def test_two_views_in_one_node_can_be_differentiated_twice():
    z = [random_rows(4, seed=seed) for seed in (1, 2)]
    function = lambda a, b: one_node(a, b, 0.5)  # noqa: E731
    torch.autograd.gradcheck(function, z)
    torch.autograd.gradgradcheck(function, z)


def test_only_small_batches_of_small_logits_take_the_one_node():
    z = random_rows(8, seed=1)
    assert one_node(z, z, 0.1, impl="dense") is not None
    assert one_node(z, z, 0.1, impl="tiled") is None
    assert one_node(z, z, 0.1, normalize=False) is None  # of unknown length
    assert one_node(z, z, torch.tensor(0.1)) is None  # wants a gradient
    assert one_node(z, z, 1e-3) is None  # needs a shift
    assert one_node(torch.empty(1025, 4), torch.empty(1025, 4), 0.1) is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("logit", [1.0, 250.0])
@pytest.mark.parametrize("over", ["all", "different", "same", "same less ids"])
def test_cross(over, logit, impl):
    x, y = random_rows(ROWS, seed=0, logit=logit), random_rows(COLUMNS, seed=1, logit=logit)
    row_keys, column_keys = random_keys(ROWS, seed=2), random_keys(COLUMNS, seed=3)
    options = {"row_keys": row_keys, "column_keys": column_keys}
    equal = row_keys[:, None] == column_keys[None]
    excluded = {"all": torch.zeros_like(equal), "different": equal}.get(over, ~equal)
    if over == "same less ids":
        options |= {"row_ids": INDEX, "column_ids": INDEX[:COLUMNS]}
        excluded = excluded | (INDEX[:, None] == INDEX[None, :COLUMNS])
    result = similarity.cross_log_sum_exp(x, y, over=over.split()[0], impl=impl, tile=TILE, **options)
    same_value_and_gradients(result, naive(x, y, excluded), [x, y], tolerance=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("logit", [1.0, 250.0, 700.0])
@pytest.mark.parametrize("over", ["all", "different"])
def test_paired_looks_both_ways(over, logit, impl):
    x, y = random_rows(ROWS, seed=0, logit=logit), random_rows(COLUMNS, seed=1, logit=logit)
    excluded = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    if over == "different":
        excluded = INDEX[:, None] == INDEX[None, :COLUMNS]
    both = similarity.paired_log_sum_exp(x, y, over=over, impl=impl, tile=TILE)
    expected = naive(x, y, excluded), naive(y, x, excluded.t())
    same_value_and_gradients(torch.cat(both), torch.cat(expected), [x, y], tolerance=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("over", ["all", "same"])
def test_softplus_sum(over, impl):
    x, y = random_rows(ROWS, seed=0, logit=20), random_rows(COLUMNS, seed=1, logit=20)
    row_keys, column_keys = random_keys(ROWS, seed=2), random_keys(COLUMNS, seed=3)
    offset = torch.randn(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 30
    offset.requires_grad_()
    result = similarity.softplus_sum(
        x, y, offset, row_keys=row_keys, column_keys=column_keys, over=over, impl=impl, tile=TILE
    )
    counts = (
        row_keys[:, None] == column_keys[None]
        if over == "same"
        else torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    )
    margin = x @ y.t() + offset[:, None]
    expected = (torch.logaddexp(margin, torch.zeros_like(margin)) * counts).sum(1)
    same_value_and_gradients(result, expected, [x, y, offset], tolerance=1e-10)


class PairWeight(torch.nn.Module):
    """A learnable weight of a pair's distance in the batch, and of a vector of the rows."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, rows, columns, of_rows):
        distance = (rows[:, None] - columns[None]).abs().double()
        return of_rows[rows][:, None] - self.slope * distance.log1p()


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_function_and_its_gradients(impl):
    x, y = random_rows(ROWS, seed=0), random_rows(COLUMNS, seed=1)
    source = random_rows(ROWS, seed=2)
    of_rows, weight = source.sum(1), PairWeight()  # an input with a history of its own
    keys = random_keys(ROWS, seed=3), random_keys(COLUMNS, seed=4)
    result = similarity.cross_log_sum_exp(
        x,
        y,
        row_keys=keys[0],
        column_keys=keys[1],
        over="different",
        log_weight=weight,
        weight_inputs=(of_rows,),
        impl=impl,
        tile=TILE,
    )
    expected = naive(x, y, keys[0][:, None] == keys[1][None], weight(INDEX, INDEX[:COLUMNS], of_rows))
    same_value_and_gradients(result, expected, [x, y, source, weight.slope], tolerance=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_temperature_of_each_row(impl):
    z, y = random_rows(ROWS, seed=0), random_rows(COLUMNS, seed=1)
    temperature = torch.linspace(0.05, 2, ROWS, dtype=torch.float64, requires_grad=True)
    rows = similarity.scaled_rows(z, scale=1 / temperature)
    result = similarity.cross_log_sum_exp(rows, y, impl=impl, tile=TILE)
    unit = torch.nn.functional.normalize(z, dim=1)
    expected = naive(unit / temperature[:, None], y, torch.zeros(ROWS, COLUMNS, dtype=torch.bool))
    same_value_and_gradients(result, expected, [z, y, temperature], tolerance=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_or_a_column_without_a_partner(impl):
    x, y = random_rows(6, seed=0), random_rows(6, seed=1)
    keys = torch.zeros(6, dtype=torch.int64)
    empty = similarity.cross_log_sum_exp(x, y, row_keys=keys, column_keys=keys, over="different", impl=impl)
    assert (empty == -torch.inf).all()
    gradients = torch.autograd.grad(torch.sigmoid(empty).sum(), [x, y])
    assert all((g == 0).all() for g in gradients)
    nothing = similarity.cross_log_sum_exp(x[:0], y, impl=impl)
    assert nothing.shape == (0,)
    assert torch.autograd.grad(nothing.sum(), y)[0].abs().sum() == 0
    alone = similarity.cross_log_sum_exp(x, y[:0], impl=impl)
    assert (alone == -torch.inf).all()


def test_softmax_mean():
    x, y = random_rows(ROWS, seed=0), random_rows(COLUMNS, seed=1)
    result = similarity.softmax_mean(x, y, tile=TILE)
    assert not result.requires_grad
    torch.testing.assert_close(result, ((x @ y.t()).softmax(1) @ y).detach())


@pytest.mark.parametrize("tile", [TILE, (1, 1), None])
@pytest.mark.parametrize("pairs", ["all", "pairs", "sevens", "keys"])
def test_nearest(pairs, tile):
    x = random_rows(ROWS, seed=0)
    y, options = x, {"group_size": {"pairs": 2, "sevens": 7}.get(pairs, 1), "over": "different"}
    row_keys = column_keys = INDEX // options["group_size"]
    if pairs == "all":
        y, options = random_rows(COLUMNS, seed=1), {"over": "all"}
        row_keys, column_keys = torch.zeros(ROWS), torch.ones(COLUMNS)
    elif pairs == "keys":
        y, row_keys, column_keys = (
            random_rows(COLUMNS, seed=1),
            random_keys(ROWS, seed=2),
            random_keys(COLUMNS, seed=3),
        )
        options |= {"row_keys": row_keys, "column_keys": column_keys}
    products = (x @ y.t()).masked_fill(row_keys[:, None] == column_keys, -torch.inf)
    found = similarity.nearest(x, y, tile=tile, **options)
    assert torch.equal(found, products.argmax(1))


def test_nearest_of_equal_columns_is_the_first_and_of_none_is_minus_one():
    x = torch.ones(40, WIDTH)
    for tile in (TILE, (7, 3)):
        found = similarity.nearest(x, x, group_size=2, over="different", tile=tile)
        assert found.tolist() == [2, 2] + [0] * 38
        keys = torch.zeros(40, dtype=torch.int64)
        found = similarity.nearest(x, x, row_keys=keys, column_keys=keys, over="different", tile=tile)
        assert found.tolist() == [-1] * 40
        assert similarity.nearest(x[:0], x, tile=tile).shape == (0,)


@pytest.mark.parametrize("norm", [1e38, 1e20, 1.0, 1e-8, 1e-11])
def test_scaled_rows_of_any_norm(norm):
    z = random_rows(9, seed=0, dtype=torch.float32).detach()
    z[3] = 0
    z = (z * norm).requires_grad_()
    wide = z.detach().double().requires_grad_()
    weight = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    result, expected = similarity.scaled_rows(z, scale=3.0), 3 * torch.nn.functional.normalize(wide, dim=1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    (one,) = torch.autograd.grad((result * weight).sum(), z)
    (other,) = torch.autograd.grad((expected * weight).sum(), wide)
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other[0].abs().max().item())


def test_scaled_rows_are_twice_differentiable():
    z, scale = random_rows(4, seed=0), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    function = lambda z, scale: similarity.scaled_rows(z, scale=scale)  # noqa: E731
    assert torch.autograd.gradcheck(function, (z, scale))
    assert torch.autograd.gradgradcheck(function, (z, scale))


@pytest.mark.parametrize("group_size", [1, 2, 3, 5])
def test_fill_of_groups_equals_the_mask(group_size):
    pairing = Pairing("different", 23, 23, group_size=group_size)
    for r0, c0, rows, columns in itertools.product(range(0, 20, 3), range(0, 20, 4), (1, 3), (2, 6)):
        corners = (r0, min(23, r0 + rows), c0, min(23, c0 + columns))
        tile = torch.zeros(corners[1] - corners[0], corners[3] - corners[2])
        assert torch.equal(pairing.fill_(tile, *corners, 1).bool(), pairing.excluded(*corners))
    for r0 in range(0, 20, group_size):  # the square on the diagonal has a way of its own
        corners = (r0, r0 + group_size, r0, r0 + group_size)
        tile = torch.zeros(group_size, group_size)
        assert torch.equal(pairing.fill_(tile, *corners, 1).bool(), pairing.excluded(*corners))


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_tiled_forms_never_build_the_matrix():
    n, tile = 600, (32, 64)
    z, keys = random_rows(n, seed=0).detach(), random_keys(n, seed=1).sort()[0]
    groups, labels = Pairing("different", n, n, group_size=2), Pairing("different", n, n, keys=(keys, keys))
    most = max(tile[0] * tile[1], n * WIDTH)
    gradient = torch.ones(n, dtype=torch.float64)
    with LargestTensor() as largest:
        for pairing in (groups, labels):
            result = _tiles.rows_forward(z, z.clone(), pairing, tile)
            _tiles.rows_backward(gradient, z, z.clone(), result, pairing, tile)
            result, _ = _tiles.shared_forward(z, z, pairing, tile, symmetric=True)
            _tiles.shared_backward(gradient, None, z, z, result, None, pairing, tile, symmetric=True)
            _tiles.softplus_forward(z, z.clone(), gradient, pairing, tile)
            _tiles.softplus_backward(gradient, z, z.clone(), gradient, pairing, tile)
    assert largest.entries <= most
    x, y = random_rows(n, seed=0), random_rows(n, seed=1)
    weight, of_rows = PairWeight(), torch.zeros(n, dtype=torch.float64, requires_grad=True)
    with LargestTensor() as largest:
        similarity.cross_log_sum_exp(
            x, y, log_weight=weight, weight_inputs=(of_rows,), impl="tiled", tile=tile
        ).sum().backward()
    assert largest.entries <= most


def test_an_unwanted_gradient_is_not_computed():
    x, y = random_rows(ROWS, seed=0), random_rows(COLUMNS, seed=1)
    pairing = Pairing("all", ROWS, COLUMNS)
    result = _tiles.rows_forward(x.detach(), y.detach(), pairing, TILE)
    dx, dy = _tiles.rows_backward(
        torch.ones_like(result), x.detach(), y.detach(), result, pairing, TILE, need_y=False
    )
    assert dx is not None
    assert dy is None
    value = similarity.cross_log_sum_exp(x, y.detach(), impl="tiled", tile=TILE)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], dx)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["self", "keys", "cross", "paired", "softplus"])
def test_tiled_forms_compile_to_one_graph(form, backend):
    x, y = random_rows(ROWS, seed=0), random_rows(ROWS, seed=1)
    keys, offset = random_keys(ROWS, seed=2), torch.zeros(ROWS, dtype=torch.float64)

    def function(x, y):
        if form == "self":
            return similarity.self_log_sum_exp(x, group_size=2, impl="tiled", tile=TILE)
        if form == "keys":
            return similarity.self_log_sum_exp(x, keys=keys, impl="tiled", tile=TILE)
        if form == "cross":
            return similarity.cross_log_sum_exp(
                x, y, row_keys=keys, column_keys=keys, over="different", impl="tiled", tile=TILE
            )
        if form == "paired":
            return sum(similarity.paired_log_sum_exp(x, y, impl="tiled", tile=TILE))
        return similarity.softplus_sum(x, y, offset, impl="tiled", tile=TILE)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)(x, y)
    eager = function(x, y)
    torch.testing.assert_close(compiled, eager)
    gradients = [
        torch.autograd.grad(value.sum(), [x, y], allow_unused=True, materialize_grads=True)
        for value in (compiled, eager)
    ]
    torch.testing.assert_close(*gradients)


def test_a_compiled_loss_still_refuses_nan():
    from cl_core.functional import nt_xent_loss

    z = random_rows(8, seed=0).detach()
    torch.compiler.reset()
    compiled = torch.compile(nt_xent_loss, fullgraph=True, backend="aot_eager")
    assert compiled(z, z.flip(0)).isfinite()
    z[2, 3] = torch.nan
    with pytest.raises(RuntimeError, match="z1 must be finite"):
        compiled(z, z.flip(0))


@pytest.mark.parametrize("impl", IMPLS)
def test_two_sets_that_are_one_tensor(impl):
    """Two towers that share their rows are still two towers, and keys may differ from side to side."""
    z = random_rows(ROWS, seed=0)
    weight = torch.linspace(-1, 2, 2 * ROWS, dtype=torch.float64)
    both = torch.cat(similarity.paired_log_sum_exp(z, z, over="all", impl=impl, tile=TILE))
    expected = torch.cat([naive(z, z, torch.zeros(ROWS, ROWS, dtype=torch.bool))] * 2)
    given, wanted = (torch.autograd.grad((value * weight).sum(), z)[0] for value in (both, expected))
    torch.testing.assert_close(given, wanted)
    row_keys, column_keys = random_keys(ROWS, seed=1), random_keys(ROWS, seed=2)
    options = {"row_keys": row_keys, "column_keys": column_keys, "over": "same", "impl": impl, "tile": TILE}
    result = similarity.cross_log_sum_exp(z, z, **options)
    same_value_and_gradients(
        result, naive(z, z, row_keys[:, None] != column_keys[None]), [z], tolerance=1e-10
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_whose_weights_are_all_zero(impl):
    x, y = random_rows(6, seed=0), random_rows(5, seed=1)

    def log_weight(rows, columns):
        return torch.where(rows[:, None] == 2, -torch.inf, 0.0).expand(len(rows), len(columns)).double()

    result = similarity.cross_log_sum_exp(x, y, log_weight=log_weight, impl=impl, tile=TILE)
    assert (result == -torch.inf).tolist() == [False, False, True, False, False, False]
    (gradient,) = torch.autograd.grad(torch.sigmoid(result).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[2] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_keeps_its_digits_at_a_tiny_temperature(impl):
    """At temperature 0.004 a logit has 250 as its scale; rounding its level must not show in the gradient."""
    z = random_rows(600, seed=0, logit=250, dtype=torch.float32)
    wide = z.detach().double().requires_grad_()
    given, wanted = (
        torch.autograd.grad(similarity.self_log_sum_exp(rows, impl=impl, tile=(64, 128)).sum(), rows)[0]
        for rows in (z, wide)
    )
    error = (given.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 2e-5, f"{error:.2g}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: similarity.self_log_sum_exp(z, impl="fast"), "impl must be one of"),
        (lambda z: similarity.self_log_sum_exp(z, over="all"), "over must be one of"),
        (
            lambda z: similarity.cross_log_sum_exp(z, z, row_keys=INDEX),
            "row_keys and column_keys must be given together",
        ),
        (lambda z: similarity.softplus_sum(z, z, z[:, 0], column_keys=INDEX), "must be given together"),
        (lambda z: similarity.paired_log_sum_exp(z, z, over="same"), "over must be one of"),
        (lambda z: similarity.self_log_sum_exp(z.half()), "rows must be float32 or float64"),
        (lambda z: similarity.self_log_sum_exp(z[:, 0]), "rows must be float32 or float64 of shape"),
        (lambda z: similarity.self_log_sum_exp(z, keys=INDEX[:3]), "keys must have shape"),
        (lambda z: similarity.self_log_sum_exp(z, group_size=0), "group_size must be"),
        (lambda z: similarity.self_log_sum_exp(z, tile=(0, 4)), "tile must be"),
        (lambda z: similarity.cross_log_sum_exp(z, z[:, 1:]), "same number of columns"),
        (
            lambda z: similarity.cross_log_sum_exp(z, z, row_ids=INDEX, column_ids=INDEX, over="same"),
            "row_ids must",
        ),
        (lambda z: similarity.nearest(z, z, over="same"), "over must be one of"),
        (lambda z: similarity.nearest(z, z, row_keys=INDEX), "must be given together"),
        (lambda z: similarity.softplus_sum(z, z, z[:1, 0]), "offset must have shape"),
        (
            lambda z: similarity.cross_log_sum_exp(
                z, z, log_weight=lambda r, c: z.sum() * (r[:, None] + c[None])
            ),
            "log_weight must be a module",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_rows(ROWS, seed=0))
