import pytest
import torch
from torchvision.transforms import v2

from cl_vision.transforms import (
    EvaluationTransform,
    SimCLRTransform,
    SmallGrayTransform,
    ViewTransform,
    view_seed,
)

TRANSFORMS = [
    SimCLRTransform(24),
    SimCLRTransform(24, jitter=0.5, blur=0.0),
    SmallGrayTransform(24, flip=0.5, blur=0.5, erasing=0.5),
    ViewTransform(
        v2.Compose([v2.RandomRotation(20), v2.RandomCrop(24), v2.ToDtype(torch.float32, scale=True)])
    ),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
def test_a_view_is_a_function_of_its_seed(transform, photograph):
    views = [transform(photograph, seed=seed) for seed in range(8)]
    torch.rand(3)
    again = [transform(photograph, seed=seed) for seed in reversed(range(8))][::-1]
    for view, repeated in zip(views, again, strict=True):
        assert view.shape == (3, 24, 24)
        assert view.dtype == torch.float32
        assert -1e-5 <= view.min() <= view.max() <= 1 + 1e-5
        assert torch.equal(view, repeated)
    assert not any(torch.equal(views[0], view) for view in views[1:])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
def test_global_random_state_is_untouched(transform, photograph):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    transform(photograph, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_views_are_made_on_one_thread_and_the_number_comes_back(photograph):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        ViewTransform(lambda image: (seen.append(torch.get_num_threads()), image)[1])(photograph, seed=0)
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_global_random_state_survives_an_error(photograph):
    def fail(image):
        torch.rand(1)
        raise RuntimeError("no view")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no view"):
        ViewTransform(fail)(photograph, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_view_seeds_do_not_collide():
    seeds = {view_seed(s, e, i, v) for s in range(3) for e in range(3) for i in range(300) for v in range(2)}
    assert len(seeds) == 3 * 3 * 300 * 2
    assert view_seed(0, 1, 2, 3) == view_seed(0, 1, 2, 3)


@pytest.mark.parametrize(
    "transform", [SimCLRTransform(16), SmallGrayTransform(16)], ids=["simclr", "small gray"]
)
def test_grey_images_and_floats(transform, photograph):
    grey = photograph[:1]
    assert transform(grey, seed=0).shape == (1, 16, 16)
    assert torch.allclose(transform(grey, seed=0), transform(grey.float() / 255, seed=0), atol=1e-6)


def test_digits_are_never_mirrored():
    left = torch.zeros(1, 16, 16, dtype=torch.uint8)
    left[:, :, :8] = 255
    plain = SmallGrayTransform(16, rotation=5, shear=0, contrast=0)
    for seed in range(50):
        view = plain(left, seed=seed)
        assert view[:, 4:12, :8].mean() > view[:, 4:12, 8:].mean()
    flipped = SmallGrayTransform(16, rotation=5, shear=0, contrast=0, flip=1.0)
    assert flipped(left, seed=0)[:, 4:12, :8].mean() < flipped(left, seed=0)[:, 4:12, 8:].mean()


def test_switched_off_parts_leave_the_image_alone(photograph):
    square = photograph[:, :40, :40]
    plain = SimCLRTransform(40, scale=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0, blur=0.0)
    views = torch.stack([plain(square, seed=seed) for seed in range(20)])
    assert (views - square / 255).abs().amax(dim=(1, 2, 3)).min() < 1e-6
    gray = SimCLRTransform(40, jitter=0.0, gray=1.0, blur=0.0)(square, seed=0)
    assert torch.allclose(gray[0], gray[1])
    assert torch.allclose(gray[0], gray[2])


def test_evaluation_resizes_crops_and_normalises(photograph):
    transform = EvaluationTransform(20, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    assert transform(photograph).shape == (3, 20, 20)
    white = torch.full((3, 20, 20), 255, dtype=torch.uint8)
    assert torch.allclose(transform(white).mean(dim=(1, 2)), torch.tensor([1.0, 3.0, 1.0]))
    same = EvaluationTransform(20)(white)
    assert torch.equal(same, torch.ones(3, 20, 20))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimCLRTransform(0), "size must be an integer >= 1, in pixels, got 0"),
        (lambda: SimCLRTransform(32, scale=(0.5, 0.2)), "0 < low <= high <= 1"),
        (lambda: SimCLRTransform(32, flip=1.5), r"flip must be in \[0, 1\], got 1.5"),
        (lambda: SimCLRTransform(32, jitter=3.0), "jitter must be in"),
        (lambda: SmallGrayTransform(28, erasing=-0.1), "erasing must be in"),
        (lambda: EvaluationTransform(32, mean=(0.5,), std=(0.0,)), "std > 0"),
    ],
)
def test_bad_settings_get_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_image_tensors_are_taken(photograph):
    with pytest.raises(TypeError, match=r"shape \(C, H, W\), got shape \(2, 3, 40, 48\)"):
        SimCLRTransform(16)(torch.stack([photograph] * 2), seed=0)
    with pytest.raises(TypeError, match="got str"):
        SimCLRTransform(16)("photo.jpg", seed=0)
