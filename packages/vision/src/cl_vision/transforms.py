"""Random views of an image, and the plain one for evaluation.

A view is a pure function of (image, seed): :func:`view_seed` makes the seed from (run seed, epoch, index,
view), so the same view comes back in any worker, in any order and after any resume, and the global random
state stays untouched.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor
from torchvision.transforms import v2

Range = tuple[float, float]


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
    # One image is too small to share: waking other threads for it costs more than it saves, many times over where
    # the cores are busy. Loader processes have one thread anyway; this is for a loader without them.
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pipeline})"


class SimCLRTransform(ViewTransform):
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
        if not 0 <= jitter <= 2.5:
            raise ValueError(f"jitter must be in [0, 2.5] (hue is shifted by a fifth of it), got {jitter}.")
        if hue is not None and not 0 <= hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {hue}.")
        self.size, self.scale, self.flip, self.hue = size, scale, flip, hue
        self.jitter, self.jitter_probability, self.gray, self.blur = jitter, jitter_probability, gray, blur
        steps: list[Callable[[Tensor], Tensor]] = [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomResizedCrop(size, scale=scale, antialias=True),
        ]
        if flip > 0:
            steps.append(v2.RandomHorizontalFlip(flip))
        if jitter > 0 and jitter_probability > 0:
            colour = v2.ColorJitter(*[0.8 * jitter] * 3, 0.2 * jitter if hue is None else hue)
            steps.append(v2.RandomApply([colour], p=jitter_probability))
        if gray > 0:
            steps.append(v2.RandomGrayscale(gray))
        if blur > 0:
            steps.append(v2.RandomApply([_blur(size)], p=blur))
        super().__init__(v2.Compose(steps))


class SmallGrayTransform(ViewTransform):
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
        steps: list[Callable[[Tensor], Tensor]] = [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomAffine(
                rotation,
                translate=(translation, translation),
                scale=zoom,
                shear=(-shear, shear, -shear, shear),
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.RandomResizedCrop(size, scale=scale, ratio=ratio, antialias=True),
        ]
        if flip > 0:
            steps.append(v2.RandomHorizontalFlip(flip))
        if contrast > 0:
            steps.append(v2.ColorJitter(brightness=contrast, contrast=contrast))
        if blur > 0:
            steps.append(v2.RandomApply([_blur(size)], p=blur))
        if erasing > 0:
            steps.append(v2.RandomErasing(erasing, scale=(0.02, 0.2)))
        super().__init__(v2.Compose(steps))


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
        """(x - mean) / std, the last step of random views as well, so that the encoder sees one scale."""
        return (image - self._centre) / self._scale

    def __repr__(self) -> str:
        return f"EvaluationTransform(size={self.size}, mean={self.mean}, std={self.std})"


def _blur(size: int) -> v2.GaussianBlur:
    return v2.GaussianBlur(kernel_size=max(3, size // 10 // 2 * 2 + 1), sigma=(0.1, 2.0))


def _describe(image: object) -> str:
    return f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an integer >= 1, in pixels, got {size!r}.")


def _check_share(name: str, bounds: Range) -> None:
    low, high = bounds
    if not 0 < low <= high <= 1:
        raise ValueError(f"{name} must be two numbers with 0 < low <= high <= 1, got {tuple(bounds)}.")


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}.")
