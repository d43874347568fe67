import pytest
import torch

from cl_vision.data import (
    Digits,
    ExponentialImbalance,
    Fraction,
    ImageArray,
    ImageData,
    IndexFile,
    LinearImbalance,
    Subset,
    write_rows,
)

LABELS = torch.arange(400) % 4
ROWS = torch.arange(400) + 7


def counts(subset, labels=LABELS, rows=ROWS):
    kept = subset.select(rows, labels)
    assert torch.equal(kept, kept.sort().values)
    return torch.bincount(labels[kept - rows[0]], minlength=int(labels.max()) + 1).tolist()


def test_linear_imbalance_keeps_more_of_later_classes():
    assert counts(LinearImbalance()) == [25, 50, 75, 100]


def test_exponential_imbalance_keeps_one_in_ratio_of_the_last_class():
    assert counts(ExponentialImbalance(ratio=50)) == [100, 27, 7, 2]
    assert counts(ExponentialImbalance(ratio=1e6))[-1] == 1


def test_fraction_keeps_as_much_of_each_class_and_of_the_unlabelled():
    assert counts(Fraction(0.1)) == [10] * 4
    kept = Fraction(0.25).select(ROWS, torch.where(LABELS == 0, -1, LABELS))
    assert torch.bincount(LABELS[kept - 7]).tolist() == [25] * 4


@pytest.mark.parametrize("kind", [LinearImbalance, ExponentialImbalance, Fraction])
def test_the_draw_depends_on_the_seed_alone(kind):
    one, same, other = (kind(seed=seed).select(ROWS, LABELS) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_rows_from_a_file(tmp_path):
    path = tmp_path / "rows.txt"
    write_rows(path, torch.tensor([9, 30, 8]))
    assert IndexFile(path).select(ROWS, LABELS).tolist() == [8, 9, 30]
    path.write_text("# three of them\n8\n\n9  # the second\n3\n")  # 3 is held out
    assert IndexFile(path).select(ROWS, LABELS).tolist() == [8, 9]


def test_every_row_of_the_source_may_be_listed(tmp_path):
    """Also when the last ones are held out, as of the digits."""
    write_rows(tmp_path / "rows.txt", torch.arange(1797))
    data = Digits(subset=IndexFile(tmp_path / "rows.txt"))
    assert len(data.train_dataset()) == len(Digits().train_dataset())
    with (tmp_path / "rows.txt").open("a") as file:
        file.write("1797\n")
    with pytest.raises(ValueError, match="lists row 1797, but there are rows 0 to 1796 only"):
        data.train_dataset()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no row"),
        ("4\n-1\n", "line 2, must be a row number"),
        ("999\n", "lists row 999, but"),
        ("9" * 30, f"lists row {'9' * 30}, but"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, text, words):
    path = tmp_path / "rows.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        IndexFile(path).select(ROWS, LABELS)


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of rows"):
        IndexFile(tmp_path / "none").select(ROWS, LABELS)
    with pytest.raises(ValueError, match="needs labelled training images"):
        LinearImbalance().select(ROWS, LABELS - 1)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        Fraction(1.5)
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        ExponentialImbalance(0.5)
    with pytest.raises(NotImplementedError, match=r"must define select\(rows, labels, total\)"):
        Subset().select(ROWS, LABELS)


def test_only_training_is_thinned_out():
    whole, thin = Digits(), Digits(subset=Fraction(0.1))
    assert len(thin.train_dataset()) == pytest.approx(0.1 * len(whole.train_dataset()), abs=10)
    for split in ("train", "validation", "test"):
        assert len(thin.evaluation_dataset(split)) == len(whole.evaluation_dataset(split))


def test_too_little_left_is_refused():
    class Two(ImageData):
        class_names = None

        def read(self):
            return {"train": ImageArray(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.zeros(9))}

    with pytest.raises(ValueError, match="has 1 training image,"):
        Two(subset=Fraction(0.01)).train_dataset()
