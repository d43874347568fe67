import logging

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

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


def paths_of(data, split="train"):
    return [str(path.relative_to(data.root)) for path in data.splits[split][0].paths]


def write_folders(write_image, root, *folders):
    """Two images in each folder."""
    for folder in folders:
        for place in range(2):
            write_image(root / folder / f"{place}.png", (10 * place, 0, 0))
    return root


def test_a_class_may_be_called_as_a_split(tmp_path, write_image):
    write_folders(write_image, tmp_path, "boat", "plane", "train")
    data = ImageFolder(root=tmp_path)
    assert data.class_names == ["boat", "plane", "train"]
    assert len(paths_of(data)) == 6
    write_image(tmp_path / "stray.png", (0, 0, 0))
    data = ImageFolder(root=tmp_path)
    assert data.class_names is None
    assert len(paths_of(data)) == 7


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "val", "notes"), "holds 'train', the name of a split, beside 'notes', which is none"),
        (
            ("train/cat", "train/dog", "cow"),
            "holds 'train', the name of a split, beside 'cow', which is none",
        ),
        (("train", "val", "valid"), "holds 'val' and 'valid', two folders of validation images"),
        (("test", "val"), r"holds 'test' but no folder 'train' beside it; .* pass --data.root .*test\."),
    ],
)
def test_layouts_that_could_be_two_things_are_refused(tmp_path, write_image, folders, message):
    write_folders(write_image, tmp_path, *folders)
    with pytest.raises(ValueError, match=message) as caught:
        ImageFolder(root=tmp_path).class_names  # noqa: B018
    assert "\n" not in str(caught.value)


def test_split_folders_by_other_names(tmp_path, write_image):
    write_folders(write_image, tmp_path, "Training/cat", "Training/dog", "Valid/cat", "testing/dog")
    (tmp_path / "notes").mkdir()
    data = ImageFolder(root=tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert [len(paths_of(data, split)) for split in ("train", "validation", "test")] == [4, 2, 2]


def test_a_split_without_class_folders_is_refused_where_others_have_them(tmp_path, write_image):
    write_folders(write_image, tmp_path, "train/cat", "train/dog", "test")
    with pytest.raises(ValueError, match=r"holds images but no class folders.*'cat'.*--data.labels false"):
        ImageFolder(root=tmp_path).splits  # noqa: B018
    assert len(paths_of(ImageFolder(root=tmp_path, labels=False), "test")) == 2


def test_hidden_files_and_folders_are_left_out(labelled, write_image):
    for path in (".thumbnails/0.jpg", "cat/.thumbnails/0.jpg", "cat/.hidden.jpg"):
        write_image(labelled / path, (0, 0, 0))
    assert len(paths_of(ImageFolder(root=labelled))) == 20
    assert len(paths_of(ImageFolder(root=labelled, labels=False))) == 20
    hidden = labelled.rename(labelled.with_name(".photos"))
    assert len(paths_of(ImageFolder(root=hidden))) == 20


def test_figures_of_runs_are_no_photographs(labelled, write_image):
    run = labelled / "runs" / "one"
    write_image(run / "figures" / "curves.png", (0, 0, 0))
    for name in ("config.yaml", "versions.json"):
        (run / name).write_text("")
    assert ImageFolder(root=labelled).class_names == ["cat", "dog"]
    assert len(paths_of(ImageFolder(root=labelled, labels=False))) == 20


def test_links_are_followed_once_and_not_in_circles(tmp_path, write_image):
    write_folders(write_image, tmp_path, "elsewhere/deep", "photos/cat", "photos/dog")
    photos = tmp_path / "photos"
    (photos / "cat" / "more").symlink_to("../../elsewhere")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to("..")
    (photos / "cat" / "again").symlink_to(".")
    (photos / "cat" / "all").symlink_to("..")
    (photos / "itself").symlink_to("itself")
    data = ImageFolder(root=photos)
    assert data.class_names == ["cat", "dog"]
    assert paths_of(data) == [
        *("cat/0.png", "cat/1.png", "cat/more/deep/0.png", "cat/more/deep/1.png"),
        *("dog/0.png", "dog/1.png"),
    ]
    (photos / "cow").symlink_to("../elsewhere")
    assert ImageFolder(root=photos).class_names == ["cat", "cow", "dog"]
    assert len(paths_of(ImageFolder(root=photos, labels=False))) == 6


def test_a_link_that_leads_nowhere_is_named(labelled):
    (labelled / "cat" / "lost.jpg").symlink_to("gone.jpg")
    files = ImageFolder(root=labelled).splits["train"][0]
    with pytest.raises(ValueError, match=r"lost.jpg cannot be read \(No such file or directory\)"):
        files[files.paths.index(labelled / "cat" / "lost.jpg")]


def test_folders_without_images_are_no_classes(labelled, caplog):
    (labelled / "cow").mkdir()
    (labelled / "notes").mkdir()
    (labelled / "notes" / "a.txt").write_text("text")
    with caplog.at_level(logging.WARNING):
        assert ImageFolder(root=labelled).class_names == ["cat", "dog"]
    assert caplog.messages == [
        f"{labelled / name} is no class: there are no images in it." for name in ("cow", "notes")
    ]


def test_one_subfolder_is_no_label(tmp_path, write_image):
    data = ImageFolder(root=write_folders(write_image, tmp_path, "2024/march", "2024/may"))
    assert data.class_names is None
    assert len(data.train_dataset()) == 4
    with pytest.raises(ValueError, match="has only the class folder '2024'; expected two or more"):
        ImageFolder(root=tmp_path, labels=True).class_names  # noqa: B018


def test_one_image_is_too_few_to_train_on(tmp_path, write_image):
    write_image(tmp_path / "a.png", (0, 0, 0))
    data = ImageFolder(root=tmp_path)
    assert len(data.evaluation_dataset("train")) == 1
    with pytest.raises(ValueError, match=r"ImageFolder has 1 training image, but .* at least 2"):
        data.train_dataset()


def test_root_may_begin_with_the_home_folder(labelled, monkeypatch):
    monkeypatch.setenv("HOME", str(labelled.parent))
    assert len(paths_of(ImageFolder(root=f"~/{labelled.name}"))) == 20
    with pytest.raises(ValueError, match="root must name a folder"):
        ImageFolder(root="")


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


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (9, 9, 9, 0)), ("LA", (9, 0))])
def test_what_is_transparent_becomes_white(tmp_path, write_image, mode, colour):
    path = write_image(tmp_path / "a.png", colour, mode=mode)
    assert (ImageFiles([path], torch.tensor([-1]))[0] == 255).all()


def test_transparent_palettes_become_white(tmp_path):
    path = tmp_path / "a.png"
    image = Image.new("P", (8, 8), 3)
    image.putpalette([0] * 768)
    image.save(path, transparency=bytes([255, 255, 255, 0]))
    assert (ImageFiles([path], torch.tensor([-1]))[0] == 255).all()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "A.GIF"])
def test_the_first_frame_of_an_animation_counts(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    image = ImageFolder(root=tmp_path).splits["train"][0][0]
    assert image.float().mean(dim=(1, 2)).argmax() == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1)])
def test_the_smallest_photographs_have_views(tmp_path, write_image, size):
    write_image(tmp_path / "a.png", (9, 9, 9), size=size)
    write_image(tmp_path / "b.png", (9, 9, 9), size=size)
    data = ImageFolder(root=tmp_path, image_size=8)
    assert data.train_dataset()[0].views[0].shape == (3, 8, 8)
    assert data.evaluation_dataset("train")[0][0].shape == (3, 8, 8)


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


def test_a_corrupt_image_is_named_by_a_loader_process_too(tmp_path, write_image):
    path = write_image(tmp_path / "a.png", (0, 0, 0))
    path.write_bytes(path.read_bytes()[:40])
    loader = DataLoader(ImageFolder(root=tmp_path).evaluation_dataset("train"), num_workers=1)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        next(iter(loader))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_corrupt_images_are_really_left_out(labelled, caplog):
    broken = damage(labelled)
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(root=labelled, image_size=8, on_error="skip")
        files = data.splits["train"][0]
    assert len(files) == 18
    assert not set(broken) & set(files.paths)
    assert all(str(path) in caplog.text for path in broken)
    assert caplog.messages[-1] == "2 of 20 images left out: they cannot be read."
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


def test_rows_are_called_by_their_files(tmp_path, write_image):
    for name in ("cat/b.png", "cat/a.png", "dog/c.png", "dog/d.png"):
        write_image(tmp_path / name, "red")
    data = ImageFolder(root=tmp_path, validation=0.0, test=0.0)
    assert data.row_names("train") == ["cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"]
    assert data.row_names("test") == []
