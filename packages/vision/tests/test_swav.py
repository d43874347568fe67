import copy
import math
import warnings

import pytest
import torch
from torch import nn

from cl_core.functional import swav_loss
from cl_core.gradient_cache import method_gradient_cache
from cl_core.losses import SwAVLoss
from cl_core.method import Progress
from cl_core.projectors import MLPProjector
from cl_core.testing import Ranks
from cl_core.transforms import PositiveExtrapolation
from cl_vision.data import Views
from cl_vision.encoders import SmallConvNet
from cl_vision.methods import SwAV
from cl_vision.methods._parts import project_crops


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as pool:
        yield pool


def crops(seed=0, rows=8, sizes=(16, 16, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rows, 1, 2, 2, generator=generator)
    made = []
    for size in sizes:
        images = coarse.repeat_interleave(size // 2, 2).repeat_interleave(size // 2, 3)
        made.append(images + 0.1 * torch.randn(images.shape, generator=generator))
    return Views(tuple(made), torch.arange(rows), torch.arange(rows))


def swav(loss=None, *, norm="group", seed=0, **options):
    torch.manual_seed(seed)
    head = MLPProjector(hidden_dim=24, out_dim=12, norm="none")
    settings = {"num_prototypes": 6, "queue_from_epoch": 0, **options}
    return SwAV(SmallConvNet(4, in_channels=1, norm=norm), loss or SwAVLoss(), head, **settings)


def step(method, batch, done=0, total=10, epochs=2, lr=0.1):
    optimiser = torch.optim.SGD(method.parameters(), lr=lr, weight_decay=0.1)
    loss = method(batch)
    loss.backward()
    method.before_step(Progress(done, total, done * epochs // total, epochs))
    optimiser.step()
    method.after_step(Progress(done + 1, total, done * epochs // total, epochs))
    return loss.item()


def unit(rows):
    return nn.functional.normalize(rows, dim=1)


def test_all_crops_predict_the_codes_of_the_first_two():
    method, batch = swav(), crops()
    rows = [unit(method.projector(method.encoder(view))) for view in batch.views]
    expected = swav_loss(*[z @ method.prototypes.T for z in rows])
    torch.testing.assert_close(method(batch), expected)


def test_crops_of_one_size_share_a_pass_and_all_share_the_head():
    """What batch statistics show: those of the encoder are of a size's crops, those of the head of all."""
    method, batch = swav(norm="batch"), crops()
    method.projector = MLPProjector(32, 24, 12)
    calls = []
    method.encoder.register_forward_pre_hook(lambda _, given: calls.append(tuple(given[0].shape)))
    method.projector.register_forward_pre_hook(lambda _, given: calls.append(tuple(given[0].shape)))
    method(batch)
    assert calls == [(16, 1, 16, 16), (16, 1, 8, 8), (32, 32)]


def test_small_crops_receive_a_gradient_and_give_no_codes():
    method, batch = swav(), crops()
    views = tuple(view.requires_grad_() for view in batch.views)
    method(batch._replace(views=views)).backward()
    assert all(view.grad.abs().sum() > 0 for view in views)
    more = batch._replace(views=(*batch.views[:3], batch.views[3].flip(0)))
    codes = []
    for given in (batch, more):
        rows = [unit(method.projector(method.encoder(view))) for view in given.views[:2]]
        codes.append([z @ method.prototypes.T for z in rows])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_prototypes_stay_frozen_then_move_and_keep_unit_length():
    method = swav(freeze_epochs=0.5)  # 5 steps an epoch, so steps 0 to 2
    before = method.prototypes.detach().clone()
    for done in range(3):
        step(method, crops(done), done)
        torch.testing.assert_close(method.prototypes.detach(), before)
    step(method, crops(3), 3)
    assert (method.prototypes - before).abs().max() > 1e-4
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(6))
    for done, still in ((4, True), (5, False)):  # a limit of 6 steps does not shorten epochs of 10
        method(crops()).backward()
        method.before_step(Progress(done, 6, 0, 1, 10))
        assert (method.prototypes.grad is None) == still


def test_queue_fills_from_its_epoch_and_acts_when_full():
    method = swav(queue_size=16, queue_from_epoch=1)
    losses = []
    for done in range(4):
        method.on_epoch_start(Progress(done, 8, done // 2, 2))
        plain = copy.deepcopy(method)
        plain.queues = nn.ModuleList()
        losses.append(math.isclose(plain(crops(done)).item(), step(method, crops(done), done, 8)))
    assert [queue.filled for queue in method.queues] == [16, 16]
    assert losses == [True] * 4
    plain = copy.deepcopy(method)
    plain.queues = nn.ModuleList()
    assert not math.isclose(plain(crops(9)).item(), method(crops(9)).item(), rel_tol=1e-5)
    rows = unit(method.projector(method.encoder(crops(9).views[1])))
    torch.testing.assert_close(method.queues[1].embeddings[:8], rows.detach())


def test_a_training_that_begins_has_an_empty_queue():
    """As after weights of another one were loaded, long before the queue is filled."""
    method = swav(queue_size=8)
    method(crops())
    method.on_fit_start(Progress(3, 10, 0, 2))
    assert [queue.filled for queue in method.queues] == [8, 8]
    method.on_fit_start(Progress(0, 10, 0, 2))
    assert [queue.filled for queue in method.queues] == [0, 0]


def test_queue_is_left_alone_in_evaluation():
    method = swav(queue_size=16).eval()
    method(crops())
    assert method.queues[0].filled == 0


def test_training_makes_codes_predictable():
    method = swav(norm="batch", num_prototypes=8)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    losses = []
    for seed in range(60):
        loss = method(crops(seed % 10))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step(Progress(seed + 1, 60, 0, 1))
        losses.append(loss.item())
    assert losses[0] > 0.8 * math.log(8)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_more_prototypes_than_rows_are_warned_of_once():
    method = swav(num_prototypes=60, queue_size=16)
    with pytest.warns(UserWarning, match="60 prototypes, but a batch of 8 images and a queue of 16 rows"):
        method(crops())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(crops())
        swav(num_prototypes=24, queue_size=16)(crops())


def warned_on_a_rank(group, prototypes):
    method, batch = swav(SwAVLoss(group=group), num_prototypes=prototypes, queue_size=16), crops()
    own = slice(0, 5) if torch.distributed.get_rank(group) == 0 else slice(5, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        method(Views(tuple(view[own] for view in batch.views), batch.labels[own], batch.index[own]))
    return [str(warning.message) for warning in said if "prototypes" in str(warning.message)]


def test_the_rows_of_all_processes_count_for_the_prototypes(ranks):
    """And the first of them alone says so."""
    assert ranks.run(warned_on_a_rank, 24, world_size=2) == [[], []]
    first, second = ranks.run(warned_on_a_rank, 25, world_size=2)
    assert ["a batch of 8 images and a queue of 16 rows" in message for message in first] == [True]
    assert second == []


def test_bad_parts_get_one_sentence():
    from cl_core.losses import DCLLoss

    with pytest.raises(
        TypeError, match=r"loss must be a ScoresLoss, called with \(\*scores, queue\), got DCLLoss"
    ):
        swav(DCLLoss())
    with pytest.raises(ValueError, match="num_prototypes must be at least 2, got 1"):
        swav(num_prototypes=1)
    with pytest.raises(ValueError, match="freeze_epochs must be at least 0"):
        swav(freeze_epochs=-1.0)
    with pytest.raises(ValueError, match="compares views, so a batch needs at least 2"):
        swav()(crops(sizes=(8,)))
    with pytest.raises(
        ValueError, match=r"needs crops \[0, 2\], counted from 0, got 2 of them: pass --data.num_views 3"
    ):
        swav(SwAVLoss(assignment_crops=(0, 2)))(crops(sizes=(8, 8)))


def test_extrapolated_embeddings_predict_and_give_no_codes():
    positive = PositiveExtrapolation(2.0, "scalar")
    method, batch = swav(positive=positive, queue_size=16), crops()
    rows = [unit(method.projector(method.encoder(view))) for view in batch.views]
    torch.manual_seed(4)
    found = method(batch)
    torch.manual_seed(4)
    lam = positive.draw(rows[0])
    moved = [lam * rows[0] + (1 - lam) * rows[1], lam * rows[1] + (1 - lam) * rows[0], *rows[2:]]
    scores, predictions = ([z @ method.prototypes.T for z in each] for each in (rows, moved))
    torch.testing.assert_close(found, swav_loss(*scores, predictions=predictions))
    torch.testing.assert_close(method.queues[0].embeddings, rows[0].detach())
    torch.testing.assert_close(swav(positive=positive).eval()(batch), swav_loss(*scores))


def test_a_gradient_cache_is_exact_without_a_queue_and_refused_with_one():
    method, batch = swav(), crops()
    method(batch).backward()
    expected = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    value, portions = method_gradient_cache(method, batch, chunk_size=3)
    for portion in portions:
        portion.backward()
    torch.testing.assert_close(value, method(batch).detach())
    torch.testing.assert_close([p.grad for p in method.parameters()], expected)
    with pytest.raises(ValueError, match=r"must not be remembered on the way, got FeatureQueue 'queues\.0'"):
        method_gradient_cache(swav(queue_size=16), batch, chunk_size=3)


def test_half_precision_makes_codes_in_full():
    method = swav()
    with torch.autocast("cpu", torch.bfloat16):
        rows = project_crops(method.encoder, method.projector, crops().views)
        scores = method.scores(rows[0])
        loss = method(crops())
    assert scores.dtype == torch.float32
    assert loss.dtype == torch.float32
    loss.backward()
    assert method.prototypes.grad.isfinite().all()


def on_a_rank(group, batches):
    method = swav(SwAVLoss(group=group), queue_size=16, freeze_epochs=0.0).double()
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    rank = 0 if group is None else torch.distributed.get_rank(group)
    own = slice(None) if group is None else slice(0, 5) if rank == 0 else slice(5, 8)
    losses = []
    for batch in batches:
        views = tuple(view[own].double() for view in batch.views)
        loss = method(Views(views, batch.labels[own], batch.index[own]))
        optimiser.zero_grad()
        loss.backward()
        loss = loss.detach()
        if group is not None:
            for value in (loss, *(p.grad for p in method.parameters())):
                torch.distributed.all_reduce(value, group=group)
                value /= 2
        optimiser.step()
        method.after_step(Progress(1, 10, 0, 1))
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in method.parameters()]


def test_two_processes_train_as_one(ranks):
    """Codes are balanced over the rows of both, and the queue holds the rows of both."""
    batches = [crops(seed) for seed in range(4)]
    losses, parameters = on_a_rank(None, batches)
    for their_losses, their_parameters in ranks.run(on_a_rank, batches, world_size=2):
        assert their_losses == pytest.approx(losses, rel=1e-9)
        for ours, theirs in zip(parameters, their_parameters, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-9)
