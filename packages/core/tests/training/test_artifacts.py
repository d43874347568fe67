from __future__ import annotations

import copy
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cl_core.method import Method
from cl_core.training import artifacts
from cl_core.training.checkpoints import VERSION, AtomicCheckpointIO, read_checkpoint
from cl_core.training.files import write_atomically
from cl_core.training.fitting import fit
from cl_core.training.settings import TrainerOptions


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def exported(tiny, tmp_path):
    return artifacts.export_method(tiny.method(temperature=0.3), tmp_path / "export")


def test_an_export_comes_back(tiny, exported):
    method = tiny.method(temperature=0.3).eval()
    loaded = artifacts.load_export(exported)
    assert type(loaded) is tiny.TinyMethod
    assert loaded.criterion.temperature == 0.3
    assert not loaded.training
    inputs = torch.randn(3, 6)
    assert torch.equal(loaded.embed(inputs), method.embed(inputs))


def test_arguments_of_every_plain_kind_come_back(tiny):
    class Argued(tiny.TinyEncoder):
        def __init__(self, sizes: tuple[int, ...], names: list[str], scale: torch.Tensor, none: int | None):
            super().__init__()
            self.sizes, self.names, self.none = sizes, names, none
            self.scale = torch.nn.Parameter(torch.as_tensor(scale))

    described = artifacts.describe(Argued((1, 2), ["a"], torch.tensor(0.5), None))
    built = artifacts.build(json.loads(json.dumps(described)), tiny.TinyEncoder)
    assert (built.sizes, built.names, built.none, built.scale.item()) == ((1, 2), ["a"], None, 0.5)


class Plain(torch.nn.Module):
    pass


def test_modules_that_take_no_arguments_and_numbers_of_numpy_come_back(tiny):
    class Holder(tiny.TinyMethod):
        def __init__(self, first: Plain, second: torch.nn.Identity, share: float) -> None:
            torch.nn.Module.__init__(self)
            self.first, self.second, self.share = first, second, share

    described = artifacts.describe(Holder(Plain(), torch.nn.Identity(), np.float64(0.1)))
    assert type(described["arguments"]["share"]) is float
    built = artifacts.build(json.loads(json.dumps(described)), tiny.TinyMethod)
    assert (type(built.first), type(built.second), built.share) == (Plain, torch.nn.Identity, 0.1)


def test_what_is_not_stored_or_not_plain_is_refused(tiny):
    class Forgets(tiny.TinyEncoder):
        def __init__(self, lost: int = 3) -> None:
            super().__init__()

    class Starred(tiny.TinyEncoder):
        def __init__(self, **anything: int) -> None:
            super().__init__()

    with pytest.raises(TypeError, match="Forgets does not store its argument 'lost' under its own name"):
        artifacts.describe(tiny.TinyMethod(Forgets(), tiny.TinyLoss()))
    with pytest.raises(TypeError, match="Starred, whose arguments are not all named"):
        artifacts.describe(tiny.TinyMethod(Starred(), tiny.TinyLoss()))
    with pytest.raises(
        TypeError, match=r"model.encoder.bias is a Parameter, which an export cannot write down"
    ):
        artifacts.describe(tiny.TinyMethod(torch.nn.Linear(6, 5), torch.relu))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os.system", "names system of os, which is not a registered or imported Method"),
        ("tiny.TinyLoss", "which is not a registered or imported Method"),
        ("subprocess.Popen", "names Popen of subprocess"),
        (3, "names a class 3 where none is allowed"),
    ],
)
def test_only_known_classes_are_built(exported, name, said):
    edit(exported, lambda config: config["model"].update({"class": name}))
    with pytest.raises(ValueError, match=said):
        artifacts.load_export(exported)


def test_a_class_in_the_place_of_a_number_is_refused(exported):
    def change(config):
        nested = {"class": "tiny.TinyLoss", "arguments": {}}
        config["model"]["arguments"]["loss"]["arguments"]["temperature"] = nested

    edit(exported, change)
    with pytest.raises(
        ValueError, match=r"names TinyLoss of tiny, which is not a registered or imported float"
    ):
        artifacts.load_export(exported)


def test_damaged_exports_are_refused_in_one_sentence(exported, tmp_path):
    def damaged(change, said, kind=ValueError):
        copy = tmp_path / "copy"
        shutil.copytree(exported, copy)
        change(copy)
        with pytest.raises(kind, match=said) as caught:
            artifacts.load_export(copy)
        assert "\n" not in str(caught.value)
        shutil.rmtree(copy)

    weights = "model.safetensors"
    damaged(lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-9]), "truncated, corrupt")
    damaged(lambda f: (f / weights).unlink(), "there is no model.safetensors", FileNotFoundError)
    damaged(lambda f: (f / "config.json").write_text("{"), "not readable JSON")
    damaged(lambda f: (f / "config.json").write_text("[" * 100000), "not readable JSON")
    damaged(
        lambda f: edit(
            f, lambda config: config["model"]["arguments"]["encoder"]["arguments"].update(width=2**60)
        ),
        "TinyEncoder cannot be built from the export",
    )
    damaged(lambda f: (f / "config.json").write_text("{}"), "does not describe an exported method")
    damaged(lambda f: (f / "config.json").unlink(), "holds no export", FileNotFoundError)
    damaged(
        lambda f: edit(f, lambda config: config.update(version=99)), "export format 99, this version reads 1"
    )
    damaged(
        lambda f: edit(
            f, lambda config: config["model"]["arguments"]["encoder"]["arguments"].update(width=9)
        ),
        "the weights of .* do not fit its TinyMethod",
    )
    damaged(
        lambda f: edit(f, lambda config: config["model"]["arguments"].update(unheard=9)),
        "TinyMethod cannot be built from the export: .*unheard",
    )


def test_initialise_takes_what_fits_and_names_the_rest(tiny):
    source, target = tiny.method(seed=1), tiny.method(seed=2)
    weights = source.state_dict()
    weights["encoder.layers.3.weight"] = torch.zeros(2, 2)
    assert artifacts.initialise(target, weights, source="x") == ["encoder.layers.3.weight"]
    assert torch.equal(target.encoder.layers[0].weight, source.encoder.layers[0].weight)
    alone = {name: value for name, value in weights.items() if value.ndim == 1}
    for nothing in ({"other": torch.zeros(1)}, {"other": torch.zeros(1), "head.bias": torch.zeros(4)}):
        with pytest.raises(ValueError, match="no weight of x fits TinyMethod by name and shape"):
            artifacts.initialise(target, nothing, source="x")
    with pytest.raises(
        ValueError,
        match=r"of x does not fit that of TinyMethod: encoder.layers.0.weight does not exist there",
    ):
        artifacts.initialise(target, alone, source="x")


def test_an_encoder_that_does_not_fit_is_refused_though_biases_and_heads_do(tiny):
    source, target = (tiny.TinyClassifier(tiny.TinyEncoder(width), tiny.TinyLoss()) for width in (4, 8))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    said = (
        r"the encoder of x does not fit that of TinyClassifier: encoder.layers.0.weight has shape \(4, 6\) there "
        r"and has shape \(8, 6\) here."
    )
    with pytest.raises(ValueError, match=said):
        artifacts.initialise(target, source.state_dict(), source="x")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    headless = {name: value for name, value in source.state_dict().items() if name.startswith("head.")}
    assert (
        len(artifacts.initialise(target, headless, source="x")) == 4
    )  # no encoder there: the head is what is wanted


class Anybodys(nn.Module):
    """Of somebody who stores no argument as it came."""

    def __init__(self, size, inner: nn.Module | None = None):
        super().__init__()
        self.size = nn.Linear(6, size)
        self.inner = inner


class Holds(Method):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def test_any_module_comes_back_by_what_it_was_built_with(tmp_path):
    inner = Anybodys(2)
    method = Holds(Anybodys(3, inner))
    with pytest.raises(
        TypeError, match=r"Anybodys does not store its argument 'size' .*: pass model.arguments"
    ):
        artifacts.export_method(method, tmp_path)
    artifacts.note_arguments(method.module, {"size": 3, "inner": inner})
    artifacts.note_arguments(inner, {"size": 2})
    for number in range(2):  # what was read can be written again, and so can a copy
        method = copy.deepcopy(artifacts.load_export(artifacts.export_method(method, tmp_path / str(number))))
    assert (method.module.size.out_features, method.module.inner.size.out_features) == (3, 2)


@pytest.fixture
def checkpoint(tiny):
    options = TrainerOptions(max_epochs=1, accelerator="cpu", progress_bar=False)
    return fit(tiny.method(), tiny.TinyData(), trainer=options, run_dir="run").run.last_checkpoint


def test_a_checkpoint_says_its_format_and_package(checkpoint):
    content = read_checkpoint(checkpoint, package="cl-core")
    assert content["format"] == {"version": VERSION, "package": "cl-core"}
    with pytest.raises(ValueError, match=r"is not a cl-vision checkpoint: it belongs to cl-core"):
        read_checkpoint(checkpoint, package="cl-vision")


def test_damaged_checkpoints_are_refused_in_one_sentence(checkpoint, tmp_path):
    def refused(said, kind=ValueError):
        with pytest.raises(kind, match=said) as caught:
            read_checkpoint(path, package="cl-core")
        assert "\n" not in str(caught.value)

    good, path = checkpoint.read_bytes(), checkpoint.with_name("bad.ckpt")
    path.write_bytes(good[: len(good) // 2])
    refused(rf"bad.ckpt is not a cl-core checkpoint: it is truncated .*; {checkpoint} is intact\.")
    with zipfile.ZipFile(checkpoint) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    place = good.index(good[entry.header_offset : entry.header_offset + 30]) + 30 + entry.file_size // 2
    path.write_bytes(good[: place + 60] + bytes([good[place + 60] ^ 255]) + good[place + 61 :])
    refused("bad.ckpt is corrupt: the checksum")
    path.write_bytes(b"")
    refused("truncated or of another format")
    torch.save({"state_dict": {}}, path)
    refused("it has no format entry")
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    refused("it holds more than tensors and plain values")
    AtomicCheckpointIO("cl-core").save_checkpoint({"cl_core": {}}, path)
    content = torch.load(path, weights_only=True)
    content["format"]["version"] = 0
    torch.save(content, path)
    refused("has checkpoint format 0, this cl-core reads 1; start from its exported weights with --init_from")
    path.unlink()
    refused("no checkpoint", FileNotFoundError)


def test_loading_a_checkpoint_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    torch.save({"format": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="more than tensors"):
        read_checkpoint(tmp_path / "evil.ckpt", package="cl-core")
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_file_before(tmp_path):
    path = write_atomically(tmp_path / "file", "before")

    def fails(temporary):
        temporary.write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_atomically(path, fails)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
