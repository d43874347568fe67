"""The battery over every registered loss."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from cl_core import functional, losses, plugins
from cl_core.testing import check_group, loss_checks
from cl_core.testing.losses import CHECKS, inputs, made, options

# {loss: {check: reason}}: the one place where a loss may be excused from a check.
EXCLUSIONS = json.loads(Path(__file__).with_name("exclusions.json").read_text())
REGISTERED = {plugin.name: plugins.load_loss(plugin.name) for plugin in plugins.available_losses()}
# What wraps another loss is not built without one, and has tests of its own.
WRAPPERS = {"FeatureTransform"}
LOSSES = {name: loss for name, loss in REGISTERED.items() if name not in WRAPPERS}
CASES = [(name, check) for name, loss in LOSSES.items() for check in loss_checks(loss)]


def test_exclusions_name_what_exists():
    for name, checks in EXCLUSIONS.items():
        assert name in LOSSES
        assert set(checks) <= {*CHECKS, "group"}
        assert all(isinstance(reason, str) and reason for reason in checks.values())


def test_only_wrappers_need_arguments():
    needy = {name for name, loss in REGISTERED.items() if not _stands_alone(loss)}
    assert needy == WRAPPERS


def _stands_alone(loss):
    try:
        inspect.signature(loss).bind()
    except TypeError:
        return False
    return True


@pytest.mark.parametrize(("name", "check"), CASES, ids=lambda value: value)
def test_battery(name, check):
    if check in EXCLUSIONS.get(name, {}):
        with pytest.raises(AssertionError):  # an exclusion that is no longer needed fails
            CHECKS[check](LOSSES[name])
    else:
        CHECKS[check](LOSSES[name])


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "impl" in options(loss)])
def test_every_form_compiles_ahead_of_time(name, impl, dynamic):
    """Beyond the battery, which traces dense forms no further than their graph, and all with symbols for shapes."""
    loss = LOSSES[name]
    module = made(loss, inputs(loss), impl=impl)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (7, 12) if dynamic else (9,):
        results = []
        for form in (compiled, module):
            given = inputs(loss, rows=rows)
            value = form(*given)
            wanted = [t for t in given if t.requires_grad]
            results.append((value.detach(), *torch.autograd.grad(value, wanted)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "group" in options(loss)])
def test_group_contract(name, world_size, ranks):
    check_group(LOSSES[name], ranks, world_size)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize(
    "name", ["InfoNCELoss", "NTXentLoss", "DCLLoss", "CACRMomentumLoss", "GatedPairLoss"]
)
def test_the_coldest_temperature_has_its_gradient(name, impl):
    """Up to what rounding leaves of logits: the hardest negative alone counts."""
    loss = LOSSES[name]
    of_type = []
    for dtype in (torch.float32, torch.float64):
        given = inputs(loss, dtype=dtype)
        value = loss(temperature=1e-12, impl=impl)(*given)
        of_type.append([1e-12 * g.double() for g in torch.autograd.grad(value, given[0])])
    torch.testing.assert_close(*of_type, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="temperature must be at least 1e-12"):
        loss(temperature=1e-13, impl=impl)(*inputs(loss))


def memory():
    """Rows that are the same on all ranks, and their labels."""
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return rows, torch.arange(9) % 4


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "given", "options"),
    [
        ("SupConLoss", 0, {"form": "in"}),
        ("SupConLoss", 0, {"form": "pair"}),
        ("SupConLoss", 2, {}),
        ("SupConLoss", 2, {"form": "in"}),
        ("SupConLoss", 2, {"form": "pair"}),
        ("DCLLoss", 0, {"negatives": "cross"}),
        ("DCLLoss", 0, {"negatives": "keys"}),
        ("DCLLoss", 1, {}),
        ("DCLWLoss", 0, {"negatives": "cross"}),
        ("DCLWLoss", 0, {"negatives": "keys"}),
        ("DCLWLoss", 0, {"detach_weight": False}),
        ("DCLWLoss", 1, {}),
        ("CACRLoss", 0, {"cost": "rbf"}),
        ("CACRLoss", 0, {"cost": "rbf", "t_neg": 0.0, "detach_weights": True}),
        ("CACRLoss", 0, {"t_neg": 0.0, "normalize": False}),
        ("CACRLoss", 0, {"tau_plus": 0.1, "symmetric": True}),
        ("CACRLoss", 1, {}),
        ("CACRLoss", 1, {"detach_weights": "queue"}),
        ("CACRLoss", 1, {"in_batch": False, "cost": "rbf"}),
        ("CACRMomentumLoss", 0, {"cost": "euclidean"}),
        ("GatedPairLoss", 0, {"per": "anchor"}),
        ("GatedPairLoss", 0, {"self_pairs": False, "impl": "tiled"}),
        ("GatedPairLoss", 0, {"similarity": "gated_dot", "alpha": 0.5, "learn_alpha": True}),
        ("AMCLLoss", 0, {"include_positive": True, "shared": True}),
        ("AMCLLoss", 0, {"pooling": "lse", "raw_input": True}),
        ("AMCLLoss", 1, {}),
        ("AMCLLoss", 1, {"pooling": "lse", "include_positive": True}),
        ("InfoNCELoss", 0, {"symmetric": True}),
        ("InfoNCELoss", 1, {}),
        ("InfoNCELoss", 1, {"in_batch": True}),
    ],
)
def test_group_contract_of_other_forms(name, given, options, world_size, ranks):
    check_group(LOSSES[name], ranks, world_size, memory=memory()[:given], **options)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_decoupled_over_keys_is_info_nce_without_its_positive(impl):
    """Seen from the queries alone, as NNCLR and MoCo v3 see a batch; the weights of DCLW have mean 1."""
    z1, z2 = inputs(LOSSES["DCLLoss"])
    given = {"temperature": 0.3, "impl": impl, "reduction": "none"}
    each = functional.dcl_loss(z1, z2, negatives="keys", **given)
    assert each.shape == (len(z1),)
    coupled = functional.info_nce_loss(z1, z2, **given)
    torch.testing.assert_close(torch.nn.functional.softplus(each), coupled)
    torch.testing.assert_close(each, functional.dcl_loss(z1, z2, negatives="cross", **given)[: len(z1)])
    flat = functional.dclw_loss(z1, z2, negatives="keys", sigma=1e6, **given)
    torch.testing.assert_close(flat, each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_gradient_through_the_weight_is_the_derivative(impl):
    loss = LOSSES["DCLWLoss"]
    torch.autograd.gradcheck(loss(detach_weight=False, impl=impl), inputs(loss, rows=6, width=3))


FUNCTIONS = {
    "".join(word for word in name.split("_")): getattr(functional, name)
    for name in functional.__all__
    if name.endswith("_loss") or name == "negative_cosine_similarity"
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_module_is_its_function(name):
    """So that parity with other libraries, shown for the functions, holds for the modules too."""
    loss = LOSSES[name]
    function = FUNCTIONS.get(name.lower()) or FUNCTIONS[name.removesuffix("Loss").lower()]
    given = inputs(loss)
    module = made(loss, given, temperature=0.3 if "temperature" in options(loss) else None).double()
    settings = {name: value for name, value in module.hyperparameters().items() if name != "max_scale"}
    settings.pop("miner", None)
    for learnt in ("logit_scale", "logit_bias"):
        if hasattr(module, learnt):
            settings[learnt] = getattr(module, learnt)
    if hasattr(module, "pair_temperature"):
        settings["temperature"] = module.pair_temperature
    # What is left out belongs to another form of the module, called with a queue.
    known = inspect.signature(function).parameters
    settings = {name: value for name, value in settings.items() if name in known and value is not None}
    assert torch.equal(module(*given), function(*given, **settings))


def test_modules_take_what_their_functions_take():
    z1, z2, z3, queue = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(6) % 2
    views = [z1, z2, z3]
    assert torch.equal(losses.NTXentLoss(0.2)(views), functional.nt_xent_loss(views, temperature=0.2))
    for module, function in ((losses.DCLLoss, functional.dcl_loss), (losses.DCLWLoss, functional.dclw_loss)):
        assert torch.equal(module(0.2)(z1, z2, queue), function(z1, z2, negatives=queue, temperature=0.2))
    memory = losses.SupConLoss(0.2)(z1, labels, queue, labels)
    assert torch.equal(
        memory, functional.sup_con_loss(z1, labels, ref=queue, ref_labels=labels, temperature=0.2)
    )
