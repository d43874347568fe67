import copy
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from cl_vision import _pixels
from cl_vision.transforms import (
    EvaluationTransform,
    InfoMinTransform,
    MultiCrop,
    SimCLRTransform,
    SmallGrayTransform,
    ViewTransform,
    view_seed,
)

TRANSFORMS = [
    SimCLRTransform(24),
    SimCLRTransform(24, jitter=0.5, blur=0.0),
    SmallGrayTransform(24, flip=0.5, blur=0.5, erasing=0.5),
    InfoMinTransform(24),
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
    plain = SmallGrayTransform(16, scale=(0.7, 1.0), rotation=5, shear=0, contrast=0)
    for seed in range(50):
        view = plain(left, seed=seed)
        assert view[:, 4:12, :8].mean() > view[:, 4:12, 8:].mean()
    flipped = SmallGrayTransform(16, scale=(0.7, 1.0), rotation=5, shear=0, contrast=0, flip=1.0)
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


def test_batches_are_checked(photograph):
    transform, images = SimCLRTransform(16), torch.stack([photograph] * 2)
    with pytest.raises(TypeError, match=r"shape \(N, C, H, W\), N >= 1, got shape \(3, 40, 48\)"):
        transform.batch(photograph, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match=r"int64 of shape \(2,\), got torch.int64 of shape \(3,\)"):
        transform.batch(images, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match=r"int64 of shape \(2,\), got list"):
        transform.batch(images, [0, 1])
    with pytest.raises(TypeError, match=r"uint8 or floating point, got torch.int64"):
        transform.batch(images.long(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="1 or 3 channels for jitter and gray, got 2"):
        transform.batch(images[:, :2], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="1 or 3 channels for contrast, got 2"):
        SmallGrayTransform(16)(photograph[:2], seed=0)
    plain = SimCLRTransform(16, jitter=0.0, gray=0.0)
    assert plain.batch(images[:, :2], torch.tensor([0, 1])).shape == (2, 2, 16, 16)


# Numbers


def test_numbers_are_splitmix64():
    # The first outputs of the published generator from state 0, which is the mixed seed 0.
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    drawn = _pixels.uniforms(np.zeros(1, np.uint64), 3)
    assert drawn.tolist() == [[(word >> 11) * 2.0**-53 for word in known]]


def test_seeds_a_step_of_the_counter_apart_share_no_numbers():
    seeds = np.array([7, 7 + 0x9E3779B97F4A7C15], np.uint64)
    assert not set.intersection(*map(set, _pixels.uniforms(seeds, 40).tolist()))


def test_numbers_are_uniform_and_unrelated():
    drawn = _pixels.uniforms(np.arange(4000, dtype=np.uint64), 40)
    assert drawn.min() >= 0 and drawn.max() < 1
    places = (np.arange(4000) + 0.5) / 4000
    # 1.95 / sqrt(n) is Kolmogorov's 0.1 % bound.
    assert np.abs(np.sort(drawn, 0) - places[:, None]).max() < 1.95 / math.sqrt(4000) * 1.2
    table = np.corrcoef(np.concatenate([drawn, drawn[np.arange(4000) - 1]], 1).T) - np.eye(80)
    assert np.abs(table).max() < 5.5 / math.sqrt(4000)


def params(transform, count, image, *names):
    """Parameters as torchvision draws them, shape (count, names)."""
    torch.manual_seed(0)
    drawn = [transform.make_params([image]) for _ in range(count)]
    return np.array([[float(one[name]) for name in names] for one in drawn])


def same_distribution(ours, theirs):
    """Kolmogorov and Smirnov's distance at its 0.1 % bound."""
    places = np.sort(np.concatenate([ours, theirs]))
    shares = [
        np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (ours, theirs)
    ]
    assert np.abs(shares[0] - shares[1]).max() < 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))


# The narrow image often, the flat one always, falls back on the largest central box.
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 48), (100, 20), (8, 96)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    theirs = params(
        v2.RandomResizedCrop(32, scale=(0.2, 1.0)),
        4000,
        torch.zeros(3, height, width),
        *("top", "left", "height", "width"),
    )
    draws = _pixels.uniforms(np.arange(4000, dtype=np.uint64), _pixels.CROP_DRAWS)
    ours = np.stack(_pixels.crop_boxes(draws, height, width, (0.2, 1.0), (3 / 4, 4 / 3)), 1)
    for column in range(4):
        same_distribution(ours[:, column], theirs[:, column])
    for derived in (lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 3] / box[:, 2]):
        same_distribution(derived(ours), derived(theirs))
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


def test_erased_boxes_are_distributed_as_torchvisions():
    names = ("i", "j", "h", "w")
    theirs = params(v2.RandomErasing(1.0, scale=(0.02, 0.2)), 4000, torch.zeros(3, 28, 28), *names)
    draws = _pixels.uniforms(np.arange(4000, dtype=np.uint64), _pixels.ERASE_DRAWS)
    ours = np.stack(_pixels.erase_boxes(draws, 28, (0.02, 0.2), (0.3, 3.3)), 1)
    for column in range(4):
        same_distribution(ours[:, column], theirs[:, column])


def test_a_box_that_never_fits_erases_nothing():
    draws = _pixels.uniforms(np.arange(50, dtype=np.uint64), _pixels.ERASE_DRAWS)
    assert np.stack(_pixels.erase_boxes(draws, 28, (1.0, 1.0), (0.3, 3.3)))[2:].max() == 0


# Steps, against torchvision's


def on_their_side(images):
    return images.transpose(0, 1).mT.contiguous()


@pytest.fixture
def colours():
    """Random images (6, 3, 20, 20), some of them of few values, so that channels are equal, black or white."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 20, 20, generator=generator)
    images[3:] = (3 * images[3:]).round() / 3
    images[5, 1:] = images[5, :1]
    return images


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [16, 40, 64])
@pytest.mark.parametrize(
    "box", [(0, 0, 40, 48), (3, 5, 20, 30), (10, 20, 1, 1), (0, 0, 40, 7), (2, 1, 33, 47), (39, 47, 1, 1)]
)
def test_crop(photograph, box, size, mirrored):
    noise = torch.randint(0, 256, photograph.shape, generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    images = torch.stack([photograph, noise])
    top, left, height, width = (torch.tensor([float(side)] * 2) for side in box)
    flips = torch.tensor([float(mirrored)] * 2)
    count = _pixels.taps_needed(np.array([box[2:]]), size)
    rows = _pixels.resize_taps(top, height, size, count, 0 * flips)
    columns = _pixels.resize_taps(left, width, size, count, flips)
    found = _pixels.upright(_pixels.crop(images, rows, columns))
    expected = functional.resized_crop(images / 255, *box, [size, size], antialias=True)
    expected = functional.horizontal_flip(expected) if mirrored else expected
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.8])
def test_brightness_contrast_and_saturation(colours, factor, channels):
    steps = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
    images = colours[:, :channels]
    order = np.tile(np.arange(3)[:, None], (1, len(images)))  # an adjustment a row, its kind by the turn
    for kind, step in enumerate(steps):
        numbers = _pixels.adjustments(order[kind][:, None], np.full((len(images), 3), factor), channels)
        planes = on_their_side(images)
        _pixels.adjust_(planes, *torch.from_numpy(numbers)[:, 0].unbind(1))
        expected = torch.stack([step(image, factor) for image in images])
        assert torch.allclose(_pixels.upright(planes), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sixths", [-1.0, -0.6, 0.0, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("thirds", [-1, 0, 1])
def test_hue(colours, sixths, thirds):
    planes = on_their_side(colours)
    channels = (torch.arange(3) - thirds).remainder(3).expand(len(colours), -1)
    planes = _pixels.exchange(planes, channels)
    _pixels.shift_hue_(planes, torch.full((len(colours),), sixths))
    shift = thirds / 3 + sixths / 6
    expected = functional.adjust_hue(colours, shift - round(shift))
    assert torch.allclose(_pixels.upright(planes), expected, rtol=0, atol=1e-5)


def test_gray(colours):
    planes = on_their_side(colours)
    _pixels.gray_(planes, torch.tensor([0, 4]))
    expected = functional.rgb_to_grayscale(colours, 3)
    for row in range(len(colours)):
        same = expected[row] if row in (0, 4) else colours[row]
        assert torch.allclose(_pixels.upright(planes)[row], same, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "kernel"), [(20, 3), (20, 9), (4, 3), (2, 3)])
def test_blur(colours, size, kernel):
    sigmas = torch.tensor([0.1, 0.2, 0.5, 1.0, 1.7, 2.0])
    images = colours[..., :size, :size]
    found = _pixels.blur(on_their_side(images), kernel, sigmas)
    pairs = zip(images, sigmas.tolist(), strict=True)
    expected = torch.stack(
        [functional.gaussian_blur(image, [kernel] * 2, [sigma] * 2) for image, sigma in pairs]
    )
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_affine(photograph):
    images = torch.stack([photograph, photograph.flip(1)])
    settings = [(17.0, 4.0, -3.0, 1.2, 12.0, -7.0), (-20.0, 0.0, 2.0, 0.8, -15.0, 15.0)]
    maps = _pixels.affine_maps(*np.array(settings).T)
    found = _pixels.affine(images, torch.from_numpy(maps).float())
    for image, view, (angle, x, y, zoom, *shear) in zip(images, found, settings, strict=True):
        expected = functional.affine(
            image / 255, angle, [x, y], zoom, shear, interpolation=v2.InterpolationMode.BILINEAR, fill=0
        )
        assert torch.allclose(view, expected, rtol=0, atol=2e-5)


def test_erase(colours):
    boxes = torch.tensor(
        [[0, 0, 0, 0], [3, 5, 7, 2], [0, 0, 20, 20], [19, 19, 1, 1], [4, 0, 3, 20], [1, 2, 0, 4]]
    )
    erased = colours.clone()
    _pixels.erase_(erased, boxes)
    for view, image, box in zip(erased, colours, boxes.tolist(), strict=True):
        assert torch.equal(view, functional.erase(image, *box, torch.zeros(1)))


# Views, against torchvision's operations one by one


def simclr_by_hand(transform, image, seed):
    """The view of a seed by torchvision's operations, from the same numbers."""
    draws = _pixels.uniforms(np.array([seed], np.uint64), _pixels.CROP_DRAWS + 10)
    box = [
        int(side[0]) for side in _pixels.crop_boxes(draws, *image.shape[1:], transform.scale, (3 / 4, 4 / 3))
    ]
    flip, jitter, order, *factors, hue, gray, blur, sigma = draws[0, _pixels.CROP_DRAWS :].tolist()
    view = functional.resized_crop(image / 255, *box, [transform.size] * 2, antialias=True)
    if flip < transform.flip:
        view = functional.horizontal_flip(view)
    if jitter < transform.jitter_probability:
        s = transform.jitter
        low, high = max(0, 1 - 0.8 * s), 1 + 0.8 * s
        largest = 0.2 * s if transform.hue is None else transform.hue
        values = [low + (high - low) * factor for factor in factors] + [largest * (2 * hue - 1)]
        names = ("brightness", "contrast", "saturation", "hue")
        for step in _pixels.ORDERS[int(24 * order)]:
            view = getattr(functional, f"adjust_{names[step]}")(view, values[step])
    if gray < transform.gray:
        view = functional.rgb_to_grayscale(view, len(view))
    if blur < transform.blur:
        kernel = max(3, transform.size // 10 // 2 * 2 + 1)
        view = functional.gaussian_blur(view, [kernel] * 2, [0.1 + 1.9 * sigma] * 2)
    return view


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "transform",
    [
        SimCLRTransform(24),
        SimCLRTransform(24, jitter=0.5, gray=0.0, blur=0.0),
        SimCLRTransform(56, hue=0.5, scale=(0.5, 1.0)),
        SimCLRTransform(12, hue=0.0, flip=1.0, blur=1.0),
    ],
    ids=["default", "cifar", "enlarged", "shrunk"],
)
def test_a_view_is_torchvisions_operations_one_by_one(transform, photograph, channels):
    seeds = torch.arange(100, 160)
    views = transform.batch(photograph[:channels].expand(len(seeds), -1, -1, -1), seeds)
    for view, seed in zip(views, seeds.tolist(), strict=True):
        expected = simclr_by_hand(transform, photograph[:channels], seed)
        # Where a contrast or two have grown rounding errors.
        assert torch.allclose(view, expected, rtol=0, atol=2e-5)


def small_gray_by_hand(transform, image, seed):
    """As simclr_by_hand."""
    own = _pixels.CROP_DRAWS + _pixels.ERASE_DRAWS
    draws = _pixels.uniforms(np.array([seed], np.uint64), own + 13)
    box = [
        int(side[0]) for side in _pixels.crop_boxes(draws, *image.shape[1:], transform.scale, transform.ratio)
    ]
    angle, x, y, zoom, *shear, flip, order, bright, contrast, blur, sigma, erase = draws[0, own:].tolist()
    either_way = transform.rotation, transform.translation, transform.shear, transform.contrast
    rotation, translation, slant, change = either_way
    view = functional.affine(
        image / 255,
        rotation * (2 * angle - 1),
        [
            round(side * translation * (2 * draw - 1))
            for side, draw in zip(image.shape[:0:-1], (x, y), strict=True)
        ],
        transform.zoom[0] + (transform.zoom[1] - transform.zoom[0]) * zoom,
        [slant * (2 * draw - 1) for draw in shear],
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=0,
    )
    view = functional.resized_crop(view, *box, [transform.size] * 2, antialias=True)
    if flip < transform.flip:
        view = functional.horizontal_flip(view)
    steps = [(functional.adjust_brightness, bright), (functional.adjust_contrast, contrast)]
    for step, draw in steps if order >= 0.5 else steps[::-1]:
        view = step(view, 1 + change * (2 * draw - 1))
    if blur < transform.blur:
        kernel = max(3, transform.size // 10 // 2 * 2 + 1)
        view = functional.gaussian_blur(view, [kernel] * 2, [0.1 + 1.9 * sigma] * 2)
    if erase < transform.erasing:
        draws = draws[:, _pixels.CROP_DRAWS :]
        top, left, tall, wide = (
            int(side[0]) for side in _pixels.erase_boxes(draws, transform.size, (0.02, 0.2), (0.3, 3.3))
        )
        view = functional.erase(view, top, left, tall, wide, torch.zeros(1))
    return view


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 40])
def test_a_small_gray_view_is_torchvisions_operations_one_by_one(size, channels, photograph):
    transform = SmallGrayTransform(size, flip=0.5, blur=0.5, erasing=0.5)
    seeds, image = torch.arange(100, 160), photograph[:channels]
    views = transform.batch(image.expand(len(seeds), -1, -1, -1), seeds)
    for view, seed in zip(views, seeds.tolist(), strict=True):
        assert torch.allclose(view, small_gray_by_hand(transform, image, seed), rtol=0, atol=5e-5)


def test_choices_come_as_often_as_they_should(photograph):
    seeds = torch.arange(600)
    images = photograph[:, :24, :24].expand(len(seeds), -1, -1, -1)
    none = {"jitter": 0.0, "gray": 0.0, "blur": 0.0, "flip": 0.0}
    crops = SimCLRTransform(24, **none).batch(images, seeds)
    for chosen, share in (
        ({"flip": 0.3}, 0.3),
        ({"gray": 0.2}, 0.2),
        ({"jitter": 1.0, "jitter_probability": 0.8}, 0.8),
    ):
        views = SimCLRTransform(24, **none | chosen).batch(images, seeds)
        changed = (views - crops).abs().amax((1, 2, 3)) > 1e-4
        assert abs(changed.float().mean() - share) < 3.3 * math.sqrt(share * (1 - share) / len(seeds))


def test_every_order_of_the_jitter_is_as_likely():
    assert len({tuple(order) for order in _pixels.ORDERS}) == 24
    draws = _pixels.uniforms(np.arange(6000, dtype=np.uint64), _pixels.CROP_DRAWS + 10)[
        :, _pixels.CROP_DRAWS + 2
    ]
    counts = np.bincount((24 * draws).astype(int), minlength=24)
    assert ((counts - 250) ** 2 / 250).sum() < 49.7  # 0.1 % of chi squared with 23 degrees of freedom


# Batches


@pytest.fixture
def threads():
    """Function that sets the number of threads, which is put back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 32, 32), 32), ((3, 37, 29), 20), ((1, 28, 28), 28), ((3, 64, 50), 15), ((3, 9, 9), 200)],
)
@pytest.mark.parametrize("kind", [SimCLRTransform, SmallGrayTransform])
def test_a_row_is_the_same_in_any_batch(kind, shape, size, threads):
    transform = kind(size) if kind is SimCLRTransform else kind(size, flip=0.5, blur=0.5, erasing=0.5)
    generator = torch.Generator().manual_seed(0)
    count = 9 if size > 100 else 40
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    seeds = torch.randint(0, 2**32, (count,), generator=generator)
    threads(1)
    together = transform.batch(images, seeds)
    assert together.is_contiguous()
    alone = [transform(image, seed=int(seed)) for image, seed in zip(images, seeds, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    threads(2)
    order = torch.randperm(count, generator=generator)
    parts = [transform.batch(images[rows], seeds[rows]) for rows in order.split(7)]
    assert torch.equal(together[order], torch.cat(parts))
    assert torch.equal(together, transform.batch(images, seeds))
    assert torch.get_num_threads() == 2


def test_views_are_finished_in_the_batch_as_alone(photograph):
    transform, plain = (
        SimCLRTransform(24),
        EvaluationTransform(24, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)),
    )
    images, seeds = torch.stack([photograph] * 5), torch.arange(5)
    finished = transform.batch(images, seeds, plain.normalize)
    assert torch.equal(finished, plain.normalize(transform.batch(images, seeds)))
    half = transform.batch(images, seeds, lambda views: views[..., :12].half())
    assert half.shape == (5, 3, 24, 12) and half.dtype == torch.float16


def test_a_transform_says_its_settings_and_can_be_copied(photograph):
    transform = SimCLRTransform(24, hue=0.1)
    assert "size=24" in repr(transform) and "hue=0.1" in repr(transform)
    assert torch.equal(copy.deepcopy(transform)(photograph, seed=3), transform(photograph, seed=3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transform", TRANSFORMS[:3], ids=lambda transform: type(transform).__name__)
def test_views_are_made_where_the_images_are(transform, photograph):
    images, seeds = torch.stack([photograph] * 16), torch.arange(16)
    views = transform.batch(images.cuda(), seeds)
    assert views.device.type == "cuda"
    assert torch.allclose(views.cpu(), transform.batch(images, seeds), rtol=0, atol=1e-4)


def test_multi_crop_makes_large_views_first(photograph):
    large, small = SimCLRTransform(24), SimCLRTransform(12, scale=(0.05, 0.14))
    crops = MultiCrop(large, small)
    assert [crops.of_view(view) for view in range(4)] == [large, large, small, small]
    assert torch.equal(crops(photograph, seed=3), large(photograph, seed=3))
    assert "num_large=2" in repr(crops) and "size=12" in repr(crops)
    with pytest.raises(
        TypeError, match="small must be a ViewTransform that makes views of one size, got MultiCrop"
    ):
        MultiCrop(large, crops)
    with pytest.raises(ValueError, match="num_large must be at least 1, got 0"):
        MultiCrop(large, small, num_large=0)


def test_infomin_without_its_operations_is_a_jittered_crop(photograph):
    plain = InfoMinTransform(24, jitter=0.0, operations=0, gray=0.0, blur=0.0, scale=(1.0, 1.0))
    strong = InfoMinTransform(24, jitter=0.0, operations=2, gray=0.0, blur=0.0, scale=(1.0, 1.0))
    mild = InfoMinTransform(24, jitter=0.0, operations=2, magnitude=0.0, gray=0.0, blur=0.0, scale=(1.0, 1.0))
    change = [
        sum((transform(photograph, seed=s) - plain(photograph, seed=s)).abs().mean() for s in range(20))
        for transform in (mild, strong)
    ]
    assert change[1] > 2 * change[0]
    gray = InfoMinTransform(16)(photograph[:1], seed=0)
    assert gray.shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"magnitude": 11.0}, r"magnitude must be in \[0, 10\], got 11.0"),
        ({"operations": -1}, "operations must be at least 0, got -1"),
        ({"jitter": 3.0}, r"jitter must be in \[0, 2.5\]"),
        ({"scale": (0.0, 1.0)}, "scale must be two numbers"),
        ({"scale": (0.2,)}, r"scale must be two numbers .* got \(0\.2,\)"),
        ({"scale": 0.5}, r"scale must be two numbers .* got 0\.5"),
    ],
)
def test_infomin_refuses_what_it_cannot_do(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        InfoMinTransform(24, **options)
