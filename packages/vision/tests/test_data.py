import gzip
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torchvision import datasets

from cl_core.training.data import Data
from cl_core.training.loader import TrainLoader
from cl_vision.data import (
    CIFAR10,
    CIFAR100,
    STL10,
    Digits,
    FashionMNIST,
    ImageArray,
    PackedCIFAR10,
    PlainDataset,
    ViewDataset,
    Views,
    collate_views,
    stratified_split,
)
from cl_vision.data.folder import ImageFiles, ImageFolder
from cl_vision.data.views import ViewBatch
from cl_vision.transforms import (
    InfoMinTransform,
    MultiCrop,
    SimCLRTransform,
    SmallGrayTransform,
    ViewTransform,
    view_seed,
)

CL_DATA = os.environ.get("CL_DATA")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return ImageArray(pixels, torch.arange(12) % 3)


# Views


def same_views(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


def test_views_depend_on_seed_epoch_row_and_view_only(images):
    transform = SimCLRTransform(12)
    data = ViewDataset(images, transform, seed=3)
    first = data[5]
    assert not torch.equal(*first.views)
    assert (first.labels, first.index) == (5 % 3, 5)
    assert same_views(first, ViewDataset(images, transform, seed=3)[5])
    assert not same_views(first, ViewDataset(images, transform, seed=4)[5])
    data.set_epoch(1)
    assert not same_views(first, data[5])
    data.set_epoch(0)
    assert same_views(first, data[5])


@pytest.mark.parametrize("one_call", [0, 10**9])
def test_samples_made_together_are_those_made_alone(images, one_call, monkeypatch):
    monkeypatch.setattr("cl_vision.data.views._ONE_CALL", one_call)
    rows = torch.tensor([7, 2, 9, 0, 11])
    shift = torch.tensor([0.5, 0.25, 0.0])[:, None, None]
    data = ViewDataset(
        images, SimCLRTransform(12), rows=rows, num_views=3, seed=2, finish=lambda views: views - shift
    )
    data.set_epoch(4)
    together, alone = data.__getitems__([3, 0, 4]), [data[index] for index in (3, 0, 4)]
    batch = collate_views(together)
    assert isinstance(together, ViewBatch)
    assert same_views(batch, collate_views(alone))
    assert batch.labels.tolist() == (rows[[3, 0, 4]] % 3).tolist()
    assert batch.index.tolist() == [3, 0, 4]
    assert all(view.is_contiguous() for view in batch.views)


@pytest.mark.parametrize("large", [SimCLRTransform(12), InfoMinTransform(12)], ids=["batch", "one_by_one"])
def test_crops_of_two_sizes(images, large):
    """Each view is that of its own transform alone, made in batches where both can be."""
    small = SimCLRTransform(8, scale=(0.05, 0.14))
    data = ViewDataset(images, MultiCrop(large, small), num_views=5, seed=2)
    batch = collate_views(data.__getitems__([3, 0, 4]))
    assert [tuple(view.shape) for view in batch.views] == [(3, 3, 12, 12)] * 2 + [(3, 3, 8, 8)] * 3
    assert same_views(batch, collate_views([data[index] for index in (3, 0, 4)]))
    for view, transform in enumerate([large] * 2 + [small] * 3):
        expected = transform(images[4], seed=view_seed(2, 0, 4, view))
        assert torch.equal(batch.views[view][2], expected)


def test_samples_made_together_are_a_sequence_of_samples(images):
    data = ViewDataset(images, SimCLRTransform(12))
    together = data.__getitems__([5, 1, 8])
    assert len(together) == 3
    for sample, index in zip(together, (5, 1, 8), strict=True):
        assert same_views(sample, data[index])
        assert (sample.labels, sample.index) == (index % 3, index)
    assert same_views(together[1:].batch, collate_views([data[1], data[8]]))
    # A loader without our collate stacks them as any other samples.
    batch = default_collate(together)
    assert isinstance(batch, Views)
    assert same_views(batch, together.batch)
    (loaded,) = DataLoader(data, batch_size=12)
    assert same_views(loaded, collate_views([data[index] for index in range(12)]))


def test_views_need_a_transform_that_draws_from_seeds_and_their_number(images):
    with pytest.raises(TypeError, match=r"transform must be a ViewTransform, got Identity: wrap a pipeline"):
        ViewDataset(images, torch.nn.Identity())
    with pytest.raises(TypeError, match=r"num_views must be an integer, got float\."):
        ViewDataset(images, SimCLRTransform(8), num_views=2.0)


def test_a_pipeline_of_ones_own_goes_image_by_image(images):
    def ragged(image):
        return image[:, : 2 + int(torch.randint(8, ()))]

    data = ViewDataset(images, ViewTransform(ragged))
    (samples,) = DataLoader(data, batch_size=12, collate_fn=list)
    assert all(same_views(sample, data[index]) for index, sample in enumerate(samples))
    assert len({sample.views[0].shape for sample in samples}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_several_sizes(tmp_path, write_image, workers):
    for number in range(12):
        write_image(tmp_path / f"{number:02}.png", (20 * number, 100, 0), size=(10 + number % 3, 14))
    data = ImageFolder(root=tmp_path, image_size=8, test=0.0, validation=0.0)
    train = data.train_dataset()
    batches = list(DataLoader(train, batch_size=5, num_workers=workers, collate_fn=data.collate))
    assert [len(batch.labels) for batch in batches] == [5, 5, 2]
    for number, batch in enumerate(batches):
        rows = range(5 * number, min(5 * number + 5, 12))
        assert same_views(batch, collate_views([train[row] for row in rows]))


@pytest.mark.parametrize(
    ("most", "together"), [(10**9, [4, 1, 3]), (2 * 3 * 10 * 14, [2, 2, 1, 2, 1]), (1, [1] * 8)]
)
def test_files_of_one_size_have_their_views_made_together(tmp_path, write_image, monkeypatch, most, together):
    for number in range(8):
        write_image(tmp_path / f"{number}.png", (20 * number, 100, 0), size=(14, 11 if number == 4 else 10))
    data = ImageFolder(root=tmp_path, image_size=8, num_views=1, test=0.0, validation=0.0)
    train, made = data.train_dataset(), []
    alone = collate_views([train[row] for row in range(8)])
    batch = SimCLRTransform.batch
    monkeypatch.setattr(
        SimCLRTransform,
        "batch",
        lambda self, images, *rest: made.append(len(images)) or batch(self, images, *rest),
    )
    monkeypatch.setattr("cl_vision.data.views._HELD", most)
    assert same_views(data.collate(train.__getitems__(list(range(8)))), alone)
    assert made == together
    assert train.__getitems__([]) == []


class Held(Data):
    """Images at hand, for the trainer's loader."""

    def __init__(self, images, **options):
        super().__init__(**options)
        self.images = images

    def train_dataset(self):
        return ViewDataset(self.images, SimCLRTransform(12), seed=self.seed)

    def evaluation_dataset(self, split):
        raise NotImplementedError

    def collate(self, items):
        return collate_views(items)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was_stopped(images, workers):
    def batches(loader, epoch):
        loader.set_epoch(epoch)
        return list(loader)

    whole = TrainLoader(Held(images, batch_size=5, num_workers=0), drop_last=False)
    expected = [batches(whole, epoch) for epoch in range(2)]
    stopped = TrainLoader(Held(images, batch_size=5, num_workers=workers), drop_last=False)
    assert all(map(same_views, batches(stopped, 0), expected[0]))
    stopped.set_epoch(1)
    assert same_views(next(iter(stopped)), expected[1][0])
    resumed = TrainLoader(Held(images, batch_size=5, num_workers=workers), drop_last=False)
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert len(rest) == 2
    assert all(map(same_views, rest, expected[1][1:]))
    # Batches of another size hold the same views, image by image.
    other = TrainLoader(Held(images, batch_size=3, num_workers=workers), drop_last=False)
    found, wanted = (
        {
            index: view
            for batch in epoch
            for index, view in zip(batch.index.tolist(), batch.views[0], strict=True)
        }
        for epoch in (batches(other, 1), expected[1])
    )
    assert set(found) == set(wanted) == set(range(12))
    assert all(torch.equal(found[index], wanted[index]) for index in range(12))


def test_ranks_look_at_all_items_in_order(images):
    """What a method sees before it trains: the views of the epoch, each item once, whatever the batch size."""
    loader = TrainLoader(Held(images, batch_size=4))
    parts = [list(loader.in_order(rank, 3)) for rank in range(3)]
    assert [[batch.index.tolist() for batch in part] for part in parts] == [
        [[rank, rank + 3, rank + 6, rank + 9]] for rank in range(3)
    ]
    data = Held(images).train_dataset()
    assert same_views(parts[1][0], collate_views([data[index] for index in (1, 4, 7, 10)]))
    assert loader.state_dict() == {"epoch": 0, "used": 0}
    (batch,) = loader.in_order(0, 40)
    assert batch.index.tolist() == [0]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_views_of_the_main_process(images, persistent):
    data = ViewDataset(images, SimCLRTransform(12), seed=1)
    loader = DataLoader(
        data, batch_size=5, num_workers=1, persistent_workers=persistent, collate_fn=collate_views
    )
    for epoch in range(2):
        data.set_epoch(epoch)
        for number, batch in enumerate(loader):
            rows = range(5 * number, min(5 * number + 5, 12))
            assert same_views(batch, collate_views([data[row] for row in rows]))
            assert batch.index.tolist() == list(rows)


def test_collate_and_subset(images):
    data = ViewDataset(images, SimCLRTransform(12), rows=torch.tensor([7, 2, 9]), num_views=3)
    batch = collate_views([data[0], data[2]])
    assert isinstance(batch, Views)
    assert [view.shape for view in batch.views] == [(2, 3, 12, 12)] * 3
    assert batch.labels.tolist() == [7 % 3, 9 % 3]
    assert batch.index.tolist() == [0, 2]
    assert data.labels.tolist() == [7 % 3, 2 % 3, 9 % 3]


def test_image_array_refuses_other_tensors():
    with pytest.raises(ValueError, match="uint8 of shape"):
        ImageArray(torch.zeros(2, 3, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), got \(3,\)"):
        ImageArray(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3))


# Splits


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 4, (203,), generator=generator)
    kept, held = stratified_split(labels, 0.2, seed=seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(203))
    for label in range(4):
        count = int((labels == label).sum())
        assert int((labels[held] == label).sum()) == round(0.2 * count)
    assert not (labels[held] == -1).any()
    again = stratified_split(labels, 0.2, seed=seed)[1]
    other = stratified_split(labels, 0.2, seed=seed + 1)[1]
    assert torch.equal(held, again)
    assert not torch.equal(held, other)


def test_stratified_split_of_rare_classes():
    kept, held = stratified_split(torch.tensor([0, 1, 1, 2, 2, 2]), 0.1, seed=0)
    assert torch.tensor([0, 1, 1, 2, 2, 2])[held].tolist() == [1, 2]
    assert len(kept) == 4
    assert not len(stratified_split(torch.zeros(5), 0.0, seed=0)[1])


def test_digits_splits_are_disjoint_stratified_and_fixed():
    data = Digits()
    rows = {split: rows for split, (_, rows) in data.splits.items()}
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 1151,
        "validation": 287,
        "test": 359,
    }
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(1797))
    for split, fraction in (("test", 0.2), ("validation", 0.16), ("train", 0.64)):
        counts = data.splits[split][0].labels[rows[split]].bincount()
        everywhere = data.splits[split][0].labels.bincount()
        assert (counts / everywhere - fraction).abs().max() < 0.01
    other = Digits()
    other.set_seed(5)
    assert torch.equal(other.splits["test"][1], rows["test"])
    assert not torch.equal(Digits(split_seed=1).splits["test"][1], rows["test"])


def test_digits_train_and_evaluate():
    data = Digits(image_size=12, batch_size=4)
    data.set_seed(2)
    train, test = data.train_dataset(), data.evaluation_dataset("test")
    batch = data.collate([train[0], train[1]])
    assert [view.shape for view in batch.views] == [(2, 1, 12, 12)] * 2
    assert train.seed == 2
    image, label = test[0]
    assert image.shape == (1, 12, 12)
    assert label == test.labels[0]
    assert data.num_classes == len(data.class_names) == 10
    pixels = torch.stack([data.evaluation_dataset("train")[row][0] for row in range(300)])
    assert abs(pixels.mean()) < 0.1
    assert abs(pixels.std() - 1) < 0.1


def test_training_and_evaluation_see_one_scale():
    data = Digits(transform=ViewTransform(lambda image: image.float() / 255))
    train, plain = data.train_dataset(), data.evaluation_dataset("train")
    for row in (0, 7):
        torch.testing.assert_close(train[row].views[0], plain[row][0])
        assert train[row].labels == plain[row][1]


def test_digits_refuse_bad_settings():
    with pytest.raises(ValueError, match="image_size must be >= 8"):
        Digits(image_size=7)
    with pytest.raises(ValueError, match="split must be one of"):
        Digits().evaluation_dataset("val")
    with pytest.raises(ValueError, match=r"validation must be in \[0, 1\)"):
        Digits(validation=1.0)


def test_root_defaults_to_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CL_DATA", str(tmp_path))
    assert FashionMNIST().root == tmp_path
    monkeypatch.delenv("CL_DATA")
    assert FashionMNIST().root == Path("data")
    assert FashionMNIST(root="elsewhere").root == Path("elsewhere")


# Fashion-MNIST


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    """Function (folder, packed) that writes twenty and ten images in the true layout."""

    def write(folder="FashionMNIST/raw", packed=False):
        generator = np.random.default_rng(0)
        raw = tmp_path / folder
        raw.mkdir(parents=True)
        for prefix, number in (("train", 20), ("t10k", 10)):
            for name, array in (
                ("images-idx3", generator.integers(0, 256, (number, 28, 28))),
                ("labels-idx1", np.arange(number) % 10),
            ):
                content = idx(array)
                path = raw / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
                path.write_bytes(gzip.compress(content) if packed else content)
        return tmp_path

    return write


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "fashion-mnist/FashionMNIST/raw"])
def test_fashion_mnist_layouts(fashion, folder, packed):
    root = fashion(folder, packed)
    data = FashionMNIST(root=root, validation=0.5)
    assert {split: len(rows) for split, (_, rows) in data.splits.items()} == {
        "test": 10,
        "validation": 10,
        "train": 10,
    }
    expected = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 28, 28)))
    assert torch.equal(data.splits["train"][0].images[:, 0].long(), expected)
    assert isinstance(data.transform, SmallGrayTransform)
    assert data.class_names[9] == "Ankle boot"
    few = FashionMNIST(root=root, train_size=6, test_size=3, validation=0.0)
    assert torch.equal(few.splits["train"][0].images, data.splits["train"][0].images[:6])
    assert len(few.evaluation_dataset("test")) == 3
    with pytest.raises(ValueError, match="train_size must be at least 1, got 0"):
        FashionMNIST(root=root, train_size=0)
    with pytest.raises(TypeError, match="test_size must be an integer, got float"):
        FashionMNIST(root=root, test_size=2.5)


def test_fashion_mnist_agrees_with_torchvision(fashion):
    root = fashion()
    theirs = datasets.FashionMNIST(root)
    ours = FashionMNIST(root=root).splits["train"][0]
    assert torch.equal(ours.images[:, 0], theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


def test_broken_idx_files_are_named(fashion):
    root = fashion()
    path = root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not whole: it holds 15,675 values"):
        FashionMNIST(root=root).splits  # noqa: B018
    path.write_bytes(b"photographs")
    with pytest.raises(ValueError, match="is not an idx file of unsigned bytes"):
        FashionMNIST(root=root).splits  # noqa: B018
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        FashionMNIST(root=root).splits  # noqa: B018


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (FashionMNIST, "FashionMNIST/raw/"),
        (CIFAR10, "cifar-10-batches-py/"),
        (CIFAR100, "cifar-100-python/"),
        (STL10, "stl10_binary/"),
        (PackedCIFAR10, "cifar10_jpeg.npz"),
    ],
)
def test_missing_data_says_what_is_expected(kind, expected, tmp_path):
    with pytest.raises(FileNotFoundError, match=expected) as caught:
        kind(root=tmp_path).splits  # noqa: B018
    assert str(tmp_path) in str(caught.value)
    assert "--data.root" in str(caught.value)
    assert "\n" not in str(caught.value)


# CIFAR and STL


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_pickles_are_never_opened(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    mark = tmp_path / "opened"
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(ValueError, match="does not have torchvision's MD5 sums, so it was not opened"):
        CIFAR10(root=tmp_path).splits  # noqa: B018
    assert not mark.exists()
    pickle.loads((folder / "test_batch").read_bytes())
    assert mark.exists()


def write_pickles(folder, files):
    folder.mkdir()
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return sums


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar_reads_the_python_batches(kind, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    key, reader = ("labels", datasets.CIFAR10) if kind is CIFAR10 else ("fine_labels", datasets.CIFAR100)
    batches = {
        name: {
            "data": generator.integers(0, 256, (number, 3072), dtype=np.uint8),
            key: list(np.arange(number) % 5),
        }
        for name, number in (("one", 20), ("two", 10))
    }
    names = ["apple", "bear", "cup", "dog", "elm"]
    meta = {"label_names" if kind is CIFAR10 else "fine_label_names": names}
    sums = write_pickles(tmp_path / reader.base_folder, {**batches, "names": meta})
    monkeypatch.setattr(reader, "train_list", [["one", sums["one"]]])
    monkeypatch.setattr(reader, "test_list", [["two", sums["two"]]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "filename": "names", "md5": sums["names"]})
    data = kind(root=tmp_path, validation=0.25)
    assert {split: len(rows) for split, (_, rows) in data.splits.items()} == {
        "test": 10,
        "validation": 5,
        "train": 15,
    }
    stored = torch.from_numpy(batches["one"]["data"]).view(20, 3, 32, 32)
    assert torch.equal(data.splits["train"][0].images, stored)
    assert data.class_names == names
    assert kind(root=tmp_path).num_classes == 5


def test_stl10_trains_on_unlabelled_images_and_evaluates_labelled_ones(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    arrays = {
        "train_X.bin": generator.integers(0, 256, (10, 3, 96, 96), dtype=np.uint8),
        "train_y.bin": np.arange(10, dtype=np.uint8) % 5 + 1,
        "unlabeled_X.bin": generator.integers(0, 256, (7, 3, 96, 96), dtype=np.uint8),
        "test_X.bin": generator.integers(0, 256, (5, 3, 96, 96), dtype=np.uint8),
        "test_y.bin": np.arange(5, dtype=np.uint8) + 1,
    }
    sums = {}
    for name, array in arrays.items():
        (folder / name).write_bytes(array.tobytes())
        sums[name] = hashlib.md5(array.tobytes()).hexdigest()
    train = ["train_X.bin", "train_y.bin", "unlabeled_X.bin"]
    monkeypatch.setattr(datasets.STL10, "train_list", [[name, sums[name]] for name in train])
    monkeypatch.setattr(
        datasets.STL10, "test_list", [[name, sums[name]] for name in ("test_X.bin", "test_y.bin")]
    )
    data = STL10(root=tmp_path, validation=0.5, image_size=32)
    assert len(data.train_dataset()) == 5 + 7
    assert sorted(data.evaluation_dataset("train").labels.tolist()) == list(range(5))
    assert sorted(data.evaluation_dataset("validation").labels.tolist()) == list(range(5))
    assert len(data.evaluation_dataset("test")) == 5
    image = data.splits["train"][0].images[0]
    # STL-10 stores its images column by column.
    assert torch.equal(image, torch.from_numpy(arrays["train_X.bin"][0]).transpose(1, 2))
    assert len(STL10(root=tmp_path, unlabelled=False).splits["train"][0]) == 10
    assert len(STL10(root=tmp_path, train_size=7).splits["train"][0]) == 7
    (folder / "test_y.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="stl10_binary is incomplete"):
        STL10(root=tmp_path).splits  # noqa: B018


# Packed CIFAR-10


@pytest.mark.parametrize("place", ["cifar10_jpeg.npz", "cifar10-jpeg/cifar10_jpeg.npz"])
def test_packed_cifar_decodes(packed, place, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    np.savez(tmp_path / place, **packed)
    data = PackedCIFAR10(root=tmp_path, validation=0.25)
    assert {split: len(rows) for split, (_, rows) in data.splits.items()} == {
        "test": 20,
        "validation": 10,
        "train": 30,
    }
    train = data.splits["train"][0]
    assert train.images.shape == (40, 3, 32, 32)
    assert (train.images.float().mean(dim=(1, 2, 3)) - 20 * train.labels).abs().max() < 2
    assert data.class_names[3] == "class 3"
    short = PackedCIFAR10(root=tmp_path, train_size=20, test_size=10)
    assert len(short.splits["train"][0]) == 20
    assert len(short.evaluation_dataset("test")) == 10


@pytest.mark.parametrize("damage", ["truncated", "text", "missing", "offsets", "stream"])
def test_damaged_packed_files_are_named(packed, damage, tmp_path):
    path = tmp_path / "cifar10_jpeg.npz"
    if damage == "missing":
        del packed["test_labels"]
    if damage == "offsets":
        packed["train_offsets"] = packed["train_offsets"][:-1]
    if damage == "stream":
        packed["train_jpeg"] = packed["train_jpeg"] * 0
    np.savez(path, **packed)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "text":
        path.write_bytes(b"photographs")
    with pytest.raises(ValueError, match=r"cifar10_jpeg.npz is not a whole packed CIFAR-10 \(") as caught:
        PackedCIFAR10(root=tmp_path).splits  # noqa: B018
    assert "\n" not in str(caught.value)


def test_packed_cifar_never_unpickles(packed, tmp_path):
    mark = tmp_path / "opened"
    packed["class_names"] = np.array([Trap(mark)], dtype=object)
    np.savez(tmp_path / "cifar10_jpeg.npz", **packed)
    with pytest.raises(ValueError, match="not a whole packed CIFAR-10"):
        PackedCIFAR10(root=tmp_path).splits  # noqa: B018
    assert not mark.exists()


@pytest.mark.skipif(
    not CL_DATA or not Path(CL_DATA, "cifar10-jpeg").is_dir(), reason="needs $CL_DATA/cifar10-jpeg"
)
def test_packed_cifar_of_the_shared_data():
    data = PackedCIFAR10(train_size=2000, test_size=500)
    images = data.splits["train"][0].images.float() / 255
    assert data.class_names[0] == "airplane"
    assert data.splits["train"][0].labels.bincount().tolist() == [200] * 10
    assert (images.mean(dim=(0, 2, 3)) - torch.tensor(PackedCIFAR10.mean)).abs().max() < 0.02
    assert (images.std(dim=(0, 2, 3)) - torch.tensor(PackedCIFAR10.std)).abs().max() < 0.02


@pytest.mark.skipif(
    not CL_DATA or not Path(CL_DATA, "fashion-mnist").is_dir(), reason="needs $CL_DATA/fashion-mnist"
)
def test_fashion_mnist_of_the_shared_data():
    data = FashionMNIST()
    assert {split: len(rows) for split, (_, rows) in data.splits.items()} == {
        "test": 10_000,
        "validation": 6_000,
        "train": 54_000,
    }
    images = data.splits["train"][0].images.float() / 255
    assert abs(images.mean() - FashionMNIST.mean[0]) < 1e-3
    assert abs(images.std() - FashionMNIST.std[0]) < 1e-3


def test_plain_dataset_is_deterministic(images):
    data = PlainDataset(images, lambda image: image.float(), rows=torch.tensor([4, 1]))
    assert torch.equal(data[0][0], images[4].float())
    assert data[1][1] == 1
    assert len(data) == 2


def test_images_of_16_bits_are_scaled_and_of_unknown_scale_refused(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "0.png")
    files = ImageFiles([tmp_path / "0.png"], torch.zeros(1), channels=1)
    assert np.array_equal(files[0][0].numpy(), ramp >> 8)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "1.tiff")
    with pytest.raises(ValueError, match=r"1\.tiff cannot be read \(mode F has no known largest value"):
        ImageFiles([tmp_path / "1.tiff"], torch.zeros(1), channels=1)[0]
