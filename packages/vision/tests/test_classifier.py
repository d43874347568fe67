"""Fine-tuning: what the classifier learns from, what it leaves alone, and where it starts."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from cl_core.testing import check_method
from cl_core.training.artifacts import export_method, load_export
from cl_vision.cli import main
from cl_vision.data import Views
from cl_vision.data.subsets import write_rows
from cl_vision.encoders import SmallConvNet
from cl_vision.methods import Classifier

FEW = "--trainer.max_steps=4 --trainer.progress_bar=false --trainer.accelerator=cpu --evaluation.baselines=false"
SMALL = "--model.encoder.width=4 --data.image_size=8"


def views(count=1, rows=12, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 1, 8, 8, generator=generator)
    noisy = tuple(images + 0.2 * torch.randn(images.shape, generator=generator) for _ in range(count))
    return Views(noisy, torch.arange(rows) % classes, torch.arange(rows))


def classifier(norm="batch", **options):
    return Classifier(SmallConvNet(4, in_channels=1, norm=norm), 3, **options)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_cross_entropy_of_all_views(count, smoothing):
    torch.manual_seed(0)
    method, batch = classifier(norm="group", label_smoothing=smoothing), views(count)
    targets = (1 - smoothing) * functional.one_hot(batch.labels, 3) + smoothing / 3
    scores = [method.head(method.encoder(view)) for view in batch.views]
    wanted = sum(-(targets * each.log_softmax(1)).sum(1).mean() for each in scores) / count
    right = sum((each.argmax(1) == batch.labels).float().mean() for each in scores) / count
    found = method(batch)
    torch.testing.assert_close(found["loss"], wanted)
    torch.testing.assert_close(found["accuracy"], right)
    assert torch.equal(method.embed(batch.views[0]), method.encoder(batch.views[0]))


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_the_battery_at_other_rates_of_the_encoder(scale):
    batches = [views(2), views(2)]
    check_method(lambda: classifier(encoder_lr_scale=scale), batches, inputs=batches[0].views[0])


def test_the_encoder_learns_at_its_own_rate():
    method = classifier(encoder_lr_scale=0.1)
    scales = {
        id(p): group.get("lr_scale", 1.0) for group in method.parameter_groups(0.1) for p in group["params"]
    }
    assert {scales[id(p)] for p in method.encoder.parameters()} == {0.1}
    assert {scales[id(p)] for p in method.head.parameters()} == {1.0}


def test_an_encoder_held_still_keeps_its_batch_statistics():
    method = classifier(encoder_lr_scale=0)
    assert method.training and not method.encoder.training
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for group in method.parameter_groups(0.0) for p in group["params"]], lr=0.1
    )
    for _ in range(2):
        method.train()
        method(views())["loss"].backward()
        optimizer.step()
    moved = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}


def test_an_export_classifies_the_same(tmp_path):
    method, images = classifier(encoder_lr_scale=0.5, label_smoothing=0.1).eval(), views().views[0]
    loaded = load_export(export_method(method, tmp_path))
    assert (loaded.num_classes, loaded.encoder_lr_scale, loaded.label_smoothing) == (3, 0.5, 0.1)
    torch.testing.assert_close(loaded.classify(images), method.classify(images))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: classifier(encoder_lr_scale=-1), "encoder_lr_scale must be at least 0, got -1"),
        (lambda: classifier(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (lambda: Classifier(SmallConvNet(4), 1), "num_classes must be at least 2, got 1"),
        (lambda: classifier()(views(classes=4)), "num_classes must be above every label, got 3 and label 3"),
        (
            lambda: classifier()(views()._replace(labels=torch.full((12,), -1))),
            "Classifier needs a label for every image, got some without",
        ),
        (lambda: classifier()(views(0)), "a batch of at least 1 view, got none: pass --data.num_views 1"),
    ],
)
def test_bad_input_gets_one_sentence(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_only_an_encoder_is_taken():
    with pytest.raises(TypeError, match="encoder must be a cl_vision Encoder, got Linear"):
        Classifier(torch.nn.Linear(2, 2), 3)


def run(*arguments):
    return main(["fit", *arguments, *FEW.split()])


def test_it_starts_from_what_another_method_has_learnt(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    assert (
        run("--config", "moco/digits", *SMALL.split(), "--run_dir=first", "--monitor.knn_every_epochs=null")
        == 0
    )
    capsys.readouterr()
    few = ["--data.subset=Fraction", "--data.subset.share=0.05", "--model.encoder_lr_scale=0"]
    assert (
        run("--config", "finetune/digits", "--init_from=first", *SMALL.split(), *few, "--run_dir=second") == 0
    )
    assert "classifier" in capsys.readouterr().out.splitlines()[0]
    assert caplog.messages == [
        "2 of 26 weights were not in first and keep their initial values: head.weight, head.bias."
    ]
    metrics = json.loads(Path("second/metrics.json").read_text())
    assert metrics["kept_initial"] == ["head.weight", "head.bias"]
    assert metrics["class_names"] == [str(digit) for digit in range(10)]
    first, second = (load_export(Path(name, "export")) for name in ("first", "second"))
    for name, value in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[name], value), name

    assert (
        run("--config", "finetune/digits", "--init_from=first", "--data.image_size=8", "--run_dir=third") == 2
    )
    said = capsys.readouterr().err
    assert (
        "the encoder of first does not fit that of Classifier: encoder.layers.0.weight has shape (4, 1, 3, 3)"
        in said
    )
    assert said.count("\n") == 1 and not Path("third").exists()


def test_a_run_on_listed_rows_is_resumed_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows("rows.txt", torch.arange(200))
    rows = ["--data.subset=IndexFile", "--data.subset.path=rows.txt", "--monitor.knn_every_epochs=null"]
    assert run("--config", "finetune/digits", *SMALL.split(), *rows, "--run_dir=few") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["fit", "--resume", "../few", "--trainer.max_steps=6"]) == 0, capsys.readouterr().err


def test_a_run_is_judged_on_other_data_and_keeps_its_own_metrics(tmp_path, monkeypatch, capsys, write_image):
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("dark", "light")):
        for place in range(8):
            write_image(tmp_path / "photos" / name / f"{place}.png", 20 * place + 60 * label, mode="L")
    assert (
        run("--config", "finetune/digits", *SMALL.split(), "--run_dir=own", "--monitor.knn_every_epochs=null")
        == 0
    )
    before = {path: path.read_bytes() for path in Path("own").rglob("*") if path.is_file()}
    capsys.readouterr()
    other = ["--data=ImageFolder", f"--data.root={tmp_path / 'photos'}", "--data.channels=1"]
    for verb, split in (("test", "test"), ("validate", "validation")):
        assert main([verb, "--ckpt=own", *other, "--evaluation.neighbours=[1]"]) == 0
        out, err = capsys.readouterr()
        first, second, last = out.splitlines()
        assert (first.startswith(f"{split} accuracy on ImageFolder: kNN "), "classifier" in first, err) == (
            True,
            False,
            "",
        )
        assert "it tells 0, 1, 2, ... (10 classes) apart, these data have dark, light" in second
        assert last.startswith(
            "not written to a run: data.class_path was cl_vision.data.digits.Digits when own began"
        )
    assert {path: path.read_bytes() for path in Path("own").rglob("*") if path.is_file()} == before
