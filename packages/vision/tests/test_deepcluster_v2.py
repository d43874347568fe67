import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cl_core.clustering import nearest_centroid
from cl_core.functional import prototype_nce_loss
from cl_core.losses import DCLLoss, PrototypeNCELoss
from cl_core.method import Progress
from cl_core.projectors import MLPProjector
from cl_core.testing import Ranks
from cl_core.training import Monitoring, Optimization, TrainerOptions, fit
from cl_vision.data import Digits, Views
from cl_vision.encoders import SmallConvNet
from cl_vision.methods import DeepClusterV2


def crops(seed=0, rows=24, first=0, sizes=(16, 16, 8)):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rows, 1, 2, 2, generator=generator)
    made = []
    for size in sizes:
        images = coarse.repeat_interleave(size // 2, 2).repeat_interleave(size // 2, 3)
        made.append(images + 0.1 * torch.randn(images.shape, generator=generator))
    return Views(tuple(made), torch.arange(rows), torch.arange(first, first + rows))


def deepcluster(loss=None, *, norm="group", seed=0, num_prototypes=(5, 4, 3), **options):
    torch.manual_seed(seed)
    head = MLPProjector(hidden_dim=24, out_dim=12, norm="none")
    encoder = SmallConvNet(4, in_channels=1, norm=norm)
    return DeepClusterV2(encoder, loss or PrototypeNCELoss(), head, num_prototypes, **options)


def progress(epoch):
    return Progress(2 * epoch, 20, epoch, 10)


def project(method, view):
    return nn.functional.normalize(method.projector(method.encoder(view)), dim=1)


def test_heads_cluster_the_crops_in_turn():
    method, batch = deepcluster(kmeans_iterations=50), crops()
    method.prepare([batch])
    assert [len(head) for head in method.heads] == [5, 4, 3]
    for number, (head, assigned) in enumerate(zip(method.heads, method.assignments, strict=True)):
        torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)))
        rows = project(method, batch.views[number % 2]).detach()
        assert torch.equal(nearest_centroid(rows, head, metric="cosine")[0], assigned)


def test_all_crops_predict_the_clusters_of_their_image():
    method, batch = deepcluster(), crops()
    method.prepare([batch])
    some = Views(tuple(view[5:9] for view in batch.views), batch.labels[5:9], batch.index[5:9])
    z = torch.cat([project(method, view) for view in some.views])
    assigned = method.assignments[:, 5:9].repeat(1, 3)
    torch.testing.assert_close(method(some), prototype_nce_loss(z, list(method.heads), assigned))


def test_embeddings_wait_in_the_bank_for_the_next_epoch():
    method = deepcluster()
    method.prepare([crops(rows=12), crops(1, rows=12, first=12)])
    before = copy.deepcopy(method.state_dict())
    later = crops(2, rows=12, first=6)
    method(later)
    for crop, bank in enumerate(method.banks):
        changed = (bank.embeddings != before[f"banks.{crop}._embeddings"]).any(1)
        assert changed[6:18].all()
        assert not changed[:6].any()
        assert not changed[18:].any()
        torch.testing.assert_close(bank.embeddings[6:18], project(method, later.views[crop]).detach())
    method.on_epoch_start(progress(0))  # as a resume inside the epoch may call it
    assert torch.equal(method.prototypes, before["prototypes"])
    method.on_epoch_start(progress(1))
    assert not torch.equal(method.prototypes, before["prototypes"])
    in_evaluation = method.eval().banks[0].embeddings.clone()
    method(crops(3))
    assert torch.equal(method.banks[0].embeddings, in_evaluation)


def test_a_state_brings_its_bank_along():
    method = deepcluster()
    method.prepare([crops()])
    loaded = deepcluster(seed=1)
    loaded.load_state_dict(method.state_dict())
    torch.testing.assert_close(loaded(crops(4)), method(crops(4)))


def test_images_without_a_cluster_do_not_count():
    method, batch = deepcluster(), crops()
    method.prepare([Views(tuple(v[::2] for v in batch.views), batch.labels[::2], batch.index[::2] + 1)])
    few = Views(tuple(v[:3] for v in batch.views), batch.labels[:3], torch.tensor([0, 3, 5]))
    without = Views(tuple(v[1:3] for v in batch.views), batch.labels[1:3], torch.tensor([3, 5]))
    torch.testing.assert_close(method.eval()(few), method(without))


def test_an_image_without_an_embedding_of_each_crop_has_no_cluster():
    method = deepcluster()
    method.prepare([crops()])
    method.banks[1]._seen[3] = False  # as of a row of zeros
    method.on_epoch_start(progress(1))
    assert (method.assignments[:, 3] == -1).all()
    assert (method.assignments[:, 4:] >= 0).all()


def test_prototypes_do_not_move_and_no_gradient_reaches_them():
    method = deepcluster()
    method.prepare([crops()])
    method(crops(1)).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert "prototypes" not in dict(method.named_parameters())


def test_bad_use_gets_one_sentence():
    with pytest.raises(TypeError, match=r"loss must be a PrototypeLoss, called with .* got DCLLoss"):
        deepcluster(DCLLoss())
    with pytest.raises(ValueError, match="num_prototypes must hold at least one number, got none"):
        deepcluster(num_prototypes=())
    with pytest.raises(TypeError, match="num_prototypes must be a sequence of numbers, got int"):
        deepcluster(num_prototypes=5)
    with pytest.raises(ValueError, match="num_prototypes must be at most the number of images, 24, got 25"):
        deepcluster(num_prototypes=(25,)).prepare([crops()])
    with pytest.raises(
        ValueError, match=r"clusters of 0 images, got one of a higher number: call method\.prepare"
    ):
        deepcluster()(crops())
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        deepcluster().prepare([])
    with pytest.raises(
        ValueError, match=r"needs crops \[0, 4\], counted from 0, got 3 of them: pass --data.num_views 5"
    ):
        deepcluster(assignment_crops=(0, 4)).prepare([crops()])
    method = deepcluster()
    method.prepare([crops()])
    with pytest.raises(ValueError, match="clusters of 24 images, got one of a higher number"):
        method(crops(first=1))


def test_training_makes_clusters_predictable():
    method = deepcluster(norm="batch", num_prototypes=(6,))
    batches = [crops(0, rows=32), crops(1, rows=32, first=32)]
    method.prepare(batches)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    losses = []
    for epoch in range(15):
        method.on_epoch_start(progress(epoch))
        for batch in batches:
            loss = method(batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert sum(losses[-6:]) < 0.6 * sum(losses[:6])


def on_a_rank(group, batches):
    method = deepcluster(PrototypeNCELoss(group=group)).double()
    rank = 0 if group is None else torch.distributed.get_rank(group)
    own = slice(None) if group is None else slice(0, 14) if rank == 0 else slice(14, 24)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)

    def part(batch):
        return Views(tuple(v[own].double() for v in batch.views), batch.labels[own], batch.index[own])

    torch.manual_seed(5)
    if group is not None:
        method.criterion.group = None
        with pytest.raises(ValueError, match="loss must have a group where several processes train"):
            method.prepare([part(batches[0])])
        method.criterion.group = group
        message = "at least one batch, got none" if rank else r"valid arguments, got others on ranks \[1\]"
        with pytest.raises(ValueError, match=message):
            method.prepare([] if rank else [part(batches[0])])
    torch.manual_seed(5)
    method.prepare([part(batches[0])])
    losses = []
    for epoch, batch in enumerate(batches):
        method.on_epoch_start(progress(epoch))
        loss = method(part(batch))
        optimiser.zero_grad()
        loss.backward()
        loss = loss.detach()
        if group is not None:
            for value in (loss, *(p.grad for p in method.parameters())):
                torch.distributed.all_reduce(value, group=group)
                value /= 2
        optimiser.step()
        losses.append(loss.item())
    return losses, method.assignments


def test_two_processes_train_as_one():
    batches = [crops(seed) for seed in range(3)]
    losses, assignments = on_a_rank(None, batches)
    with Ranks(2) as ranks:
        for their_losses, theirs in ranks.run(on_a_rank, batches, world_size=2):
            assert their_losses == pytest.approx(losses, rel=1e-9)
            assert torch.equal(theirs, assignments)


def test_the_engine_shows_it_the_data_first_and_a_resume_does_not(tmp_path, monkeypatch):
    """Stopped inside the second epoch and resumed, it ends as the run that was never stopped."""
    prepared = []
    prepare = DeepClusterV2.prepare

    def counted(self, batches):
        batches = list(batches)
        prepared.append(sum(len(batch.index) for batch in batches))
        prepare(self, batches)

    monkeypatch.setattr(DeepClusterV2, "prepare", counted)

    def trained(**options):
        torch.manual_seed(0)
        head = MLPProjector(hidden_dim=16, out_dim=8)
        method = DeepClusterV2(SmallConvNet(2, in_channels=1), PrototypeNCELoss(), head, (8, 8))
        return fit(
            method,
            Digits(batch_size=256, image_size=8, validation=0.0),
            optimization=Optimization(lr=1e-3),
            trainer=TrainerOptions(max_epochs=3, accelerator="cpu", progress_bar=False),
            **options,
        )

    whole = trained(run_dir=tmp_path / "whole")
    images = len(Digits(validation=0.0).train_dataset())
    assert prepared == [images]
    loss, calls = DeepClusterV2.loss, []

    def stopped(self, batch):
        calls.append(1)
        if len(calls) == 8:  # five batches an epoch
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(DeepClusterV2, "loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained(run_dir=tmp_path / "stopped")
    monkeypatch.setattr(DeepClusterV2, "loss", loss)
    resumed = trained(resume=tmp_path / "stopped")
    assert prepared == [images, images]
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name


def test_a_moving_average_is_of_the_weights_and_leaves_bank_and_clusters_alone():
    states = {}
    for average in (None, 0.5):
        torch.manual_seed(0)
        encoder = SmallConvNet(2, in_channels=1)
        method = DeepClusterV2(encoder, PrototypeNCELoss(), MLPProjector(hidden_dim=16, out_dim=8), (8, 8))
        found = fit(
            method,
            Digits(batch_size=512, image_size=8, validation=0.0),
            trainer=TrainerOptions(max_epochs=2, accelerator="cpu", progress_bar=False),
            monitor=Monitoring(moving_average=average),
        )
        states[average] = found.method.state_dict()
    kept = {"assignments", "prototypes", "epoch"}
    for name, value in states[None].items():
        same = torch.equal(value, states[0.5][name])
        assert same == (name in kept or name.startswith("banks.") or name.endswith("batches_tracked")), name


def test_a_loader_over_all_images_prepares():
    data, method = Digits(batch_size=512, image_size=8), deepcluster(num_prototypes=(8,))
    views = data.train_dataset()
    method.prepare(DataLoader(views, 512, collate_fn=data.collate))
    assert method.assignments.shape == (1, len(views))
    assert (method.assignments >= 0).all()
