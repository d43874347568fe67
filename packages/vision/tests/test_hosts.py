"""The smaller hosts: what each computes from its networks."""

import pytest
import torch
from torch import nn

from cl_core.functional import barlow_twins_loss, sup_con_loss, vicreg_loss
from cl_core.losses import (
    BarlowTwinsLoss,
    BYOLLoss,
    NegativeCosineSimilarityLoss,
    NTXentLoss,
    SupConLoss,
    VICRegLoss,
)
from cl_core.projectors import MLPProjector
from cl_vision.data import Views
from cl_vision.encoders import SmallConvNet
from cl_vision.methods import BYOL, BarlowTwins, SimSiam, SupCon, VICReg


def views(count=2, rows=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 1, 8, 8, generator=generator)
    noisy = tuple(images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(count))
    return Views(noisy, torch.arange(rows) % 2, torch.arange(rows))


def encoder():
    torch.manual_seed(0)
    return SmallConvNet(4, in_channels=1, norm="group")


def heads():
    return [MLPProjector(hidden_dim=24, out_dim=16, norm="none") for _ in range(2)]


def cosine(p, z):
    return nn.functional.cosine_similarity(p, z, dim=1).mean()


def test_simsiam_predicts_constants():
    method, batch = SimSiam(encoder(), NegativeCosineSimilarityLoss(), *heads()), views()
    z1, z2 = (method.projector(method.encoder(view)) for view in batch.views)
    p1, p2 = method.predictor(z1), method.predictor(z2)
    loss = method(batch)
    torch.testing.assert_close(loss, -(cosine(p1, z2) + cosine(p2, z1)) / 2)
    wanted = torch.autograd.grad(
        -(cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2, list(method.encoder.parameters())
    )
    found = torch.autograd.grad(loss, list(method.encoder.parameters()))
    torch.testing.assert_close(found, wanted)


def test_byol_predicts_its_moving_average():
    method, batch = BYOL(encoder(), BYOLLoss(), *heads()), views()
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.mul_(1.3)
    p1, p2 = (method.project(view) for view in batch.views)
    z1, z2 = (method.key_network(view) for view in batch.views)
    torch.testing.assert_close(method(batch), 4 - 2 * cosine(p1, z2) - 2 * cosine(p2, z1))


@pytest.mark.parametrize(
    ("kind", "loss", "function"),
    [(BarlowTwins, BarlowTwinsLoss, barlow_twins_loss), (VICReg, VICRegLoss, vicreg_loss)],
)
def test_features_of_two_branches_are_compared(kind, loss, function):
    method, batch = kind(encoder(), loss(), heads()[0]), views()
    z1, z2 = (method.projector(method.encoder(view)) for view in batch.views)
    torch.testing.assert_close(method(batch), function(z1, z2))


def test_supcon_gives_all_views_the_label_of_their_image():
    method, batch = SupCon(encoder(), SupConLoss(0.2), heads()[0]), views(3)
    z = torch.cat([method.projector(method.encoder(view)) for view in batch.views])
    labels = torch.cat([batch.labels] * 3)
    torch.testing.assert_close(method(batch), sup_con_loss(z, labels, temperature=0.2))
    with pytest.raises(ValueError, match="SupCon needs a label for every image"):
        method(batch._replace(labels=batch.labels - 1))


@pytest.mark.parametrize(
    ("kind", "loss", "shapes"),
    [
        (SimSiam, NegativeCosineSimilarityLoss(), [(32, 2048, 2048, 2048), (2048, 512, 2048)]),
        (BYOL, BYOLLoss(), [(32, 4096, 256), (256, 4096, 256)]),
        (BarlowTwins, BarlowTwinsLoss(), [(32, 8192, 8192, 8192)]),
        (VICReg, VICRegLoss(), [(32, 8192, 8192, 8192)]),
        (SupCon, SupConLoss(), [(32, 32, 128)]),
    ],
)
def test_heads_are_the_papers_by_default(kind, loss, shapes):
    with torch.device("meta"):
        method = kind(SmallConvNet(4), loss)
    found = []
    for head in [method.projector, getattr(method, "predictor", None)][: len(shapes)]:
        layers = [layer for layer in head.network if isinstance(layer, nn.Linear)]
        found.append((layers[0].in_features, *(layer.out_features for layer in layers)))
    assert found == shapes
    ends = isinstance(method.projector.network[-1], nn.BatchNorm1d)
    assert ends == (kind is SimSiam)


@pytest.mark.parametrize("kind", [SimSiam, BYOL, SupCon])
def test_losses_of_another_kind_are_refused(kind):
    with pytest.raises(
        TypeError, match=r"loss must be a (Prediction|Labelled)Loss, called with .*, got NTXent"
    ):
        kind(encoder(), NTXentLoss())


def test_final_norms_of_a_head():
    rows = torch.randn(9, 5)
    batch = MLPProjector(5, out_dim=7, final_norm="batch")(rows)
    torch.testing.assert_close(batch.mean(0), torch.zeros(7), atol=1e-5, rtol=0)
    layer = MLPProjector(5, out_dim=7, final_norm="layer")(rows)
    torch.testing.assert_close(layer.mean(1), torch.zeros(9), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="final_norm must be one of"):
        MLPProjector(5, final_norm="group")
