import logging

import pytest
import torch
from PIL import Image

from cl_vision.data import ImageFolder
from cl_vision.data.folder import ImageFiles


@pytest.fixture
def labelled(tmp_path, write_image):
    """Two classes of ten images: red cats, blue dogs."""
    for number in range(10):
        write_image(tmp_path / "cat" / f"{number}.png", (250 - number, 0, 0))
        write_image(tmp_path / "dog" / f"{number}.jpg", (0, 0, 250 - number))
    return tmp_path


def test_class_folders(labelled):
    data = ImageFolder(root=labelled, image_size=12)
    assert data.class_names == ["cat", "dog"]
    assert data.num_classes == 2
    sizes = {split: len(data.evaluation_dataset(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 14, "validation": 2, "test": 4}
    for split in sizes:
        for image, label in data.evaluation_dataset(split):
            assert image.shape == (3, 12, 12)
            assert image.mean(dim=(1, 2)).argmax() == (0 if label == 0 else 2)


def test_views_of_a_flat_folder_without_labels(tmp_path, write_image):
    for number in range(6):
        write_image(tmp_path / f"{number}.jpg", (40 * number, 100, 0))
    (tmp_path / "notes.txt").write_text("not an image")
    data = ImageFolder(root=tmp_path, image_size=10)
    assert data.class_names is None
    assert data.num_classes is None
    train = data.train_dataset()
    assert len(train) == 6
    batch = data.collate([train[0], train[3]])
    assert [view.shape for view in batch.views] == [(2, 3, 10, 10)] * 2
    assert batch.labels.tolist() == [-1, -1]
    assert len(data.evaluation_dataset("train")) == 6
    assert len(data.evaluation_dataset("test")) == 0


def test_split_folders(tmp_path, write_image):
    for split, number in (("train", 10), ("val", 3), ("test", 4)):
        for name in ("cat", "dog"):
            for place in range(number):
                write_image(tmp_path / split / name / f"{place}.png", (10 * place, 0, 0))
    data = ImageFolder(root=tmp_path, image_size=8)
    sizes = {split: len(data.evaluation_dataset(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 20, "validation": 6, "test": 8}
    write_image(tmp_path / "test" / "cow" / "0.png", (0, 0, 0))
    with pytest.raises(ValueError, match="class folder 'cow' that the training images do not have"):
        ImageFolder(root=tmp_path).splits  # noqa: B018


def test_labels_can_be_ignored_or_demanded(labelled, write_image, tmp_path):
    assert ImageFolder(root=labelled, labels=False).class_names is None
    assert len(ImageFolder(root=labelled, labels=False).train_dataset()) == 20
    write_image(labelled / "stray.png", (0, 0, 0))
    assert ImageFolder(root=labelled).class_names is None
    assert ImageFolder(root=labelled, labels=True).class_names == ["cat", "dog"]
    with pytest.raises(ValueError, match="has no class folders"):
        ImageFolder(root=labelled / "cat", labels=True).splits  # noqa: B018


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_wanted_channels(tmp_path, write_image, mode, channels):
    colour = {"RGBA": (9, 9, 9, 255), "CMYK": (9, 9, 9, 9)}.get(mode, 9)
    path = write_image(tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png"), colour, mode=mode)
    image = ImageFiles([path], torch.tensor([-1]), channels=channels)[0]
    assert image.shape == (channels, 16, 20)
    assert image.dtype == torch.uint8


def test_photographs_are_turned_upright(tmp_path):
    path = tmp_path / "a.jpg"
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert ImageFiles([path], torch.tensor([-1]))[0].shape == (3, 20, 10)


def test_grey_folder_normalises_one_channel(labelled):
    data = ImageFolder(root=labelled, channels=1, image_size=8)
    assert data.evaluation_dataset("test")[0][0].shape == (1, 8, 8)
    assert data.train_dataset()[0].views[0].shape == (1, 8, 8)


def test_given_mean_and_deviation_are_used(labelled):
    plain = ImageFolder(root=labelled, image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    scaled = ImageFolder(root=labelled, image_size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    one, other = plain.evaluation_dataset("test")[0][0], scaled.evaluation_dataset("test")[0][0]
    torch.testing.assert_close(other, 4 * (one - 0.5))
    with pytest.raises(ValueError, match="mean must hold one number a channel, 1, got 3"):
        ImageFolder(root=labelled, channels=1, mean=(0.5, 0.5, 0.5))


def damage(labelled):
    """Truncate one file, replace another by text; return both."""
    truncated, foreign = labelled / "dog" / "3.jpg", labelled / "cat" / "5.png"
    truncated.write_bytes(truncated.read_bytes()[:400])
    foreign.write_text("this is no image")
    return truncated, foreign


def test_a_corrupt_image_is_named(labelled):
    files = ImageFolder(root=labelled, image_size=8).splits["train"][0]
    for path in damage(labelled):
        with pytest.raises(ValueError, match=r"cannot be read .* pass --data.on_error skip") as caught:
            files[files.paths.index(path)]
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_corrupt_images_are_really_left_out(labelled, caplog):
    broken = damage(labelled)
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(root=labelled, image_size=8, on_error="skip")
        files = data.splits["train"][0]
    assert len(files) == 18
    assert not set(broken) & set(files.paths)
    assert all(str(path) in caplog.text for path in broken)
    assert files.labels.tolist() == [0] * 9 + [1] * 9
    assert sum(len(data.evaluation_dataset(split)) for split in ("train", "validation", "test")) == 18
    again = ImageFolder(root=labelled, image_size=8, on_error="skip")
    assert torch.equal(again.splits["test"][1], data.splits["test"][1])


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_text("this is no image")
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        ImageFolder(root=tmp_path, on_error="skip").splits  # noqa: B018


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*photos: expected images"):
        ImageFolder(root=tmp_path / "photos").splits  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"no images in .*: expected files that end in .jpg"):
        ImageFolder(root=tmp_path).splits  # noqa: B018
    with pytest.raises(ValueError, match="on_error must be one of"):
        ImageFolder(root=tmp_path, on_error="ignore")
