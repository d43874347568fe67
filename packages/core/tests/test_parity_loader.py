"""The parity loader must fail where a test would otherwise pass without having compared anything."""

import math

import numpy as np
import pytest
import torch

from cl_core.testing import parity

EXACT = parity.Tolerance(1e-12, 0.0, 1e-12, 0.0)


def squares(z):
    return (z**2).sum()


@pytest.fixture
def arrays_folder(tmp_path, monkeypatch):
    """An empty folder of the slug "toy" beside a pretended test module."""
    monkeypatch.delenv(parity.VARIABLE, raising=False)
    (tmp_path / "toy").mkdir()
    return tmp_path / "toy"


@pytest.fixture
def write(arrays_folder):
    """Write one case and return it as the loader finds it."""

    def writer(name="squares_0", **arrays):
        if not arrays:
            z = np.random.default_rng(0).normal(size=(3, 2))
            arrays = {"in_z": z, "loss_f64": (z**2).sum(), "grad_z": 2 * z}
        np.savez(arrays_folder / f"{name}.npz", **arrays)
        found = {case.name: case for case in parity.cases("toy", beside=arrays_folder.parent / "test_toy.py")}
        return found[name]

    return writer


def test_a_right_result_passes_and_a_wrong_value_or_gradient_fails(write):
    case = write()
    with case.open(torch.float64, EXACT) as arrays:
        arrays.check(squares(**arrays.inputs()))
    with pytest.raises(AssertionError, match=r"toy/squares_0.npz in float64: loss_f64 is off by"):
        with case.open(torch.float64, EXACT) as arrays:
            arrays.check(squares(**arrays.inputs()) * (1 + 1e-9))
    with pytest.raises(AssertionError, match="grad_z is off by"), case.open(torch.float64, EXACT) as arrays:
        z = arrays.inputs()["z"]
        arrays.check(squares(z.detach()) + (z - z.detach()).sum())


def test_a_file_that_no_kind_claims_fails(write):
    kinds = {"dcl": 1, "dcl_queue": 2, "edge_small_tau_dcl": 3, "terms": 4}
    assert write("dcl_0", z=0).claim(kinds) == write("dcl_other_7", z=0).claim(kinds) == 1
    assert write("dcl_queue_12", z=0).claim(kinds) == 2
    assert write("edge_small_tau_0.004_dcl", z=0).claim(kinds) == 3
    assert write("terms_tau0p5", z=0).claim(kinds) == 4
    for name in ("dclw_0", "new_kind_0", "edge_dcl_1"):
        with pytest.raises(AssertionError, match=f"no test claims toy/{name}.npz; the kinds claimed are dcl"):
            write(name, z=0).claim(kinds)


def test_an_array_left_unaccounted_for_fails(write):
    z = np.ones((2, 2))
    case = write(in_z=z, loss_f64=4.0, out_code=z, loss_f32=np.float32(4), peer_loss=4.0)
    waived = {"loss_f32": "rounding of the peer", "peer_*": "evidence, not a target"}
    with pytest.raises(AssertionError, match="out_code, loss_f32, peer_loss were neither an input"):
        with case.open(torch.float64, EXACT) as arrays:
            arrays.check(squares(**arrays.inputs()))
    with pytest.raises(AssertionError, match="out_code was neither"):
        with case.open(torch.float64, EXACT, waived=waived) as arrays:
            arrays.check(squares(**arrays.inputs()))
    with case.open(torch.float64, EXACT, waived=waived) as arrays:
        arrays.check(squares(**arrays.inputs()))
        arrays.compare("out_code", z)
    with pytest.raises(ValueError, match="reason must say why"):
        with case.open(torch.float64, waived={"*": " "}):
            pass


def test_a_stored_gradient_of_an_input_that_was_not_differentiated_is_left_over(write):
    case = write()
    with pytest.raises(AssertionError, match="grad_z was neither"), case.open(torch.float64, EXACT) as arrays:
        arrays.check(squares(arrays.tensor("in_z")))


def test_an_error_inside_is_not_hidden_by_the_accounting(write):
    with pytest.raises(ZeroDivisionError), write().open(torch.float64):
        _ = 1 / 0


def test_accounting_starts_afresh_for_every_run(write):
    case = write()
    with case.open(torch.float64, EXACT) as arrays:
        arrays.check(squares(**arrays.inputs()))
    with pytest.raises(AssertionError, match="in_z, loss_f64, grad_z were neither"), case.open(torch.float32):
        pass


def test_no_folder_or_an_empty_one_is_an_error(arrays_folder):
    for slug in ("toy", "absent"):
        with pytest.raises(FileNotFoundError, match=f"no parity arrays of '{slug}'"):
            parity.cases(slug, beside=arrays_folder.parent / "test_toy.py")


def test_the_variable_replaces_the_folder_beside_the_module(write, arrays_folder, monkeypatch, tmp_path):
    write("squares_0")
    elsewhere = tmp_path / "elsewhere" / "toy"
    elsewhere.mkdir(parents=True)
    monkeypatch.setenv(parity.VARIABLE, str(elsewhere.parent))
    beside = arrays_folder.parent / "test_toy.py"
    with pytest.raises(FileNotFoundError):
        parity.cases("toy", beside=beside)
    np.savez(elsewhere / "squares_5.npz", in_z=1.0)
    assert list(map(str, parity.cases("toy", beside=beside))) == ["squares_5"]
    monkeypatch.setenv(parity.VARIABLE, "")
    assert list(map(str, parity.cases("toy", beside=beside))) == ["squares_0"]


def test_shapes_integers_and_non_finite_entries_are_compared_strictly(write):
    stored = {"v": np.array([1.0, np.nan, -np.inf]), "i": np.array([1, 2]), "inf": -np.inf}
    loose = parity.Tolerance(relative=0.5, absolute=0.5)
    with write(**stored).open(torch.float64, loose) as arrays:
        arrays.compare("v", torch.tensor([1.2, math.nan, -math.inf]))
        arrays.compare("i", torch.tensor([1, 2]))
        arrays.compare("inf", -math.inf)
        for name, wrong in [
            ("v", [1.0, 0.0, -math.inf]),
            ("v", [1.0, math.nan, math.inf]),
            ("v", [math.nan, math.nan, -math.inf]),
            ("v", [1.0, math.inf, -math.inf]),
            ("i", [1, 3]),
            ("inf", 0.0),
            ("inf", math.nan),
        ]:
            with pytest.raises(AssertionError, match=f"{name} is off by"):
                arrays.compare(name, torch.tensor(wrong))
        with pytest.raises(AssertionError, match=r"v has shape \(3,\), got \(1, 3\)"):
            arrays.compare("v", torch.ones(1, 3))
        with pytest.raises(AssertionError, match="has no array 'w'; it has v, i, inf"):
            arrays.compare("w", 1.0)


def test_no_tolerance_means_exact(write):
    with write(x=1.0).open(torch.float64) as arrays:
        arrays.compare("x", 1.0)
        with pytest.raises(AssertionError, match="x is off"):
            arrays.compare("x", 1.0 + 1e-15)


def test_index_tuples_are_compared_as_sets(write):
    with write(out_a=[0, 1, 2], out_p=[3, 4, 5]).open(torch.float64) as arrays:
        names = ("out_a", "out_p")
        arrays.compare_tuples(names, [torch.tensor([2, 0, 1]), torch.tensor([5, 3, 4])])
        for a, p in [([2, 0, 1], [3, 4, 5]), ([0, 1], [3, 4]), ([0, 0, 1, 2], [3, 3, 4, 5])]:
            with pytest.raises(AssertionError, match=r"\(out_a, out_p\) should hold 3 tuples"):
                arrays.compare_tuples(names, [torch.tensor(a), torch.tensor(p)])


def test_inputs_come_in_the_type_of_the_run_and_parameters_as_python_objects(write):
    case = write(
        in_z=np.ones((2, 2), np.float32), in_ids=np.arange(2), grad_z=np.zeros((2, 2)),
        param_temperature=0.5, param_steps=3, param_mode="cos", param_flag=True, lams=np.array([1.0, 2.0]),
    )  # fmt: skip
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with case.open(dtype, waived={"grad_z": "not the subject"}) as arrays:
            inputs = arrays.inputs()
            assert inputs["z"].dtype == dtype and inputs["z"].requires_grad
            assert inputs["ids"].dtype == torch.int64 and not inputs["ids"].requires_grad
            expected = {"temperature": 0.5, "steps": 3, "mode": "cos", "flag": True}
            assert arrays.parameters() == expected
            assert arrays.parameter("lams") == [1.0, 2.0]
            assert "param_steps" in arrays and "param_other" not in arrays


def test_a_parameter_that_nobody_read_fails(write):
    case = write(param_power=2, param_epsilon=0.1, param_seed=7, loss_f64=4.0, in_z=[2.0])

    def run(read, waived=None):
        with case.open(torch.float64, EXACT, waived=waived) as arrays:
            read(arrays.parameters())
            arrays.check((arrays.inputs()["z"] ** arrays.parameters()["power"]).sum())

    for nothing in (len, list, lambda p: "seed" in p, lambda p: p.get("other", 3)):
        with pytest.raises(AssertionError, match="param_epsilon, param_seed were neither an input"):
            run(nothing)
    with pytest.raises(AssertionError, match="param_seed was neither an input"):
        run(lambda p: p.get("epsilon", 0.2))
    run(lambda p: p["epsilon"], waived={"param_seed": "how the peer drew its inputs"})
    run(lambda p: dict(**p))
    run(lambda p: dict(p.items()))
    with pytest.raises(KeyError):
        run(lambda p: p["other"])


def test_named_gradients_and_an_unattached_loss(write):
    with write(z1=[1.0, 2.0], z2=[3.0], g1=[2.0, 4.0], g2=[0.0]).open(torch.float64, EXACT) as arrays:
        z1, z2 = arrays.leaves("z1", "z2")
        arrays.compare_gradients(
            (z1**2).sum(), g1=z1, g2=z2
        )  # the loss does not touch z2: its gradient is zero
        with pytest.raises(AssertionError, match="the loss is not attached"):
            arrays.compare_gradients((z1**2).sum().detach(), g1=z1)


def test_a_pickled_array_is_refused(write):
    with (
        pytest.raises(ValueError, match="allow_pickle"),
        write(x=np.array([{}], dtype=object)).open(torch.float64),
    ):
        pass


def test_tolerance_of_similarity_losses_scales_with_temperature_and_anchors():
    near = parity.similarity_tolerance(torch.float32, temperature=0.1, anchors=32)
    assert near.absolute == pytest.approx(3e-6) and near.gradient_absolute == pytest.approx(3e-6 / 32)
    assert parity.similarity_tolerance(torch.float64).relative == 1e-10
    with pytest.raises(ValueError, match=r"dtype must be torch.float64 or torch.float32, got torch.bfloat16"):
        parity.similarity_tolerance(torch.bfloat16)


def test_kinds_of_several_modules_are_merged(write, arrays_folder, monkeypatch, tmp_path):
    beside = arrays_folder.parent / "test_toy.py"
    with pytest.raises(ValueError, match="no kinds of 'toy'"):
        parity.kinds("toy", beside=beside)
    (arrays_folder / "first.py").write_text("def run(arrays): return 1\nKINDS = {'a': run}\n")
    (arrays_folder / "second.py").write_text("KINDS = {'b': 2, 'b_c': 3}\n")
    (arrays_folder / "_shared.py").write_text("")
    monkeypatch.setenv(parity.VARIABLE, str(tmp_path / "elsewhere"))  # moves the arrays, not the code
    merged = parity.kinds("toy", beside=beside)
    assert merged["a"](None) == 1
    assert {kind: merged[kind] for kind in ("b", "b_c")} == {"b": 2, "b_c": 3}
    (arrays_folder / "third.py").write_text("KINDS = {'b': 4}\n")
    with pytest.raises(ValueError, match=r"b of 'toy' are claimed twice, the second time by third\.py"):
        parity.kinds("toy", beside=beside)
