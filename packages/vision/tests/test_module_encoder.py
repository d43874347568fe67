"""Networks of one's own as encoders, from Python and by name, and what reading them from a file may do."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from cl_core.losses import DCLLoss
from cl_core.projectors import MLPProjector
from cl_core.testing import check_method
from cl_core.training.artifacts import export_method, load_export
from cl_vision.cli import main
from cl_vision.data import Views
from cl_vision.encoders import ModuleEncoder, create_encoder
from cl_vision.exporting import export_encoder
from cl_vision.methods import SimCLR

QUICK = [
    *(
        "--config=dcl/digits",
        "--data.image_size=8",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
    ),
    *("--trainer.progress_bar=false", "--trainer.accelerator=cpu", "--evaluation.baselines=false"),
    *(
        "--evaluation.neighbours=[1]",
        "--evaluation.regularizations=[0.01]",
        "--monitor.knn_every_epochs=null",
    ),
]
SOURCE = """
from torch import nn


class {name}(nn.Module):
    def __init__(self, width: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2 * width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)

    def forward(self, images):
        return self.dropout(self.layers(images))
"""


class Foreign(nn.Module):
    """Stores none of its arguments as they came, and has batch statistics."""

    def __init__(self, width=4, dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, images):
        return self.dropout(self.layers(images))


class Stores(Foreign):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.width = width


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LazyConv2d(4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(6)
        )

    def forward(self, images):
        return self.layers(images)


class Branching(nn.Module):
    def forward(self, images):
        return images.flatten(1) if images.mean() > 0 else -images.flatten(1)


class Returns(nn.Module):
    def __init__(self, value: str = "map") -> None:
        super().__init__()
        self.value = value

    def forward(self, images):
        rows = images.flatten(1)
        values = {
            "map": images,
            "integers": rows.long(),
            "list": [rows],
            "half": rows[:1],
            "rows": rows[:, :3],
        }
        return values[self.value]


def encoder(width=3, **options):
    return ModuleEncoder(Foreign(width), in_channels=1, arguments={"width": width}, **options)


def simclr(encoder):
    return SimCLR(encoder, DCLLoss(), MLPProjector(out_dim=8))


def images(rows=6):
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_width_is_found_without_a_trace():
    torch.manual_seed(0)
    module = Foreign(5)
    module.layers[1].eval()
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    found = ModuleEncoder(module, in_channels=1)
    assert found.dim == 10 and torch.equal(torch.get_rng_state(), random)
    assert module.training and module.dropout.training and not module.layers[1].training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert found.eval()(images()).shape == (6, 10)
    assert create_encoder("ModuleEncoder", module=Foreign(5), in_channels=1).dim == 10


def test_it_passes_the_battery_of_methods():
    batches = [Views((images(), images() + 0.1), torch.arange(6) % 3, torch.arange(6))] * 2
    check_method(lambda: simclr(encoder()), batches, inputs=images())


@pytest.mark.parametrize("make", [encoder, lambda: ModuleEncoder(Stores(3), in_channels=1)])
def test_an_export_comes_back_again_and_again(make, tmp_path):
    method = simclr(make()).eval()
    for number in range(2):  # the loaded one is exported in turn
        loaded = load_export(export_method(copy.deepcopy(method), tmp_path / str(number)))
        torch.testing.assert_close(loaded.embed(images()), method.embed(images()))
        method = loaded
    assert create_encoder(pretrained_path=tmp_path / "1").dim == 6


@pytest.mark.parametrize("dim", [None, 6])
def test_a_lazy_network_gets_its_weights_at_once(tmp_path, dim):
    method = simclr(ModuleEncoder(Lazy(), in_channels=1, dim=dim)).eval()
    assert sum(parameter.numel() for parameter in method.encoder.parameters()) == 66
    loaded = load_export(export_method(method, tmp_path))
    assert loaded.encoder.dim == 6
    assert torch.equal(loaded.embed(images()), method.embed(images()))


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_what_no_program_can_do_is_one_sentence(tmp_path, suffix):
    branching = ModuleEncoder(Branching(), in_channels=1)
    said = "ModuleEncoder cannot be written as a program for any number of images: "
    with pytest.raises(ValueError, match=said) as caught:
        export_encoder(branching, tmp_path / f"encoder.{suffix}", image_size=8, channels=1)
    assert "\n" not in str(caught.value) and branching.training
    assert list(tmp_path.iterdir()) == []


def test_the_encoder_goes_into_other_programs(tmp_path):
    path = export_encoder(encoder(), tmp_path / "encoder.pt2", image_size=8, channels=1)
    assert path.is_file()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: ModuleEncoder(Foreign()),
            r"Foreign takes no images of shape \(2, 3, 32, 32\) \(RuntimeError: .*",
        ),
        (
            lambda: ModuleEncoder(Returns()),
            r"Returns must return .* of shape \(2, dim\) for 2 images, got torch.float32",
        ),
        (lambda: ModuleEncoder(Returns("integers")), "got torch.int64 of shape"),
        (lambda: ModuleEncoder(Returns("list")), "got list"),
        (
            lambda: ModuleEncoder(Returns("half"), dim=192)(torch.ones(4, 3, 8, 8)),
            r"\(4, 192\) for 4 images, got",
        ),
        (
            lambda: ModuleEncoder(Returns("rows"), dim=4)(torch.ones(4, 3, 8, 8)),
            r"got torch.float32 of shape \(4, 3\): pass --model.encoder.image_size 8, or another --model.encoder.dim",
        ),
        (
            lambda: ModuleEncoder(Lazy(), in_channels=1, dim=5),
            r"Lazy must return .* of shape \(2, 5\) for 2 images, got torch.float32 of shape \(2, 6\)",
        ),
        (lambda: encoder(dim=0), "dim must be at least 1, got 0"),
        (
            lambda: ModuleEncoder(Foreign(), in_channels=1, arguments={"wide": 3}),
            "arguments must be those of Foreign: got an unexpected keyword argument 'wide'",
        ),
        (lambda: encoder()(torch.ones(2, 3, 8, 8)), "pass --model.encoder.in_channels 3"),
    ],
)
def test_bad_input_gets_one_sentence(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got str"):
        ModuleEncoder("my.Net")
    with pytest.raises(TypeError, match="arguments must be a dict or None, got list"):
        ModuleEncoder(Foreign(3), in_channels=1, arguments=[3])


def test_without_its_arguments_it_is_not_exported(tmp_path):
    method = simclr(ModuleEncoder(Foreign(3), in_channels=1))
    said = "does not store its argument 'width' under its own name: pass model.encoder.arguments"
    with pytest.raises(TypeError, match=said):
        export_method(method, tmp_path)
    method.encoder.module.width = 3  # but its dropout is a module, not the number that it was made of
    with pytest.raises(TypeError, match="does not store its argument 'dropout' under its own name"):
        export_method(method, tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a module of a network, importable as such."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def package(name, kind="Net"):
        (tmp_path / f"{name}.py").write_text(SOURCE.format(name=kind))
        return f"{name}.{kind}"

    return package


def test_the_command_takes_a_network_by_its_path(package, capsys):
    path = package("nets_of_mine")
    options = [f"--model.encoder.module={path}", "--model.encoder.module.width=3"]
    assert main(["fit", *QUICK, "--model.encoder=ModuleEncoder", *options, "--run_dir=run"]) == 0, (
        capsys.readouterr()
    )
    loaded = load_export("run/export")
    assert (loaded.encoder.dim, loaded.encoder.in_channels) == (6, 1)
    assert main(["test", "--ckpt", "run/checkpoints/last.ckpt", "--import", "nets_of_mine"]) == 0
    assert main(["fit", "--resume", "run", "--trainer.max_epochs=2"]) == 0, capsys.readouterr()


def test_reading_a_run_imports_only_what_was_asked_for(package, tmp_path):
    path = package("other_nets", "OtherNet")
    assert (
        main(
            [
                "fit",
                *QUICK,
                "--model.encoder=ModuleEncoder",
                f"--model.encoder.module={path}",
                "--run_dir=run",
            ]
        )
        == 0
    )
    places = (
        "test --ckpt=run",
        "test --ckpt=run/checkpoints/last.ckpt",
        "fit --resume=run",
        "fit --init_from=run",
    )
    fresh = (  # a process that has not imported it
        "import sys; from cl_vision.cli import main\n"
        f"for place in {places}: assert main([*place.split(), '--data=Digits'][: 2 + ('init' in place)]) == 2, place\n"
        "assert 'other_nets' not in sys.modules\n"
        "assert main(['test', '--ckpt=run', '--import', 'other_nets']) == 0\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", fresh], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 4
    assert all("other_nets" in line and "--import other_nets" in line for line in said)


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        (
            {
                "module": {
                    "class_path": "torchvision.transforms.v2.Lambda",
                    "init_args": {"lambd": "planted_nets.act"},
                }
            },
            "names 'planted_nets', which is not imported",
        ),
        (
            {
                "module": {
                    "class_path": "torchvision.transforms.v2.Lambda",
                    "init_args": {"lambd": "textwrap.dedent"},
                }
            },
            "of the standard library",
        ),
        (
            {
                "module": {"class_path": "torch.nn.Flatten"},
                "arguments": {
                    "start_dim": {"class_path": "subprocess.Popen", "init_args": {"args": ["false"]}}
                },
            },
            "names 'subprocess.Popen' of the standard library",
        ),
    ],
)
def test_functions_and_programs_that_a_run_names_are_left_alone(package, tmp_path, capsys, encoder, said):
    """A network may take functions, or anything: what a file says of them is neither imported nor called."""
    package("planted_nets", "Net")
    (tmp_path / "planted_nets.py").write_text("raise SystemExit('ran')")
    init_args = {
        "encoder": {"class_path": "ModuleEncoder", "init_args": encoder},
        "loss": {"class_path": "DCLLoss"},
    }
    config = {"model": {"class_path": "SimCLR", "init_args": init_args}, "data": {"class_path": "Digits"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--resume", "run"]) == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1
    assert "planted_nets" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.encoder.module=no_such_nets.Net"], "names 'no_such_nets.Net', which cannot be imported"),
        (
            ["--model.encoder.module=torch.nn.Nothing"],
            "--model.encoder.module names 'torch.nn.Nothing', which cannot",
        ),
        (
            ["--model.encoder.module=torch.nn.Flatten", "--model.encoder.module.start=1"],
            "no parameter of Flatten 'start'",
        ),
        (
            ["--model.encoder.module=decimal.Context"],
            "--model.encoder.module must be a Module, which decimal.Context is",
        ),
        (["--import", "no_such_nets"], "--import no_such_nets failed: ModuleNotFoundError"),
        (["--import"], "--import must name a module"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *QUICK, "--model.encoder=ModuleEncoder", *arguments]) == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1
    assert not (tmp_path / "runs").exists()
