import sys

import numpy as np
import pytest
import torch
from torch import nn

from cl_core.losses import DCLLoss
from cl_core.projectors import MLPProjector
from cl_core.training import export_method
from cl_vision.cli import main
from cl_vision.encoders import Encoder, ResNet, SmallAlexNet, SmallConvNet, TorchvisionEncoder, create_encoder
from cl_vision.exporting import export_encoder
from cl_vision.methods import SimCLR


def trained(width=4):
    torch.manual_seed(0)
    encoder = SmallConvNet(width, in_channels=1)
    encoder(torch.randn(8, 1, 8, 8))  # so that running statistics matter
    return encoder


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_what_is_written_computes_the_same_for_any_batch(tmp_path, ending):
    encoder, path = trained().train(), tmp_path / "new" / f"encoder.{ending}"
    options = {"image_size": 8, "channels": 1, "mean": (0.3,), "std": (0.5,)}
    assert export_encoder(encoder, path, **options) == path
    assert encoder.training
    images = torch.rand(5, 1, 8, 8)
    if ending == "onnx":
        import onnxruntime

        (found,) = onnxruntime.InferenceSession(str(path)).run(["features"], {"images": images.numpy()})
    else:
        found = torch.export.load(path).module()(images).detach().numpy()
    wanted = encoder.eval()((images - 0.3) / 0.5).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("encoder", [ResNet(18), SmallAlexNet()], ids=["ResNet", "SmallAlexNet"])
def test_the_other_encoders_export(tmp_path, encoder):
    path = export_encoder(encoder, tmp_path / "encoder.pt2", image_size=32)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        found, wanted = torch.export.load(path).module()(images), encoder.eval()(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="format must be one of 'onnx', 'pt2'"):
        export_encoder(trained(), tmp_path / "encoder.zip", image_size=8, channels=1)

    class Fickle(Encoder):
        dim = 2

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, images):
            scale = 1.0 if torch.compiler.is_compiling() else 2.0
            return scale * self.weight * images.mean((1, 2, 3))[:, None]

    with pytest.raises(ValueError, match="computes something else"):
        export_encoder(Fickle(), tmp_path / "encoder.pt2", image_size=8)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnx needs onnxscript: pip install 'cl-vision\[onnx\]'"):
        export_encoder(trained(), tmp_path / "encoder.onnx", image_size=8, channels=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "kind", "dim"),
    [
        ("SmallConvNet", {"width": 4}, SmallConvNet, 32),
        ("resnet34", {"stem": "imagenet"}, ResNet, 512),
        ("SmallAlexNet", {}, SmallAlexNet, 4096),
        ("convnext_tiny", {}, TorchvisionEncoder, 768),
    ],
)
def test_encoders_by_name(name, options, kind, dim):
    encoder = create_encoder(name, **options)
    assert type(encoder) is kind
    assert encoder.dim == dim


def test_encoders_with_weights(tmp_path):
    method = SimCLR(trained(), DCLLoss(), MLPProjector(out_dim=8))
    folder = export_method(method, tmp_path / "export")
    for name, options in ((None, {}), ("SmallConvNet", {"width": 4, "in_channels": 1})):
        encoder = create_encoder(name, pretrained_path=folder, **options)
        assert encoder.training
        for key, value in method.encoder.state_dict().items():
            assert torch.equal(encoder.state_dict()[key], value)


def test_what_cannot_be_created_gets_one_sentence(tmp_path):
    folder = export_method(SimCLR(trained(), DCLLoss(), MLPProjector(out_dim=8)), tmp_path / "export")
    with pytest.raises(ValueError, match="no encoder 'resnet19'; did you mean 'resnet18'"):
        create_encoder("resnet19")
    with pytest.raises(
        ValueError, match="of another encoder, SmallConvNet of dim 32, and do not fit 'SmallAlexNet'"
    ):
        create_encoder("SmallAlexNet", pretrained_path=folder)
    with pytest.raises(FileNotFoundError, match="is neither a finished run nor an export"):
        create_encoder(pretrained_path=tmp_path)
    with pytest.raises(ValueError, match="name must be given unless"):
        create_encoder()


def test_the_command_takes_size_and_normalisation_from_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_steps=1", "--trainer.progress_bar=false", "--trainer.accelerator=cpu"]
    options += [
        "--data.image_size=8",
        "--model.encoder.width=4",
        "--run_dir=run",
        "--evaluation.baselines=false",
    ]
    assert main(["fit", "--config", "dcl/digits", *options]) == 0
    assert main(["export", "--ckpt", "run", "--output", "encoder.pt2"]) == 0
    assert (
        "images (N, 1, 8, 8) in [0, 1] to features (N, 32), checked: encoder.pt2" in capsys.readouterr().out
    )
    from cl_vision.data import Digits

    data = Digits(image_size=8)
    encoder = create_encoder(pretrained_path="run").eval()
    pixels = torch.rand(4, 1, 8, 8)
    found = torch.export.load("encoder.pt2").module()(pixels)
    torch.testing.assert_close(
        found, encoder(data.evaluation_transform.normalize(pixels)), rtol=1e-4, atol=1e-5
    )
