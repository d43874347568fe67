import pytest
import torch
from torch import nn

from cl_core.functional import byol_loss, cacr_momentum_loss, cacr_queue_loss, dcl_loss, info_nce_loss
from cl_core.losses import BYOLLoss, CACRLoss, CACRMomentumLoss, DCLLoss, InfoNCELoss, NTXentLoss
from cl_core.memory import FeatureQueue
from cl_core.method import Progress
from cl_core.projectors import MLPProjector
from cl_core.testing import Ranks
from cl_vision.data import Views
from cl_vision.encoders import SmallConvNet
from cl_vision.methods import NNCLR, MoCo, MoCoV3


def views(seed, rows=8, count=2):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rows, 1, 2, 2, generator=generator)  # so that images differ also for a small network
    images = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noisy = tuple(images + 0.1 * torch.randn(images.shape, generator=generator) for _ in range(count))
    return Views(noisy, torch.arange(rows), torch.arange(rows))


def moco(loss=None, *, norm="group", seed=0, **options):
    torch.manual_seed(seed)
    head = MLPProjector(out_dim=16, norm="none")
    return MoCo(
        SmallConvNet(4, in_channels=1, norm=norm),
        loss or InfoNCELoss(0.2),
        head,
        **{"queue_size": 20, **options},
    )


def step(method, batch, lr=0.05):
    optimiser = torch.optim.SGD(method.parameters(), lr=lr)
    loss = method(batch)
    loss.backward()
    optimiser.step()
    method.after_step(Progress(1, 10, 0, 1))
    return loss.item()


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (InfoNCELoss(0.2), lambda q, k, queue: info_nce_loss(q, k, queue, temperature=0.2)),
        (DCLLoss(0.2), lambda q, k, queue: dcl_loss(q, k, negatives=queue, temperature=0.2)),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_compares_queries_with_keys_and_the_queue(loss, function, symmetric):
    method, batch = moco(loss, symmetric=symmetric), views(1)
    queue = method.queue.embeddings.clone()
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(20))
    queries = [method.projector(method.encoder(view)) for view in batch.views]
    keys = [method.key_network(view) for view in batch.views]
    expected = function(queries[0], keys[1], queue)
    if symmetric:
        expected = (expected + function(queries[1], keys[0], queue)) / 2
    torch.testing.assert_close(method(batch), expected)
    taken = nn.functional.normalize(torch.cat([keys[1], keys[0]]) if symmetric else keys[1], dim=1)
    rows = method.queue.embeddings
    assert method.queue.pointer == len(taken)
    torch.testing.assert_close(rows[: len(taken)], taken)
    assert torch.equal(rows[len(taken) :], queue[len(taken) :])


def test_the_queue_is_left_alone_in_evaluation():
    method = moco().eval()
    before = method.queue.embeddings.clone()
    method(views(1))
    assert torch.equal(method.queue.embeddings, before)


def test_the_key_network_follows_and_takes_no_gradient():
    method = moco(momentum=0.75)
    before = [parameter.clone() for parameter in method.key_network.parameters()]
    step(method, views(1))
    assert all(parameter.grad is None for parameter in method.key_network.parameters())
    network = nn.Sequential(method.encoder, method.projector)
    for old, key, query in zip(before, method.key_network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(key, 0.75 * old + 0.25 * query)


def test_moco_learns_to_find_the_key_in_a_full_queue():
    """Its loss rises while keys take the place of the random rows, which are easier; after that it falls."""
    method = moco(queue_size=16, momentum=0.9, norm="batch")
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    losses = []
    for seed in range(100):
        loss = method(views(seed))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step(Progress(1, 10, 0, 1))
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[2:12])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_splits_matter_to_batch_statistics_only(norm):
    batch = views(1)
    losses = []
    for splits in (1, 2):
        method = moco(norm=norm, batch_splits=splits)
        torch.manual_seed(3)
        losses.append(method(batch))
        expected = method.key_network(batch.views[1])
        torch.manual_seed(3)
        if norm == "group" or splits == 1:
            torch.testing.assert_close(method.keys(batch.views[1]), expected)  # in the order of the images
        else:
            assert not torch.allclose(method.keys(batch.views[1]), expected)
            parts = torch.cat([method.projector(method.encoder(part)) for part in batch.views[0].chunk(2)])
            torch.testing.assert_close(method.project(batch.views[0]), parts)
    assert torch.allclose(*losses) == (norm == "group")


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as pool:
        yield pool


def heads(width=16):
    return [MLPProjector(hidden_dim=24, out_dim=width, norm="none") for _ in range(2)]


def nnclr(loss, *, support_size=20):
    torch.manual_seed(0)
    return NNCLR(SmallConvNet(4, in_channels=1, norm="group"), loss, *heads(), support_size=support_size)


def on_a_rank(group, build, batches):
    """Train on one's own part of each batch; gradients are averaged as by DistributedDataParallel."""
    method = build(InfoNCELoss(0.2, group=group)).double()
    memory = next(module for module in method.modules() if isinstance(module, FeatureQueue))
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    rank = 0 if group is None else torch.distributed.get_rank(group)
    losses = []
    for batch in batches:
        own = slice(None) if group is None else slice(0, 5) if rank == 0 else slice(5, 8)
        loss = method(Views(tuple(v[own].double() for v in batch.views), batch.labels[own], batch.index[own]))
        optimiser.zero_grad()
        loss.backward()
        loss = loss.detach()
        if group is not None:
            for value in (loss, *(p.grad for p in method.parameters() if p.grad is not None)):
                torch.distributed.all_reduce(value, group=group)
                value /= 2
        optimiser.step()
        method.after_step(Progress(1, 10, 0, 1))
        losses.append(loss.item())
    return losses, memory.embeddings.clone(), [p.detach().clone() for p in method.parameters()]


@pytest.mark.parametrize("build", [moco, nnclr])
def test_two_processes_train_as_one(build, ranks):
    """Keys are encoded on another rank than their queries; with group normalisation that changes nothing."""
    batches = [views(seed) for seed in range(4)]
    losses, queue, parameters = on_a_rank(None, build, batches)
    for their_losses, their_queue, their_parameters in ranks.run(on_a_rank, build, batches, world_size=2):
        assert their_losses == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(their_queue, queue, rtol=1e-7, atol=1e-9)
        for ours, theirs in zip(parameters, their_parameters, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-9)


def test_moco_v3_predicts_the_keys_of_the_other_view():
    torch.manual_seed(0)
    method = MoCoV3(SmallConvNet(4, in_channels=1, norm="group"), InfoNCELoss(0.2), *heads(), momentum=0.5)
    first, second = views(1).views
    queries = [method.predictor(method.projector(method.encoder(view))) for view in (first, second)]
    keys = [method.key_network(view) for view in (first, second)]
    expected = sum(
        nn.functional.cross_entropy(
            nn.functional.normalize(q, dim=1) @ nn.functional.normalize(k, dim=1).T / 0.2, torch.arange(8)
        )
        for q, k in ((queries[0], keys[1]), (queries[1], keys[0]))
    )
    torch.testing.assert_close(method(views(1)), 2 * 0.2 * expected)


def test_moco_draws_every_query_to_the_keys_of_all_other_views():
    method, batch = moco(CACRLoss(t_neg=2.0)), views(1, count=3)
    queue = method.queue.embeddings.clone()
    queries = [method.project(view) for view in batch.views]
    keys = [method.key_network(view) for view in batch.views]
    torch.testing.assert_close(method(batch), cacr_queue_loss(queries, keys, queue, t_neg=2.0))
    torch.testing.assert_close(method.queue.embeddings[:8], nn.functional.normalize(keys[-1], dim=1))
    assert method.queue.pointer == 8


@pytest.mark.parametrize("count", [2, 3])
def test_moco_v3_draws_all_other_queries_to_a_key(count):
    torch.manual_seed(0)
    loss = CACRMomentumLoss(0.5)
    method = MoCoV3(SmallConvNet(4, in_channels=1, norm="group"), loss, *heads(), scale=0.7)
    batch = views(1, count=count)
    queries = [method.project(view) for view in batch.views]
    keys = [method.key_network(view) for view in batch.views]
    expected = sum(
        cacr_momentum_loss([q for other, q in enumerate(queries) if other != v], key, temperature=0.5)
        for v, key in enumerate(keys)
    )
    torch.testing.assert_close(method(batch), 0.7 * expected / count)


def test_moco_v3_with_a_loss_of_predictions_is_byol():
    torch.manual_seed(0)
    method = MoCoV3(SmallConvNet(4, in_channels=1, norm="group"), BYOLLoss(), *heads())
    batch = views(1)
    queries = [method.project(view) for view in batch.views]
    keys = [method.key_network(view) for view in batch.views]
    torch.testing.assert_close(method(batch), byol_loss(queries[0], keys[1]) + byol_loss(queries[1], keys[0]))


@pytest.mark.parametrize(("schedule", "moves"), [("cosine", False), ("constant", True)])
def test_momentum_of_moco_v3_rises_to_one(schedule, moves):
    method = MoCoV3(SmallConvNet(4, in_channels=1), InfoNCELoss(), *heads(), momentum=0.5, schedule=schedule)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter += 1
    before = [p.clone() for p in method.key_network.parameters()]
    method.after_step(Progress(10, 10, 0, 1))
    assert moves != all(map(torch.equal, before, method.key_network.parameters()))


def decoupled(neighbours, predictions):
    """The published form at temperature 0.2: the other predictions of the batch in the denominator."""
    scores = nn.functional.normalize(neighbours, dim=1) @ nn.functional.normalize(predictions, dim=1).T / 0.2
    others = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -torch.inf)
    return (others.logsumexp(1) - scores.diagonal()).mean()


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (InfoNCELoss(0.2), lambda n, p: info_nce_loss(n, p, temperature=0.2)),
        (DCLLoss(0.2, negatives="keys"), decoupled),
    ],
)
def test_nnclr_contrasts_the_nearest_of_the_support_set(loss, function):
    torch.manual_seed(0)
    method = NNCLR(SmallConvNet(4, in_channels=1, norm="group"), loss, *heads(), support_size=12)
    support = method.support.embeddings.clone()
    first, second = views(1).views
    z1, z2 = method.project(first), method.project(second)
    nearest = [
        support[nn.functional.cosine_similarity(z[:, None], support[None], dim=2).argmax(1)] for z in (z1, z2)
    ]
    expected = (function(nearest[0], method.predictor(z2)) + function(nearest[1], method.predictor(z1))) / 2
    torch.testing.assert_close(method(views(1)), expected)
    torch.testing.assert_close(method.support.embeddings[:8], nn.functional.normalize(z1, dim=1).detach())
    assert torch.equal(method.support.embeddings[8:], support[8:])


@pytest.mark.parametrize("kind", [MoCo, MoCoV3, NNCLR])
def test_bad_parts_get_one_sentence(kind):
    encoder = SmallConvNet(4)
    with pytest.raises(TypeError, match="encoder must be a cl_vision Encoder, got Linear"):
        kind(nn.Linear(3, 3), InfoNCELoss())
    with pytest.raises(
        TypeError, match=r"loss must be a QueryKeyLoss.*, called with \(query, key(, negatives)?\), got NTX"
    ):
        kind(encoder, NTXentLoss())
    with pytest.raises(ValueError, match=r"projector.in_dim must equal the encoder's dim, got 33 and 32\."):
        kind(encoder, InfoNCELoss(), MLPProjector(33))
    method = kind(SmallConvNet(4, in_channels=1), InfoNCELoss(), MLPProjector(out_dim=8))
    who = kind if kind is NNCLR else InfoNCELoss
    with pytest.raises(ValueError, match=f"{who.__name__} compares 2 views, got 3: pass --data.num_views 2"):
        method(views(1)._replace(views=(views(1).views[0],) * 3))
    with pytest.raises(
        ValueError, match=f"{kind.__name__} compares views, so a batch needs at least 2 of them"
    ):
        method(views(1)._replace(views=views(1).views[:1]))


@pytest.mark.parametrize("kind", [MoCoV3, NNCLR])
def test_predictions_must_have_the_width_of_what_they_predict(kind):
    with pytest.raises(ValueError, match=r"predictor.out_dim must equal the projector's, got 8 and 16"):
        kind(SmallConvNet(4), InfoNCELoss(), MLPProjector(out_dim=16), MLPProjector(out_dim=8))


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_is_a_share(momentum):
    with pytest.raises(ValueError, match=rf"momentum must be in \[0, 1\), got {momentum}"):
        moco(momentum=momentum)
