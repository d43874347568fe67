"""Random views of an image, and the plain one for evaluation.

A view is a pure function of (image, seed): :func:`view_seed` makes the seed from (run seed, epoch, index,
view), so the same view comes back in any worker, in any order, in any batch and after any resume, and the global
random state stays untouched.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from cl_core import _checks
from cl_vision import _pixels
from cl_vision._pixels import Floats, Range

Finish: TypeAlias = Callable[[Tensor], Tensor]  # of views (C, H, W), or of several at once (n, C, H, W)
Plan: TypeAlias = dict[str, Tensor]  # what is done to each row

_PIECE = (
    3 * 2**17
)  # numbers of the views that are worked on at once; a little more than a core's cache measured best
_SOURCE = 2**22  # at most so many numbers of their images
_NO_COLOURS = 4  # in place of the hue's place in the order of adjustments
_SIGMA = (0.1, 2.0)  # of the Gaussian blur, in pixels


def view_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """Seed of one view: a hash, so that neighbouring epochs, rows and views are unrelated."""
    words = struct.pack("<4q", seed, epoch, index, view)
    return int.from_bytes(blake2b(words, digest_size=4).digest(), "little")


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    # torchvision draws from torch's CPU generator and takes no other. Only that one is seeded and put back:
    # torch.manual_seed would also reseed the accelerators.
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Views are many short operations. To share each between threads saves little, and where the cores are busy every
    # one of them waits for the scheduler. Loader processes have one thread anyway; this is for a loader without them.
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ViewTransform:
    """Base of every random view: an image in, a random view out, all randomness from the seed.

    Args:
        pipeline: callable from an image tensor to a view, for example ``v2.Compose([...])``; it must draw its
            random numbers from torch, as all of torchvision's v2 transforms do.
    """

    def __init__(self, pipeline: Callable[[Tensor], Tensor]) -> None:
        self.pipeline = pipeline

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """One view of an image.

        Args:
            image: shape (C, H, W), uint8 in [0, 255] or floating point in [0, 1].
            seed: from :func:`view_seed`; the same seed gives the same view.

        Returns:
            The view, for this package's transforms float32 (C, size, size) in [0, 1] up to rounding.
        """
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise TypeError(f"image must be a tensor of shape (C, H, W), got {_describe(image)}.")
        with _one_thread(), _drawing_from(seed):
            return self.pipeline(image)

    def of_view(self, view: int) -> ViewTransform:
        """What makes view number ``view`` of an image: this transform, for all of them."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pipeline})"


class BatchTransform(ViewTransform, ABC):
    """Base of the views that are made for whole batches at once; one view is a batch of one.

    Bit for bit a row has the view of its own image and seed, whatever the rows beside it: random numbers are a
    function of (seed, number of the draw), and no operation's result for a row depends on other rows.
    """

    size: int

    def __init__(self) -> None:  # without a pipeline
        pass

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """One view of an image, as :class:`ViewTransform`."""
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise TypeError(f"image must be a tensor of shape (C, H, W), got {_describe(image)}.")
        with _one_thread():
            return self._views(image[None], np.array([seed % 2**64], np.uint64))[0]

    def batch(self, images: Tensor, seeds: Tensor, finish: Finish | None = None) -> Tensor:
        """One view of each of several images of one size, computed where the images are.

        Args:
            images: shape (N, C, H, W), uint8 in [0, 255] or floating point in [0, 1].
            seeds: shape (N,), int64, from :func:`view_seed`; every row has the view of its own image and seed.
            finish: applied to the views, some at a time: (n, C, size, size) to (n, ...).

        Returns:
            The views, float32 (N, C, size, size) in [0, 1] up to rounding.
        """
        _check_batch(images, seeds)
        with _one_thread():
            return self._views(images, seeds.cpu().numpy().astype(np.uint64), finish)

    def _views(self, images: Tensor, seeds: NDArray[np.uint64], finish: Finish | None = None) -> Tensor:
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating point, got {images.dtype}.")
        n, channels, height, width = images.shape
        device = images.device
        kinds, plan = self._plan(seeds, channels, height, width, device)
        if n == 1:
            drawn = self._draw(images, int(kinds[0]), plan).contiguous()
            return drawn if finish is None else finish(drawn)
        # Rows of one kind at a time, and few of them, so that what lies between two operations stays in the cache.
        order = np.argsort(kinds, kind="stable")
        kinds, rows = kinds[order], torch.from_numpy(order).to(device)
        plan = {name: values.index_select(0, rows) for name, values in plan.items()}
        most = min(_PIECE // (channels * self.size**2), _SOURCE // (channels * height * width))
        most = max(1, most) if device.type == "cpu" else n
        views: Tensor | None = None
        for part in _pieces(kinds, most):
            piece = {name: values[part] for name, values in plan.items()}
            drawn = self._draw(images.index_select(0, rows[part]), int(kinds[part.start]), piece)
            drawn = drawn if finish is None else finish(drawn)
            views = drawn.new_empty(n, *drawn.shape[1:]) if views is None else views
            views.index_copy_(0, rows[part], drawn)
        assert views is not None
        return views

    @abstractmethod
    def _plan(
        self, seeds: NDArray[np.uint64], channels: int, height: int, width: int, device: torch.device
    ) -> tuple[NDArray[np.int64], Plan]:
        """The kind of each row, and what is done to it."""

    @abstractmethod
    def _draw(self, images: Tensor, kind: int, plan: Plan) -> Tensor:
        """The views of rows of one kind."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({settings})"


class SimCLRTransform(BatchTransform):
    """SimCLR's view: random crop, flip, colour jitter, grey, blur.

    The paper's settings for CIFAR-10 are ``size=32, jitter=0.5, blur=0.0``, for ImageNet ``size=224`` and the
    defaults.

    Args:
        size: height and width of the view, in pixels.
        scale: smallest and largest share of the area that a crop keeps.
        flip: probability of a horizontal flip.
        jitter: strength s of the colour jitter (brightness, contrast, saturation 0.8 s, hue 0.2 s); 0 for
            none.
        hue: largest shift of the hue, in [0, 0.5], in place of 0.2 s.
        jitter_probability: probability of the jitter.
        gray: probability of a grey view.
        blur: probability of a Gaussian blur of a tenth of the size, sigma 0.1 to 2.

    Reference: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
    2020, arXiv 2002.05709, appendix A.
    """

    def __init__(
        self,
        size: int = 32,
        scale: Range = (0.08, 1.0),
        flip: float = 0.5,
        jitter: float = 1.0,
        jitter_probability: float = 0.8,
        gray: float = 0.2,
        blur: float = 0.5,
        hue: float | None = None,
    ) -> None:
        _check_size(size)
        _check_share("scale", scale)
        _check_probabilities(flip=flip, jitter_probability=jitter_probability, gray=gray, blur=blur)
        _check_jitter(jitter)
        if hue is not None and not 0 <= hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {hue}.")
        self.size, self.scale, self.flip, self.hue = size, scale, flip, hue
        self.jitter, self.jitter_probability, self.gray, self.blur = jitter, jitter_probability, gray, blur
        self._colours = jitter > 0 and jitter_probability > 0
        self._hue = 0.2 * jitter if hue is None else hue

    def _plan(
        self, seeds: NDArray[np.uint64], channels: int, height: int, width: int, device: torch.device
    ) -> tuple[NDArray[np.int64], Plan]:
        if channels not in (1, 3) and (self._colours or self.gray > 0):
            raise ValueError(f"images must have 1 or 3 channels for jitter and gray, got {channels}.")
        draws = _pixels.uniforms(seeds, _pixels.CROP_DRAWS + 10)
        flip, jitter, order, *factors, hue, gray, blur, sigma = draws[:, _pixels.CROP_DRAWS :].T
        boxes = _pixels.crop_boxes(draws, height, width, self.scale, (3 / 4, 4 / 3))
        plan = _resizing(boxes, self.size, flip < self.flip, device)
        tensor = partial(_tensor, device=device)
        hue_place = np.full(len(seeds), _NO_COLOURS)
        if self._colours:
            turned = self._hue > 0 and channels == 3
            number = (len(_pixels.ORDERS) * order).astype(np.int64)
            place = _pixels.HUE_PLACES[number] if turned else 3
            hue_place = np.where(jitter < self.jitter_probability, place, _NO_COLOURS)
            strength = _pixels.between(_around_one(0.8 * self.jitter), np.stack(factors, 1))
            others = _pixels.ORDERS_OF_OTHERS[number]
            plan["adjustments"] = tensor(_pixels.adjustments(others, strength, channels))
            if turned:
                # Thirds of the circle exchange the channels; what is left is at most a sixth either way.
                sixths = 6 * _pixels.between((-self._hue, self._hue), hue)
                thirds = np.rint(sixths / 2) * (self._hue > 1 / 6)
                plan["sixths"] = tensor(sixths - 2 * thirds)
                if self._hue > 1 / 6:
                    plan["channels"] = tensor((np.arange(3) - thirds.astype(np.int64)[:, None]) % 3)
        if channels == 3 and self.gray > 0:
            plan["gray"] = tensor(gray < self.gray)
        if self.blur > 0:
            plan["sigma"] = tensor(_pixels.between(_SIGMA, sigma))
        return 2 * hue_place + (blur < self.blur), plan

    def _draw(self, images: Tensor, kind: int, plan: Plan) -> Tensor:
        hue_place, blurred = divmod(kind, 2)
        planes = _crop(images, plan)
        if hue_place != _NO_COLOURS:
            for step in range(4):
                if step == hue_place:
                    if "channels" in plan:
                        planes = _pixels.exchange(planes, plan["channels"])
                    if "sixths" in plan:
                        _pixels.shift_hue_(planes, plan["sixths"])
                else:
                    _pixels.adjust_(planes, *plan["adjustments"][:, step - (step > hue_place)].unbind(1))
        if "gray" in plan:
            _pixels.gray_(planes, plan["gray"].nonzero()[:, 0])
        if blurred:
            return _pixels.blur(planes, _kernel(self.size), plan["sigma"])
        return _pixels.upright(planes)


class SmallGrayTransform(BatchTransform):
    """View for small grey images: crop, affine map, brightness and contrast; no flip unless asked for.

    A mirrored digit is another digit; for clothes (Fashion-MNIST) use ``flip=0.5``. The defaults were chosen on the
    validation images of ``Digits``, where the change of contrast matters most.

    Args:
        size: height and width of the view, in pixels.
        scale: smallest and largest share of the area that a crop keeps.
        ratio: narrowest and widest aspect ratio of a crop.
        rotation: largest rotation either way, in degrees.
        translation: largest shift either way, as a share of the size.
        zoom: smallest and largest magnification.
        shear: largest shear either way along both axes, in degrees.
        flip: probability of a horizontal flip.
        contrast: brightness and contrast are scaled by factors within 1 +- this.
        blur: probability of a Gaussian blur of a tenth of the size (at least 3 pixels), sigma 0.1 to 2.
        erasing: probability of blanking a rectangle of 2 % to 20 % of the area.
    """

    def __init__(
        self,
        size: int = 28,
        scale: Range = (0.4, 1.0),
        ratio: Range = (0.8, 1.25),
        rotation: float = 20.0,
        translation: float = 0.1,
        zoom: Range = (0.8, 1.2),
        shear: float = 15.0,
        flip: float = 0.0,
        contrast: float = 0.4,
        blur: float = 0.0,
        erasing: float = 0.0,
    ) -> None:
        _check_size(size)
        _check_share("scale", scale)
        _check_probabilities(
            translation=translation, flip=flip, contrast=contrast, blur=blur, erasing=erasing
        )
        self.size, self.scale, self.ratio, self.zoom = size, scale, ratio, zoom
        self.rotation, self.translation, self.shear, self.flip = rotation, translation, shear, flip
        self.contrast, self.blur, self.erasing = contrast, blur, erasing

    def _plan(
        self, seeds: NDArray[np.uint64], channels: int, height: int, width: int, device: torch.device
    ) -> tuple[NDArray[np.int64], Plan]:
        if channels not in (1, 3) and self.contrast > 0:
            raise ValueError(f"images must have 1 or 3 channels for contrast, got {channels}.")
        own = _pixels.CROP_DRAWS + _pixels.ERASE_DRAWS
        draws = _pixels.uniforms(seeds, own + 13)
        angle, x, y, zoom, *shear, flip, order, bright, contrast, blur, sigma, erase = draws[:, own:].T
        shift = self.translation
        maps = _pixels.affine_maps(
            _pixels.between((-self.rotation, self.rotation), angle),
            np.rint(width * _pixels.between((-shift, shift), x)),
            np.rint(height * _pixels.between((-shift, shift), y)),
            _pixels.between(self.zoom, zoom),
            *(_pixels.between((-self.shear, self.shear), part) for part in shear),
        )
        boxes = _pixels.crop_boxes(draws, height, width, self.scale, self.ratio)
        tensor = partial(_tensor, device=device)
        plan = _resizing(boxes, self.size, flip < self.flip, device) | {"maps": tensor(maps)}
        if self.contrast > 0:
            first = (order < 0.5).astype(np.int64)
            factors = _pixels.between(_around_one(self.contrast), np.stack([bright, contrast], 1))
            plan["adjustments"] = tensor(
                _pixels.adjustments(np.stack([first, 1 - first], 1), factors, channels)
            )
        if self.blur > 0:
            plan["sigma"] = tensor(_pixels.between(_SIGMA, sigma))
        if self.erasing > 0:
            boxes = _pixels.erase_boxes(draws[:, _pixels.CROP_DRAWS :], self.size, (0.02, 0.2), (0.3, 3.3))
            plan["erased"] = tensor(np.stack(boxes, 1) * (erase < self.erasing)[:, None])
        return (blur < self.blur).astype(np.int64), plan

    def _draw(self, images: Tensor, kind: int, plan: Plan) -> Tensor:
        planes = _crop(_pixels.affine(images, plan["maps"]), plan)
        if "adjustments" in plan:
            for adjustment in plan["adjustments"].unbind(1):
                _pixels.adjust_(planes, *adjustment.unbind(1))
        views = _pixels.blur(planes, _kernel(self.size), plan["sigma"]) if kind else _pixels.upright(planes)
        if "erased" in plan:
            _pixels.erase_(views, plan["erased"])
        return views


class MultiCrop(ViewTransform):
    """Views of two sizes: a few large ones, and small ones of small parts of the image, which cost little.

    With ``num_views=6`` (``--data.num_views 6``) a data set gives two large views and four small ones, in this order.

    Args:
        large: makes the first views.
        small: makes all others.
        num_large: number of large views.

    Reference: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
    2020, arXiv 2006.09882: two of 224 pixels that keep 14 % to 100 % of the area, six of 96 that keep 5 % to 14 %.
    """

    def __init__(self, large: ViewTransform, small: ViewTransform, num_large: int = 2) -> None:
        for name, part in (("large", large), ("small", small)):
            if not isinstance(part, ViewTransform) or isinstance(part, MultiCrop):
                raise TypeError(
                    f"{name} must be a ViewTransform that makes views of one size, got {type(part).__name__}."
                )
        _checks.count("num_large", num_large)
        self.large, self.small, self.num_large = large, small, num_large

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """A large view of an image, as :class:`ViewTransform`."""
        return self.large(image, seed=seed)

    def of_view(self, view: int) -> ViewTransform:
        """The large transform for the first views, else the small one."""
        return self.large if view < self.num_large else self.small

    def __repr__(self) -> str:
        return f"MultiCrop(large={self.large}, small={self.small}, num_large={self.num_large})"


class InfoMinTransform(ViewTransform):
    """InfoMin's view: random crop, flip, colour jitter, blur, RandAugment, grey; image by image.

    Views that share less: the jitter is strong, and two random operations of RandAugment (shears, shifts, rotation,
    brightness, colour, contrast, sharpness, posterisation, solarisation, equalisation) come after it.

    Args:
        size: height and width of the view, in pixels.
        scale: smallest and largest share of the area that a crop keeps.
        jitter: strength s of the colour jitter (brightness, contrast, saturation 0.8 s, hue 0.2 s).
        jitter_probability: probability of the jitter.
        blur: probability of a Gaussian blur of a tenth of the size, sigma 0.1 to 2.
        operations: of RandAugment, n.
        magnitude: of the operations, m in [0, 10], 10 for the strongest.
        gray: probability of a grey view.

    Reference: Tian et al., "What Makes for Good Views for Contrastive Learning?", NeurIPS 2020, arXiv 2005.10243.
    RandAugment is torchvision's: its list of operations, all of one magnitude and applied each time, where the
    authors' code adds inversion, spreads the magnitude by 0.5 and skips half of the operations.
    """

    def __init__(
        self,
        size: int = 32,
        scale: Range = (0.2, 1.0),
        jitter: float = 1.0,
        jitter_probability: float = 0.8,
        blur: float = 0.5,
        operations: int = 2,
        magnitude: float = 10.0,
        gray: float = 0.2,
    ) -> None:
        _check_size(size)
        _check_share("scale", scale)
        _check_probabilities(jitter_probability=jitter_probability, blur=blur, gray=gray)
        _checks.count("operations", operations, at_least=0)
        _check_jitter(jitter)
        if not 0 <= magnitude <= 10:
            raise ValueError(f"magnitude must be in [0, 10], got {magnitude}.")
        self.size, self.scale, self.jitter, self.jitter_probability = size, scale, jitter, jitter_probability
        self.blur, self.operations, self.magnitude, self.gray = blur, operations, magnitude, gray
        strength, bins = 0.8 * jitter, 31
        colours = v2.ColorJitter(strength, strength, strength, 0.2 * jitter)
        super().__init__(
            v2.Compose(
                [
                    v2.RandomResizedCrop(size, scale=scale, antialias=True),
                    v2.RandomHorizontalFlip(),
                    v2.RandomApply([colours], jitter_probability),
                    v2.RandomApply([v2.GaussianBlur(_kernel(size), _SIGMA)], blur),
                    v2.RandAugment(operations, round(magnitude / 10 * (bins - 1)), bins),
                    v2.RandomGrayscale(gray),
                    v2.ToDtype(torch.float32, scale=True),
                ]
            )
        )


class EvaluationTransform:
    """The view without randomness: shorter side to ``size``, central square, then (x - mean) / std.

    Args:
        size: height and width, in pixels.
        mean: mean of each channel for images in [0, 1]; one number serves all channels.
        std: standard deviation of each channel.
    """

    def __init__(self, size: int, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        _check_size(size)
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                f"mean and std must be of equal length, std > 0, got {tuple(mean)} and {tuple(std)}."
            )
        self.size = size
        self.mean, self.std = tuple(mean), tuple(std)
        self._centre, self._scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        """Image (C, H, W), uint8 or floating point in [0, 1], to float32 (C, size, size)."""
        image = v2.functional.to_dtype(image, torch.float32, scale=True)
        if tuple(image.shape[1:]) != (self.size, self.size):
            image = v2.functional.resize(image, [self.size], antialias=True)
            image = v2.functional.center_crop(image, [self.size, self.size])
        return self.normalize(image)

    def normalize(self, image: Tensor) -> Tensor:
        """(x - mean) / std of images (..., C, H, W), the last step of random views too: the encoder sees one scale."""
        return (image - self._centre.to(image.device)).div_(self._scale.to(image.device))

    def __repr__(self) -> str:
        return f"EvaluationTransform(size={self.size}, mean={self.mean}, std={self.std})"


def _pieces(kinds: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Slices of one kind and about equal length, at most ``most`` each."""
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    for start, stop in pairwise(edges):
        count = -(-(stop - start) // most)
        for part in range(count):
            yield slice(start + (stop - start) * part // count, start + (stop - start) * (part + 1) // count)


def _tensor(numbers: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float32) if numbers.dtype == np.float64 else numbers).to(device)


def _resizing(boxes: Sequence[Floats], size: int, mirrored: NDArray[np.bool_], device: torch.device) -> Plan:
    top, left, tall, wide = boxes
    upright = np.zeros(len(mirrored))
    both = np.stack([np.concatenate(pair) for pair in ((top, left), (tall, wide), (upright, mirrored))])
    start, length, backwards = _tensor(both, device)
    taps, weights = _pixels.resize_taps(start, length, size, _pixels.taps_needed(both[1], size), backwards)
    (rows, columns), (row_weights, column_weights) = taps.chunk(2), weights.chunk(2)
    return {"rows": rows, "row_weights": row_weights, "columns": columns, "column_weights": column_weights}


def _crop(images: Tensor, plan: Plan) -> Tensor:
    rows, columns = (plan["rows"], plan["row_weights"]), (plan["columns"], plan["column_weights"])
    return _pixels.crop(images, rows, columns)


def _around_one(strength: float) -> Range:
    return max(0.0, 1 - strength), 1 + strength


def _kernel(size: int) -> int:
    return max(3, size // 10 // 2 * 2 + 1)


def _describe(image: object) -> str:
    return f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__


def _check_batch(images: Tensor, seeds: Tensor) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        raise TypeError(f"images must be a tensor of shape (N, C, H, W), N >= 1, got {_describe(images)}.")
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.shape != images.shape[:1]:
        kind = f"{seeds.dtype} of " if isinstance(seeds, Tensor) else ""
        raise TypeError(f"seeds must be int64 of shape ({len(images)},), got {kind}{_describe(seeds)}.")


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an integer >= 1, in pixels, got {size!r}.")


def _check_share(name: str, bounds: Range) -> None:
    two = isinstance(bounds, Sequence) and len(bounds) == 2
    if not (two and 0 < bounds[0] <= bounds[1] <= 1):
        raise ValueError(f"{name} must be two numbers with 0 < low <= high <= 1, got {bounds!r:.40}.")


def _check_jitter(strength: float) -> None:
    if not 0 <= strength <= 2.5:
        raise ValueError(f"jitter must be in [0, 2.5] (hue is shifted by a fifth of it), got {strength}.")


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}.")
