import errno

import matplotlib
import numpy as np
import pytest
from PIL import Image

from cl_vision import figures


def opened(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def colours_of(pixels):
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()}


def rgb(colour):
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


@pytest.fixture
def blobs():
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    return np.eye(5)[labels] + 0.1 * generator.standard_normal((60, 5)), labels


def test_curves(tmp_path):
    steps = np.arange(50)
    path = figures.plot_curves(
        tmp_path / "new" / "curves.png",
        loss={"training": (steps, 1 / (steps + 1))},
        accuracy={"kNN": (steps[::10], steps[::10] / 50)},
        baselines={"raw pixels": 0.9},
    )
    pixels = opened(path)
    assert pixels.shape[1] > 1.5 * pixels.shape[0]
    assert rgb(figures.COLOURS[0]) in colours_of(pixels)
    alone = opened(figures.plot_curves(tmp_path / "loss.png", loss={"training": (steps, steps)}))
    assert alone.shape[1] < 0.6 * pixels.shape[1]


@pytest.mark.parametrize("projection", ["tsne", "pca"])
def test_embedding_map(tmp_path, blobs, projection):
    path = figures.plot_embedding_map(
        tmp_path / "map.png", *blobs, class_names=["ant", "bee", "cat"], projection=projection
    )
    first = opened(path)
    again = opened(
        figures.plot_embedding_map(path, *blobs, class_names=["ant", "bee", "cat"], projection=projection)
    )
    assert np.array_equal(first, again)
    permuted = opened(figures.plot_embedding_map(path, blobs[0], blobs[1][::-1], projection=projection))
    assert not np.array_equal(first, permuted)


@pytest.mark.parametrize("last", [2, 3, 24, 100000])
def test_steps_are_counted_in_whole_numbers(tmp_path, monkeypatch, last):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    curve = ([1, last], [0.3, 0.4])
    figures.plot_curves(tmp_path / "curves.png", loss={"loss": curve}, accuracy={"kNN": curve})
    figures.plot_comparison(
        tmp_path / "comparison.png", accuracies={"a": {"kNN": ([0.4], None)}}, curves={"a": [curve]}
    )
    (loss, accuracy), (_, neighbours) = (figure.axes for figure in drawn)
    for axes in (loss, accuracy, neighbours):
        ticks = [tick for tick in axes.get_xticks() if 1 <= tick <= last]
        assert len(ticks) >= 2 and all(tick == round(tick) for tick in ticks)
    assert loss.get_ylabel() == "loss"  # of any kind: not all are measured in nats


def test_embedding_map_of_unlabelled_rows(tmp_path, blobs):
    pictures = [
        opened(figures.plot_embedding_map(tmp_path / "map.png", blobs[0], labels, projection="pca"))
        for labels in (np.full(60, -1), blobs[1])
    ]
    assert [bool((pixels.max(2) - pixels.min(2) > 60).any()) for pixels in pictures] == [
        False,
        True,
    ]  # grey, colours


def test_class_names_are_drawn_as_they_are(tmp_path, blobs):
    """Dollars, a leading underscore, characters that the font lacks."""
    pictures = [
        opened(figures.plot_embedding_map(tmp_path / "map.png", *blobs, class_names=names, projection="pca"))
        for names in (["$a_$$", "_b", "\u732b"], ["$a_$$", "_c", "\u732b"], ["$a_$$", "", "\u732b"])
    ]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("projection", ["tsne", "pca"])
@pytest.mark.parametrize("rows", [3, 40])
def test_rows_that_are_all_the_same(tmp_path, projection, rows):
    path, labels = tmp_path / "map.png", np.zeros(rows)
    pixels = opened(figures.plot_embedding_map(path, np.ones((rows, 4)), labels, projection=projection))
    assert len(colours_of(pixels)) > 2  # points on the background, not an empty plane


def test_large_maps_use_evenly_spaced_rows(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        figures, "_project", lambda rows, *_: (seen.append(len(rows)), (rows[:, :2], ("a", "b")))[1]
    )
    rows = np.random.default_rng(0).standard_normal((5000, 4))
    figures.plot_embedding_map(tmp_path / "map.png", rows, np.zeros(5000))
    figures.plot_embedding_map(tmp_path / "map.png", rows, np.zeros(5000), projection="pca")
    assert seen == [2000, 5000]


def test_similarities(tmp_path):
    generator = np.random.default_rng(0)
    steps = list(range(0, 300, 10))
    samples = [np.tanh(generator.standard_normal(200) + step / 100) for step in steps]
    path = figures.plot_similarities(
        tmp_path / "s.png", steps=steps, positive=samples, negative=samples[::-1]
    )
    few = figures.plot_similarities(
        tmp_path / "f.png", steps=steps[:2], positive=samples[:2], negative=samples[:2]
    )
    assert opened(path).shape[0] > opened(few).shape[0]


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    figures.plot_curves(path, loss={"training": ([0, 1], [2, 1])})
    before = path.read_bytes()

    def fail(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        figures.plot_curves(path, loss={"training": ([0, 1], [5, 4])})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_global_state_of_matplotlib_is_untouched(tmp_path, blobs):
    import matplotlib.pyplot as plt

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    figures.plot_embedding_map(tmp_path / "map.png", *blobs, projection="pca")
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend


def test_bad_input_gets_one_sentence(tmp_path, blobs):
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match="loss must hold at least one curve"):
        figures.plot_curves(path, loss={})
    with pytest.raises(ValueError, match="curve 'training' has 2 steps and 1 values"):
        figures.plot_curves(path, loss={"training": ([0, 1], [2])})
    with pytest.raises(ValueError, match="N >= 3 and D >= 2"):
        figures.plot_embedding_map(path, np.zeros((2, 5)), np.zeros(2))
    with pytest.raises(ValueError, match=r"labels must have shape \(60,\), got \(59,\)"):
        figures.plot_embedding_map(path, blobs[0], blobs[1][1:])
    with pytest.raises(ValueError, match="must be finite"):
        figures.plot_embedding_map(path, blobs[0] * np.nan, blobs[1])
    with pytest.raises(ValueError, match="projection must be one of"):
        figures.plot_embedding_map(path, *blobs, projection="umap")
    with pytest.raises(ValueError, match="equal length, at least 1, got 0, 0 and 0"):
        figures.plot_similarities(path, steps=[], positive=[], negative=[])
    assert not path.exists()


def test_comparison(tmp_path, monkeypatch):
    accuracies = {
        "loss A": {"kNN": ([0.5, 0.6], (0.3, 0.8)), "linear probe": ([0.7, 0.7], None)},
        "loss $B$": {"kNN": ([0.4], None), "linear probe": ([0.5], None), "classifier": ([0.6], None)},
    }
    alone = opened(figures.plot_comparison(tmp_path / "alone.png", accuracies=accuracies))
    curves = {"loss A": [([1, 2], [0.2, 0.5])], "loss $B$": [([], [])]}
    path = figures.plot_comparison(tmp_path / "both.png", accuracies=accuracies, curves=curves)
    both = opened(path)
    assert both.shape[1] > 1.8 * alone.shape[1]
    assert {rgb(figures.COLOURS[0]), rgb(figures.COLOURS[1])} <= colours_of(both)
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    for settings in (1, 2, 12):
        given = {
            f"a long name of a setting, number {place}": accuracies["loss A"] for place in range(settings)
        }
        figures.plot_comparison(tmp_path / "many.png", accuracies=given)
        drawn[-1].draw_without_rendering()
        label = drawn[-1].axes[0].xaxis.label.get_window_extent()
        (legend,) = drawn[-1].legends
        assert drawn[-1].bbox.x0 <= label.x0 and label.x1 <= drawn[-1].bbox.x1  # nothing is cut off
        assert legend.get_window_extent().y1 < label.y0
    five = {f"probe {place}": ([0.5], None) for place in range(5)}
    figures.plot_comparison(tmp_path / "five.png", accuracies={"A": five, "B": five})
    heights = sorted(line.get_ydata()[0] for line in drawn[-1].axes[0].lines)
    assert max(heights[:5]) < 0.5 < min(heights[5:])  # those of one setting lie beside it
    with pytest.raises(ValueError, match="accuracies must hold at least one setting"):
        figures.plot_comparison(tmp_path / "none.png", accuracies={})
