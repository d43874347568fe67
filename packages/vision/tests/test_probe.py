import pytest
import torch

from cl_core.method import Method
from cl_vision.encoders import SmallConvNet
from cl_vision.methods.simclr import SimCLR
from cl_vision.probe import probe_folder


class Colours(Method):
    """Mean colour of an image, and a parameter that must not move."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def embed(self, images):
        return self.scale * images.mean(dim=(2, 3))


@pytest.fixture
def folder(tmp_path, write_image):
    generator = torch.Generator().manual_seed(0)
    for name, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 200))):
        for number in range(20):
            noise = torch.randint(-25, 26, (3,), generator=generator).tolist()
            write_image(
                tmp_path / name / f"{number}.png", tuple(c + n for c, n in zip(colour, noise, strict=True))
            )
    return tmp_path


def test_separable_classes_are_found(folder):
    method = Colours()
    result = probe_folder(method, folder, image_size=8)
    assert result.knn_accuracy == 1.0
    assert result.linear_accuracy == 1.0
    assert result.class_names == ["blue", "green", "red"]
    assert result.test_images == 12
    assert method.training
    assert method.scale.item() == 1.0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_method_sees_the_images_it_was_trained_for(folder, channels):
    seen = []

    class Watching(Colours):
        def embed(self, images):
            seen.append(images)
            return super().embed(images)

    probe_folder(
        Watching(), folder, image_size=8, channels=channels, mean=(2.0,) * channels, std=(0.5,) * channels
    )
    assert all(images.shape[1:] == (channels, 8, 8) for images in seen)
    assert all(-4 <= images.min() <= images.max() <= -2 for images in seen)


def test_shuffled_classes_are_not_found(folder):
    names = sorted(path for path in folder.rglob("*.png"))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1)).tolist()
    contents = [names[place].read_bytes() for place in order]
    for path, content in zip(names, contents, strict=True):
        path.write_bytes(content)
    result = probe_folder(Colours(), folder, image_size=8)
    assert result.knn_accuracy < 0.8
    assert result.linear_accuracy < 0.8


def test_features_are_those_of_evaluation_mode(folder, two_view_loss):
    torch.manual_seed(0)
    method = SimCLR(SmallConvNet(4), two_view_loss)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    first = probe_folder(method, folder, image_size=8)
    assert method.training
    assert method.encoder.training
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert probe_folder(method, folder, image_size=8) == first


def test_unlabelled_and_tiny_folders_are_refused(tmp_path, write_image):
    write_image(tmp_path / "a.png", (0, 0, 0))
    with pytest.raises(ValueError, match="has no class folders"):
        probe_folder(Colours(), tmp_path)
    write_image(tmp_path / "cat" / "a.png", (0, 0, 0))
    write_image(tmp_path / "dog" / "a.png", (0, 0, 0))
    with pytest.raises(ValueError, match="leaves no validation images"):
        probe_folder(Colours(), tmp_path)
