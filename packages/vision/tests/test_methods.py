"""The battery over every registered method on images, and each of them under Lightning."""

import json
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from cl_core import plugins
from cl_core.functional import sinkhorn
from cl_core.gates import PairGate
from cl_core.losses import (
    BarlowTwinsLoss,
    BYOLLoss,
    DCLLoss,
    FeatureTransform,
    GatedPairLoss,
    InfoNCELoss,
    NegativeCosineSimilarityLoss,
    PrototypeNCELoss,
    SupConLoss,
    SwAVLoss,
    VICRegLoss,
)
from cl_core.projectors import MLPProjector
from cl_core.testing import method_checks
from cl_core.testing.methods import CHECKS, BareTraining, Case
from cl_core.training import LitMethod, Optimization, ScoreMonitor, read_scores
from cl_core.transforms import NegativeInterpolation, PositiveExtrapolation
from cl_vision.data import Views
from cl_vision.encoders import SmallConvNet
from cl_vision.methods import (
    BYOL,
    NNCLR,
    BarlowTwins,
    Classifier,
    DeepClusterV2,
    Hydra,
    MoCo,
    MoCoV3,
    SimCLR,
    SimLAP,
    SimSiam,
    SupCon,
    SwAV,
    VICReg,
)

# {method: {check: reason}}: the one place where a method may be excused from a check.
EXCLUSIONS = json.loads(Path(__file__).with_name("exclusions.json").read_text())
METHODS = {
    plugin.name: plugins.load_method(plugin.name)
    for plugin in plugins.available_methods()
    if plugin.target.startswith("cl_vision.")
}


def simclr():
    return SimCLR(SmallConvNet(4, in_channels=1), DCLLoss(temperature=0.2), MLPProjector(out_dim=16))


def moco():
    return MoCo(
        SmallConvNet(4, in_channels=1), InfoNCELoss(0.2), MLPProjector(out_dim=16, norm="none"), 32, 0.9
    )


def moco_v3():
    head, predictor = (MLPProjector(hidden_dim=24, out_dim=16) for _ in range(2))
    return MoCoV3(SmallConvNet(4, in_channels=1), InfoNCELoss(0.2), head, predictor, momentum=0.9)


def nnclr():
    head, predictor = (MLPProjector(hidden_dim=24, out_dim=16) for _ in range(2))
    return NNCLR(SmallConvNet(4, in_channels=1), InfoNCELoss(0.2), head, predictor, support_size=32)


def swav():
    head = MLPProjector(hidden_dim=24, out_dim=16)
    options = {"num_prototypes": 8, "freeze_epochs": 0.0, "queue_size": 20, "queue_from_epoch": 0}
    return SwAV(SmallConvNet(4, in_channels=1), SwAVLoss(), head, **options)


def deepcluster_v2():
    head = MLPProjector(hidden_dim=24, out_dim=16)
    return DeepClusterV2(
        SmallConvNet(4, in_channels=1), PrototypeNCELoss(), head, [6, 4], kmeans_iterations=5
    )


def heads():
    return [MLPProjector(hidden_dim=24, out_dim=16) for _ in range(2)]


def byol():
    return BYOL(SmallConvNet(4, in_channels=1), BYOLLoss(), *heads(), momentum=0.9)


def simsiam():
    return SimSiam(SmallConvNet(4, in_channels=1), NegativeCosineSimilarityLoss(), *heads())


def barlow_twins():
    return BarlowTwins(SmallConvNet(4, in_channels=1), BarlowTwinsLoss(), heads()[0])


def vicreg():
    return VICReg(SmallConvNet(4, in_channels=1), VICRegLoss(), heads()[0])


def supcon():
    return SupCon(SmallConvNet(4, in_channels=1), SupConLoss(0.2), heads()[0])


def classifier():
    return Classifier(SmallConvNet(4, in_channels=1), 3)


def gate():
    return PairGate(3, 16, embedding_dim=8, hidden_dim=8)


def simlap():
    head = MLPProjector(hidden_dim=24, out_dim=16, final_norm="layer")
    return SimLAP(SmallConvNet(4, in_channels=1), GatedPairLoss(0.2), 3, head, gate(), entropy_weight=0.1)


def hydra():
    encoder, loss = SmallConvNet(4, in_channels=1), GatedPairLoss(0.2)
    parts = {"projector": heads()[0], "predictor": heads()[0], "gate": gate()}
    return Hydra(encoder, loss, 3, InfoNCELoss(0.2), **parts, momentum=0.9)


# A tiny instance of every registered method, and its loss after two steps of the battery's training.
TINY = {
    "BYOL": (byol, 2.834877),
    "BarlowTwins": (barlow_twins, 0.2800587),
    "Classifier": (classifier, 0.858655),
    "DeepClusterV2": (deepcluster_v2, 1.558157),
    "Hydra": (hydra, 2.146921),
    "MoCo": (moco, 2.276033),
    "MoCoV3": (moco_v3, 1.87662),
    "NNCLR": (nnclr, 2.700348),
    "SimCLR": (simclr, -0.6033516),
    "SimLAP": (simlap, 1.794994),
    "SimSiam": (simsiam, -0.2355113),
    "SupCon": (supcon, 2.827545),
    "SwAV": (swav, 1.012586),
    "VICReg": (vicreg, 14.74679),
}


def batches(count=2, rows=12):
    generator = torch.Generator().manual_seed(0)
    made = []
    for first in range(0, count * rows, rows):
        images = torch.randn(rows, 1, 8, 8, generator=generator)
        noisy = tuple(images + 0.2 * torch.randn(images.shape, generator=generator) for _ in range(2))
        made.append(Views(noisy, torch.arange(rows) % 3, torch.arange(first, first + rows)))
    return made


def checks_of(name):
    factory, stored_loss = TINY[name]
    return method_checks(factory, batches(), inputs=batches()[0].views[0], stored_loss=stored_loss)


def test_every_registered_method_is_here():
    assert set(TINY) == set(METHODS)
    assert set(METHODS) >= {"SimCLR"}  # or nothing would be tested where no metadata is installed
    for name, (factory, _) in TINY.items():
        assert type(factory()) is METHODS[name]


def test_exclusions_name_what_exists():
    for name, checks in EXCLUSIONS.items():
        assert name in TINY
        assert set(checks) <= set(CHECKS)
        assert all(isinstance(reason, str) and reason for reason in checks.values())


@pytest.mark.parametrize(("name", "check"), [(name, check) for name in TINY for check in checks_of(name)])
def test_battery(name, check):
    if check in EXCLUSIONS.get(name, {}):
        with pytest.raises(AssertionError):  # an exclusion that is no longer needed fails
            checks_of(name)[check]()
    else:
        checks_of(name)[check]()


def under_lightning(factory, *callbacks, criterion=None):
    """Two steps; ``criterion`` takes the place of the factory's."""
    torch.manual_seed(0)
    method = factory()
    method.criterion = criterion or method.criterion
    adaptor = LitMethod(method, Optimization(lr=0.01, schedule="constant"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")  # its advice on workers and intervals
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(
            adaptor, train_dataloaders=DataLoader(batches(), batch_size=None, generator=torch.Generator())
        )
    return adaptor


@pytest.mark.parametrize("name", TINY)
def test_lightning_trains_as_a_bare_loop(name):
    factory = TINY[name][0]
    bare = BareTraining(
        Case(factory, batches(), inputs=None, rows=0, lr=0.01, stored_loss=None), total_steps=2
    )
    bare.run(2)
    adaptor = under_lightning(factory)
    assert adaptor.steps_done == 2
    trained = adaptor.method.state_dict()
    for key, value in bare.method.state_dict().items():
        assert torch.equal(trained[key], value), key


def scores_of(query, key, negatives=None):
    """Mean and variance of the positive and negative scores, from the whole matrix."""
    query, key = functional.normalize(query, dim=1), functional.normalize(key, dim=1)
    positive = (query * key).sum(1)
    if negatives is None:
        negative = (query @ key.T)[~torch.eye(len(query), dtype=torch.bool)].view(len(query), -1)
    else:
        negative = query @ functional.normalize(negatives, dim=1).T
    return [positive.mean(), positive.var(correction=0), negative.mean(), negative.var(1).mean()]


def scores_of_labels(z, labels):
    z = functional.normalize(z, dim=1)
    same = labels[:, None] == labels
    return z @ z.T, same & ~torch.eye(len(z), dtype=torch.bool), ~same


def scores_of_class_pairs(query, key, labels, partners, gates):
    gated = functional.cosine_similarity((gates * query)[:, None], gates[:, None] * key, dim=2)
    of_partner, own = partners[:, None] == labels, labels[:, None] == labels
    return gated, of_partner, ~of_partner & ~own


def scores_of_codes(first, second, queue=None):
    """The second crop predicts the code of the first, balanced together with the queue."""
    balanced = sinkhorn(first if queue is None else torch.cat([first, queue[0]]))[: len(first)]
    positive = functional.one_hot(balanced.argmax(1), first.shape[1]).bool()
    return second, positive, ~positive


def scores_of_clusters(z, prototypes, assignments):
    positive = functional.one_hot(assignments[0], len(prototypes[0])).bool()
    return z @ prototypes[0].T, positive, ~positive


OTHER_SCORES = {
    "DeepClusterV2": scores_of_clusters,
    "Hydra": scores_of_class_pairs,
    "SimLAP": scores_of_class_pairs,
    "SupCon": scores_of_labels,
    "SwAV": scores_of_codes,
}


def compare_other_scores(name, monitor):
    factory, steps = TINY[name][0], []
    criterion = factory().criterion

    def see(_, given, options):
        found = OTHER_SCORES[name](
            *detached(given), **{key: detached(value) for key, value in options.items()}
        )
        steps.append(found)

    criterion.register_forward_pre_hook(see, with_kwargs=True)
    under_lightning(factory, monitor, criterion=criterion)
    found = read_scores(monitor.path)
    steps = steps[:: len(steps) // 2]  # of the calls of each step
    for place, (scores, positive, negative) in enumerate(steps):
        means = [row[of].mean() for row, of in zip(scores, negative, strict=True) if of.any()]
        wanted = {
            "positive_mean": scores[positive].mean(),
            "positive_variance": scores[positive].var(correction=0),
            "negative_mean": torch.stack(means).mean(),
        }
        for curve, value in wanted.items():
            torch.testing.assert_close(found[curve][place], value.double(), rtol=1e-4, atol=1e-6)
    for kind, of in (("positive", 1), ("negative", 2)):
        assert found[f"{kind}_histogram"].sum() == sum(step[of].sum() for step in steps) > 0
    assert not found["positive_log_mean_exp"].isnan().any()


def detached(given):
    if isinstance(given, torch.Tensor):
        return given.detach().clone()
    return given and [detached(each) for each in given]


@pytest.mark.parametrize("name", TINY)
def test_scores_are_recorded_in_every_host_that_compares(name, tmp_path):
    factory, calls = TINY[name][0], []
    criterion = factory().criterion
    monitor = ScoreMonitor(tmp_path, rows=None)
    if name == "Classifier":
        with pytest.raises(
            ValueError, match=r"compares something with positives.* got CrossEntropyLoss in Cla"
        ):
            under_lightning(factory, monitor)
        return
    if name in OTHER_SCORES:
        compare_other_scores(name, monitor)
        return
    criterion.register_forward_pre_hook(lambda _, given: calls.append([z.detach().clone() for z in given]))
    under_lightning(factory, monitor, criterion=criterion)
    found = read_scores(tmp_path / "scores.safetensors")
    first = calls[:: len(calls) // 2]  # of the calls of each step
    wanted = torch.tensor([scores_of(*given) for given in first], dtype=torch.float64)
    for place, curve in enumerate(
        ("positive_mean", "positive_variance", "negative_mean", "negative_variance")
    ):
        torch.testing.assert_close(found[curve], wanted[:, place], rtol=1e-4, atol=1e-6)
    rows, columns = len(first[0][0]), len(first[0][-1])
    pairs = rows * columns if len(first[0]) == 3 else rows * (rows - 1)
    assert found["block_end"].tolist() == [2]
    assert found["positive_histogram"].sum() == 2 * rows and found["negative_histogram"].sum() == 2 * pairs


def test_scores_of_transformed_features(tmp_path):
    """What the transformation is for: positives farther apart, negatives less varied."""
    found = []
    for positive, negative in (
        (PositiveExtrapolation(), None),
        (None, NegativeInterpolation()),
        (None, None),
    ):
        loss = InfoNCELoss(0.2)
        if positive or negative:
            loss = FeatureTransform(loss, positive=positive, negative=negative)
        folder = tmp_path / str(len(found))
        under_lightning(moco, ScoreMonitor(folder), criterion=loss)
        found.append(read_scores(folder / "scores.safetensors"))
    extrapolated, interpolated, plain = found
    first = [{name: float(values[0]) for name, values in each.items() if values.ndim == 1} for each in found]
    assert first[0]["positive_mean"] < first[2]["positive_mean"] == first[1]["positive_mean"]
    assert first[1]["negative_variance"] < 0.8 * first[2]["negative_variance"]
    assert all(
        not each["negative_log_mean_exp"].isnan().any() for each in (extrapolated, interpolated, plain)
    )
