"""Recorded scores against what the whole matrix of scores says."""

import math

import pytest
import torch
import torch.nn.functional as F

from cl_core import scores
from cl_core.scores import CURVES, ScoreRecorder


def rows(count, width=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def definition(query, key, negatives, temperature=None, chosen=None):
    """The numbers of one step, from N x K scores."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    positives = (query * key).sum(1)
    picked = torch.arange(len(query)) if chosen is None else chosen
    if negatives is None:
        others = ~torch.eye(len(query), dtype=torch.bool)[picked]
        found = (query[picked] @ key.T)[others].view(len(picked), -1)
    else:
        found = query[picked] @ F.normalize(negatives, dim=1).T
    numbers = [positives.mean(), positives.var(correction=0), found.mean(), found.var(1).mean()]
    if temperature is None:
        numbers += [torch.tensor(math.nan)] * 2
    else:
        numbers += [(values / temperature).exp().mean().log() for values in (positives, found)]
    histograms = [torch.histc(values, 64, -1, 1).long() for values in (positives, found)]
    return [x.double() for x in numbers], histograms


def compare(recorder, wanted, rtol=1e-9, atol=1e-12):
    found = recorder.flush()
    for place, name in enumerate(CURVES):
        column = torch.stack([numbers[place] for numbers, _ in wanted])
        torch.testing.assert_close(found[name], column, rtol=rtol, atol=atol, equal_nan=True)
    return found


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize(("count", "size"), [(12, 30), (12, None), (70, 4099), (131, None), (1, 5)])
def test_equal_the_whole_matrix(count, size, temperature):
    """Also across tiles, and with numbers that do not divide each other."""
    recorder, wanted = ScoreRecorder(), []
    for seed in range(3):
        given = rows(count, seed=seed), rows(count, seed=seed + 10), size and rows(size, seed=seed + 20)
        recorder.update(*given, temperature=temperature)
        wanted.append(definition(*given, temperature))
    found = compare(recorder, wanted)
    for place, name in enumerate(("positive_histogram", "negative_histogram")):
        assert torch.equal(found[name], sum(histograms[place] for _, histograms in wanted)[None])


def test_tiles_in_both_directions_make_no_difference(monkeypatch):
    given, batch = (rows(20), rows(20, seed=1), rows(33, seed=2)), (rows(20), rows(20, seed=1))
    whole, tiled = ScoreRecorder(), ScoreRecorder()
    whole.update(*given, temperature=0.2)
    whole.update(*batch, temperature=0.2)
    monkeypatch.setattr(scores, "_TILE", (7, 4))
    tiled.update(*given, temperature=0.2)
    tiled.update(*batch, temperature=0.2)
    found = tiled.flush()
    for name, values in whole.flush().items():
        torch.testing.assert_close(found[name], values)


def test_float32_is_exact_to_its_rounding():
    given = [rows(64, 32, seed=s, dtype=torch.float32) for s in range(2)] + [rows(5000, 32, 3, torch.float32)]
    recorder = ScoreRecorder()
    recorder.update(*given, temperature=0.1)
    compare(recorder, [definition(*(z.double() for z in given), 0.1)], rtol=3e-6, atol=1e-7)


def test_variance_of_nearly_equal_scores():
    """A mean near 1 and a tiny variance, which sums of squares would lose."""
    noise = 1e-3 * rows(5000, 16, 1)
    given = (
        (rows(1, 16) + noise[:50]).float(),
        (rows(1, 16) - noise[:50]).float(),
        (rows(1, 16) + noise).float(),
    )
    recorder = ScoreRecorder()
    recorder.update(*given)
    compare(recorder, [definition(*(z.double() for z in given))], rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize("size", [30, None])
def test_some_queries(size):
    given = rows(50), rows(50, seed=1), size and rows(size, seed=2)
    recorder = ScoreRecorder(rows=7)
    recorder.update(*given)
    wanted = definition(*given, chosen=torch.arange(7) * 50 // 7)
    found = compare(recorder, [wanted])
    assert torch.equal(found["negative_histogram"][0], wanted[1][1])
    assert found["positive_histogram"].sum() == 50
    more = ScoreRecorder(rows=51)
    more.update(*given)
    compare(more, [definition(*given)])


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_to_count_agree(masked):
    recorder = ScoreRecorder(bins=10, limits=(-0.5, 1.0))
    given = 3 * rows(40, 40).float()
    given[0, :4] = torch.tensor([-0.5, 1.0, -7.0, 7.0])  # the ends, and beyond
    left_out = rows(40, 40, seed=1) > 0.3 if masked else None
    counted = recorder._counted(given, left_out)
    assert torch.equal(counted, recorder._counted_by_order(given, left_out))
    assert counted.sum() == (given.numel() if left_out is None else (~left_out).sum())
    kept = given if left_out is None else given[~left_out]
    assert torch.equal(counted, torch.histc(kept.clamp(-0.5, 1.0), 10, -0.5, 1.0).long())


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_given_scores_are_those_of_their_kinds(temperature):
    """Of anchors with several positives, with none, and with no negative; what is neither does not count."""
    recorder = ScoreRecorder(bins=10)
    given, kind = 0.3 * rows(9, 12), torch.randint(0, 3, (9, 12), generator=torch.Generator().manual_seed(3))
    kind[2] = 2
    kind[4] = 1
    before = given.clone()
    recorder.update_scores(given, kind == 0, kind == 1, temperature=temperature)
    found = recorder.flush()
    positive, negative = given[kind == 0], [row[of == 1] for row, of in zip(given, kind, strict=True)]
    wanted = {
        "positive_mean": positive.mean(),
        "positive_variance": positive.var(correction=0),
        "negative_mean": torch.stack([some.mean() for some in negative if len(some)]).mean(),
        "negative_variance": torch.stack([some.var() for some in negative if len(some)]).mean(),
    }
    if temperature is not None:
        for name, some in (("positive", positive), ("negative", given[kind == 1])):
            wanted[f"{name}_log_mean_exp"] = (some / temperature).exp().mean().log()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name][0], value)
    assert torch.equal(given, before)
    for name, of in (("positive_histogram", 0), ("negative_histogram", 1)):
        assert torch.equal(found[name][0], torch.histc(given[kind == of], 10, -1, 1).long())
    recorder.update_scores(given, kind == 4, kind == 4, temperature=temperature)
    none = recorder.flush()
    assert all(none[name].isnan().all() for name in list(wanted)[:4])
    assert none["positive_histogram"].sum() == none["negative_histogram"].sum() == 0


def test_rows_as_they_are():
    query, key, negatives = 2 * rows(4), rows(4, seed=1), rows(9, seed=2)
    recorder = ScoreRecorder()
    recorder.update(query, key, negatives, normalize=False)
    found = recorder.flush()
    torch.testing.assert_close(found["positive_mean"][0], (query * key).sum(1).mean())
    torch.testing.assert_close(found["negative_mean"][0], (query @ negatives.T).mean())
    assert found["negative_histogram"].sum() == 36  # scores beyond the limits count, too


def test_blocks_and_steps():
    recorder, given = ScoreRecorder(every=3), (rows(4), rows(4, seed=1), rows(6, seed=2))
    empty = recorder.flush()
    assert empty["step"].tolist() == [] and empty["negative_histogram"].shape == (0, 64)
    for _ in range(7):
        recorder.update(*given)
    found = recorder.flush()
    assert found["step"].tolist() == [*range(7)] and found["block_end"].tolist() == [3, 6, 7]
    assert found["negative_histogram"].sum(1).tolist() == [72, 72, 24]
    assert found["positive_histogram"].sum(1).tolist() == [12, 12, 4]
    assert found["edges"].tolist() == torch.linspace(-1, 1, 65, dtype=torch.float64).tolist()
    recorder.update(*given)
    found = recorder.flush()
    assert found["step"].tolist() == [7] and found["block_end"].tolist() == [8]
    assert all(values.is_contiguous() and values.device.type == "cpu" for values in found.values())


def test_a_block_that_has_begun_may_go_on():
    once, often, given = ScoreRecorder(every=3), ScoreRecorder(every=3), (rows(4), rows(4, seed=1))
    handed_out = []
    for step in (4, 5, 9, 10, 11):
        once.steps = often.steps = step
        once.update(*given)
        often.update(*given)
        handed_out.append(often.flush(keep_open=True))
    assert [each["step"].tolist() for each in handed_out] == [[4], [4, 5], [4, 5, 9], [10], [10, 11]]
    assert [each["block_end"].tolist() for each in handed_out] == [[5], [6], [10], [11], [12]]
    wanted = once.flush()
    assert wanted["step"].tolist() == [4, 5, 9, 10, 11] and wanted["block_end"].tolist() == [10, 12]
    for name in ("negative_mean", "positive_histogram", "negative_histogram"):
        assert torch.equal(torch.cat([handed_out[2][name], handed_out[4][name]]), wanted[name])


def test_a_temperature_that_is_learnt():
    given, learnt = (rows(4), rows(4, seed=1)), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    as_number, as_tensor = ScoreRecorder(), ScoreRecorder()
    as_number.update(*given, temperature=0.2)
    as_tensor.update(*given, temperature=learnt)
    wanted = as_number.flush()
    for name, values in as_tensor.flush().items():
        assert torch.equal(values, wanted[name]) and not values.requires_grad


@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_goes_on_where_it_was(at):
    def run(recorder, steps):
        for step in steps:
            recorder.update(rows(5, seed=step), rows(5, seed=step + 50), rows(9, seed=99), temperature=0.5)

    straight, first, second = (ScoreRecorder(every=3) for _ in range(3))
    run(straight, range(8))
    run(first, range(at))
    state = {name: values.clone() for name, values in first.state_dict().items()}
    second.load_state_dict(state)
    run(first, range(at, 8))  # what was read is a copy
    run(second, range(at, 8))
    wanted, found, undisturbed = (recorder.flush() for recorder in (straight, second, first))
    for name in wanted:
        assert torch.equal(wanted[name], found[name]), name
        assert torch.equal(wanted[name], undisturbed[name]), name
    assert all(torch.equal(values, state[name]) for name, values in state.items())


def test_numbers_that_do_not_exist_are_nan():
    recorder = ScoreRecorder()
    recorder.update(rows(1), rows(1, seed=1))  # no negative
    recorder.update(rows(2), rows(2, seed=1))  # one: no variance
    found = recorder.flush()
    assert found["negative_mean"].isnan().tolist() == [True, False]
    assert found["negative_variance"].isnan().all()
    assert found["positive_variance"][0] == 0
    assert found["negative_histogram"].sum() == 2


def test_means_of_exponentials_do_not_overflow():
    query = torch.eye(4)
    recorder = ScoreRecorder()
    recorder.update(3 * query, query, 3 * query, temperature=0.02, normalize=False)
    found = recorder.flush()
    assert found["positive_log_mean_exp"].item() == pytest.approx(150)
    assert found["negative_log_mean_exp"].item() == pytest.approx(450 + math.log(1 / 4))


def test_neither_gradient_nor_autocast():
    given = [z.float().requires_grad_() for z in (rows(5), rows(5, seed=1), rows(9, seed=2))]
    inside, outside, half = ScoreRecorder(), ScoreRecorder(), ScoreRecorder()
    outside.update(*given)
    with torch.autocast("cpu", torch.bfloat16):
        inside.update(*given)
    half.update(*(z.detach().bfloat16() for z in given))
    plain = outside.flush()
    for name, values in inside.flush().items():
        assert torch.equal(values.nan_to_num(), plain[name].nan_to_num()) and not values.requires_grad
    torch.testing.assert_close(half.flush()["negative_mean"], plain["negative_mean"], rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r, z: ScoreRecorder(0), "every must be at least 1"),
        (lambda r, z: ScoreRecorder(bins=256), "bins must be at most 255"),
        (lambda r, z: ScoreRecorder(limits=(1.0, -1.0)), "limits must be two numbers, the smaller first"),
        (lambda r, z: ScoreRecorder(limits=(0.0, float("inf"))), "limits must be a finite number"),
        (lambda r, z: ScoreRecorder(rows=0), "rows must be at least 1"),
        (lambda r, z: r.update(z, z[:2]), "query and key must have the same shape"),
        (lambda r, z: r.update(z, z, z[:, :2]), "query and negatives must have the same number of columns"),
        (lambda r, z: r.update(z, z, temperature=0.0), "temperature must be finite and > 0"),
        (lambda r, z: r.update(z * torch.nan, z), "query must be finite"),
        (lambda r, z: r.update(z, z, normalize=1), "normalize must be True or False"),
        (
            lambda r, z: r.update_scores(z, z > 0, z[:2] > 0),
            r"negative must hold truth values of shape \(4, 3\)",
        ),
        (lambda r, z: r.update_scores(z, z, z > 0), "positive must hold truth values"),
        (
            lambda r, z: r.update_scores(z, z > 0, z > 0, temperature=0.0),
            "temperature must be finite and > 0",
        ),
        (lambda r, z: r.load_state_dict({}), "got one without steps, limits"),
        (lambda r, z: r.load_state_dict(ScoreRecorder(bins=9).state_dict()), "64 bins"),
        (lambda r, z: r.load_state_dict(r.state_dict() | {"step": torch.zeros(2)}), r"step of shape \(0,\)"),
        (lambda r, z: r.load_state_dict(r.state_dict() | {"counts": torch.zeros(1)}), "hold counts of shape"),
        (lambda r, z: r.load_state_dict(r.state_dict() | {"open": torch.tensor(3)}), "got 3 steps"),
        (lambda r, z: r.load_state_dict(ScoreRecorder(limits=(0, 1)).state_dict()), "limits"),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call(ScoreRecorder(), torch.ones(4, 3))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_longer_blocks_are_refused():
    long = ScoreRecorder(every=9)
    for _ in range(5):
        long.update(rows(2), rows(2, seed=1))
    with pytest.raises(ValueError, match="at most 3 steps"):
        ScoreRecorder(every=3).load_state_dict(long.state_dict())
