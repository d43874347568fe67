from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cl_graph.cli import DOMAIN, main

QUICK = ["--trainer.progress_bar=false", "--trainer.accelerator=cpu", "--evaluation.regularizations=[0.1]"]


@pytest.mark.parametrize("args", ["--help", "--version", "list", "list configs"])
def test_light_verbs_import_nothing_heavy(args):
    code = (
        f"import sys; from cl_graph.cli import main; status = main({args.split()!r});"
        "print([n for n in ('torch', 'numpy', 'lightning', 'torch_geometric', 'jsonargparse') if n in sys.modules]);"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_lists(capsys):
    main(["list"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("GRACE", "NTXentLoss", "KarateClub", "grace/karate"))
    assert "SimCLR" not in shown  # another domain's


def test_data_names_lead_to_classes():
    for name, target in DOMAIN.data.items():
        module, _, attribute = target.partition(":")
        assert getattr(import_module(module), attribute).__name__ == name


def test_a_fresh_process_knows_the_names_of_a_config():
    code = "from cl_graph.cli import main; main(['fit', '--config', 'progcl/karate', '--print_config'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stderr, done.stdout.count("class_path: cl_graph.")) == ("", 6)


@pytest.mark.parametrize("name", sorted(DOMAIN.configs()))
def test_every_config_parses_and_says_its_command(name, capsys):
    assert DOMAIN.configs()[name].read_text().startswith(f"# cl-graph fit --config {name}\n")
    assert main(["fit", "--config", name, "--print_config"]) == 0
    assert "model:\n  class_path: cl_graph." in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(DOMAIN.grids()))
def test_every_grid_names_shipped_configs_and_options(name, capsys):
    from cl_core.training.reproduce import Grid

    for cell in Grid.read(DOMAIN.grids()[name]).cells:
        assert main(["fit", *cell.arguments(0), "--print_config"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("name", sorted(DOMAIN.configs()))
def test_two_steps_of_every_config_on_the_karate_club(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_steps=2", "--data=KarateClub", *QUICK]
    status = main(["fit", "--config", name, "--model.encoder.dim=8", "--run_dir=run", *options])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["finished"]
    assert 0 < metrics["raw"]["knn"] < 1 and 0 < metrics["trained"]["linear"] <= 1
    exported = json.loads(Path("run/export/config.json").read_text())
    assert exported["model"]["arguments"]["encoder"]["arguments"]["in_dim"] == 34


def weights(folder):
    return load_file(Path(folder) / "export/model.safetensors")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, capsys):
    """Nodes in a new order each pass, drawn views, drawn nodes of the regulariser."""
    monkeypatch.chdir(tmp_path)
    common = ["--config=grace/karate", "--data.batch_size=10", "--evaluation.baselines=false", *QUICK]
    common += ["--data.passes_per_epoch=2", "--model.regulariser=POT", "--model.regulariser.nodes=6"]
    common += ["--model.first_view.feature_mask=0", "--model.second_view.feature_mask=0"]
    assert main(["fit", *common, "--trainer.max_epochs=3", "--run_dir=whole"]) == 0
    assert main(["fit", *common, "--trainer.max_epochs=1", "--run_dir=cut"]) == 0
    assert main(["fit", "--resume=cut", "--trainer.max_epochs=3", "--trainer.progress_bar=false"]) == 0
    whole, cut = weights("whole"), weights("cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    losses = [
        Path(name, "metrics.csv").read_text().splitlines()[-1].split(",")[2] for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_test_and_embed_read_a_run_and_its_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config=grace/karate", "--trainer.max_epochs=1", "--run_dir=run", *QUICK]) == 0
    first = json.loads(Path("run/metrics.json").read_text())["trained"]["knn"]
    capsys.readouterr()
    assert main(["test", "--ckpt=run"]) == 0
    assert f"kNN {100 * first:.2f}%" in capsys.readouterr().out
    for ckpt, output in (("run", "a.safetensors"), ("run/checkpoints/last.ckpt", "b.safetensors")):
        assert main(["embed", f"--ckpt={ckpt}", f"--output={output}", "--progress_bar=false"]) == 0
    one, other = load_file("a.safetensors"), load_file("b.safetensors")
    assert one["embeddings"].shape == (18, 16) and torch.equal(one["embeddings"], other["embeddings"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data=Planetoid", "--data.root=nowhere"], "no Cora in nowhere"),
        (["--model.encoder.activation=tanh"], "activation"),
        (["--model.regulariser=POT"], "POT bounds dropped edges only: feature_mask must be 0 in both views."),
        (["--model.encoder.in_dim=5"], "x must have 5 features, got 34"),
        (["--data.split=RandomSplit", "--data.split.train=0.9"], "leave nodes for testing"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config=grace/karate", "--trainer.max_steps=2", *QUICK, *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said
