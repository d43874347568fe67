import csv

import pytest
import torch
from torch import nn

from cl_core.functional import gated_pair_loss, info_nce_loss
from cl_core.gates import OpenGate, PairGate, gate_entropy
from cl_core.losses import DCLLoss, GatedPairLoss, InfoNCELoss
from cl_core.projectors import MLPProjector
from cl_core.samplers import DistinctPartners, IdenticalPartners, WeightedPartners
from cl_core.training import load_export
from cl_vision.cli import main
from cl_vision.data import Views
from cl_vision.encoders import SmallConvNet
from cl_vision.methods import Hydra, SimLAP


def views(count=2, rows=9):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 1, 8, 8, generator=generator)
    noisy = tuple(images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(count))
    return Views(noisy, torch.arange(rows) % 3, torch.arange(rows))


def head(**options):
    return MLPProjector(hidden_dim=24, out_dim=16, **{"norm": "none", "final_norm": "layer", **options})


def gate(classes=3):
    return PairGate(classes, 16, embedding_dim=8, hidden_dim=8)


def simlap(loss=None, **options):
    torch.manual_seed(0)
    settings = {"projector": head(), "gate": gate(), "partners": DistinctPartners(3), **options}
    return SimLAP(SmallConvNet(4, in_channels=1, norm="group"), loss or GatedPairLoss(0.2), 3, **settings)


def hydra(**options):
    torch.manual_seed(0)
    settings = {"projector": head(), "predictor": head(final_norm="none"), "gate": gate(), **options}
    encoder = SmallConvNet(4, in_channels=1, norm="group")
    return Hydra(encoder, GatedPairLoss(0.2), 3, InfoNCELoss(0.5), partners=DistinctPartners(3), **settings)


def drawn(method, batch):
    """Partner classes and gates as the next call draws them."""
    torch.manual_seed(7)
    partners = method.partners(batch.labels)
    return partners, method.gate(batch.labels, partners)


@pytest.mark.parametrize("count", [1, 2])
def test_simlap_compares_one_view_with_itself_or_with_another(count):
    method, batch = simlap(GatedPairLoss(0.2, self_pairs=count == 2), entropy_weight=0.3), views(count)
    z = [method.projector(method.encoder(view)) for view in batch.views]
    partners, gates = drawn(method, batch)
    expected = gated_pair_loss(
        z[0], z[-1], batch.labels, partners, gates, temperature=0.2, self_pairs=count == 2
    )
    torch.manual_seed(7)
    found = method(batch)
    torch.testing.assert_close(found["loss"], expected + 0.3 * gate_entropy(gates))
    torch.testing.assert_close(found["entropy_penalty"], gate_entropy(gates))


@pytest.mark.parametrize("separate", [False, True])
def test_hydra_adds_gated_pairs_to_moco_v3(separate):
    method, batch = hydra(separate=separate, balance=3.0), views()
    z = [method.projector(method.encoder(view)) for view in batch.views]
    queries = [method.predictor(rows) for rows in z]
    gated = [method.gated_predictor(rows) for rows in z] if separate else queries
    keys = [method.key_network(view) for view in batch.views]
    partners, gates = drawn(method, batch)
    instance = pairs = 0
    for x, y in ((0, 1), (1, 0)):
        instance = instance + info_nce_loss(queries[x], keys[y], temperature=0.5) / 2
        pairs = pairs + gated_pair_loss(gated[x], keys[y], batch.labels, partners, gates, temperature=0.2) / 2
    torch.manual_seed(7)
    found = method(batch)
    torch.testing.assert_close(found["loss"], (instance + 3 * pairs) / 4)
    torch.testing.assert_close(found["instance"], instance)
    torch.testing.assert_close(found["pairs"], pairs)


def test_without_a_gate_all_dimensions_are_open():
    method, batch = simlap(gate=OpenGate(3, 16), partners=IdenticalPartners()), views()
    z = [method.projector(method.encoder(view)) for view in batch.views]
    ones = torch.ones(9, 16)
    expected = gated_pair_loss(*z, batch.labels, batch.labels, ones, temperature=0.2)
    torch.testing.assert_close(method(batch)["loss"], expected)


def test_the_gate_learns():
    method, batch = simlap(), views()
    before = [p.detach().clone() for p in method.gate.parameters()]
    optimiser = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss = method(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.4
    assert all(not torch.equal(a, b) for a, b in zip(before, method.gate.parameters(), strict=True))


@pytest.mark.parametrize("kind", [SimLAP, Hydra])
def test_bad_parts_and_labels_get_one_sentence(kind):
    encoder = SmallConvNet(4, in_channels=1)
    with pytest.raises(
        TypeError, match=r"loss must be a ClassPairLoss, called with \(query, key, labels, partners"
    ):
        kind(encoder, DCLLoss(), 3)
    with pytest.raises(
        ValueError, match=r"gate must be of 3 classes and 16 dimensions, .* got one of 4 and 16"
    ):
        kind(encoder, GatedPairLoss(), 3, projector=head(), gate=gate(4))
    method = kind(encoder, GatedPairLoss(), 3, projector=head(), gate=gate())
    batch = views()
    with pytest.raises(ValueError, match=f"{kind.__name__} needs a label for every image"):
        method(batch._replace(labels=batch.labels - 1))
    with pytest.raises(ValueError, match="num_classes must be above every label, got 3 and label 3"):
        method(batch._replace(labels=batch.labels + 1))
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        kind(encoder, GatedPairLoss(), 0)


def test_the_instances_are_compared_over_the_processes_of_the_pairs():
    loss = GatedPairLoss(0.2, group="world")
    assert Hydra(SmallConvNet(4), loss, 3, projector=head()).instance_loss.group == "world"
    assert Hydra(SmallConvNet(4), loss, 3, InfoNCELoss(), projector=head()).instance_loss.group is None


def test_default_heads_end_in_layer_normalisation():
    with torch.device("meta"):
        for method in (
            SimLAP(SmallConvNet(4), GatedPairLoss(), 3),
            Hydra(SmallConvNet(4), GatedPairLoss(), 3),
        ):
            assert isinstance(method.projector.network[-1], nn.LayerNorm)
            assert method.gate.dim == 256


def test_weighted_partners_are_given_by_the_command_and_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [[abs(a - b) for b in range(10)] for a in range(10)]
    options = ["--trainer.max_steps=2", "--trainer.progress_bar=false", "--trainer.accelerator=cpu"]
    options += [
        "--data.image_size=8",
        "--model.encoder.width=4",
        "--run_dir=run",
        "--evaluation.baselines=false",
    ]
    options += ["--model.partners=WeightedPartners", f"--model.partners.distances={rows}"]
    options += ["--model.partners.exponent=2", "--model.partners.max_level=4"]
    assert main(["fit", "--config", "hydra/digits", *options]) == 0, capsys.readouterr().err
    loaded = load_export(tmp_path / "run/export").partners
    wanted = WeightedPartners(torch.tensor(rows), 2.0, max_level=4)
    assert torch.equal(loaded.probabilities, wanted.probabilities)


def test_a_run_shows_which_classes_share_dimensions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_steps=2", "--trainer.progress_bar=false", "--trainer.accelerator=cpu"]
    options += [
        "--data.image_size=8",
        "--model.encoder.width=4",
        "--run_dir=run",
        "--evaluation.baselines=false",
    ]
    assert main(["fit", "--config", "hydra/digits", *options]) == 0
    assert "run/figures/class_pairs.png" in capsys.readouterr().out
    head, *lines = csv.reader((tmp_path / "run/class_pairs.csv").read_text().splitlines())
    assert head == ["first", "second", "open_dimensions", "mean_gate", "dimensions"]
    assert len(lines) == 55
    counts = [int(line[2]) for line in lines]
    assert counts == sorted(counts, reverse=True)
    assert all(len(line[4].split()) == int(line[2]) for line in lines)
