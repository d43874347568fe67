"""Random views of many images at once: numbers drawn by row, and the tensor operations of the transforms.

Every row of a batch is computed from its own image and its own numbers, with operations whose result for a row does not
depend on the rows beside it, so a view is bit for bit the same alone and in any batch.

The transforms handle pixels as *planes*: float32 of shape (C, n, size, size), each channel of all images in one piece,
so that arithmetic between channels runs over long contiguous rows. After :func:`crop` the planes lie on their side,
(C, n, columns, rows); for colours that means nothing, and :func:`blur` and :func:`upright` bring them back.

Interpolation and blur are weighted sums of few rows of pixels ("taps"): torch's ``embedding_bag`` is the kernel for
that, and reads and writes every pixel once an axis, where dense matrices multiply mostly zeros.
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Range = tuple[float, float]

CROP_DRAWS = 22  # ten pairs of area and aspect ratio, and a corner
ERASE_DRAWS = 22
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(permutations(range(4))))  # of brightness, contrast, saturation and hue
HUE_PLACES = (ORDERS == HUE).argmax(1)
ORDERS_OF_OTHERS = ORDERS[ORDERS != HUE].reshape(-1, 3)


# Numbers of a row


def uniforms(seeds: NDArray[np.uint64], count: int) -> Floats:
    """Numbers in [0, 1), each a function of its row's seed and its column only.

    Column k of a row is the k-th output of SplitMix64 started at the mixed seed (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014), which is a hash of a counter.

    Args:
        seeds: shape (N,).
        count: numbers a row.

    Returns:
        Shape (N, count).
    """
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mixed(_mixed(seeds)[:, None] + counter) >> np.uint64(11)) * 2.0**-53


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def between(bounds: Range, draws: Floats) -> Floats:
    """Numbers in [0, 1) stretched to [low, high)."""
    low, high = bounds
    return low + (high - low) * draws


def crop_boxes(draws: Floats, height: int, width: int, scale: Range, ratio: Range) -> tuple[Floats, ...]:
    """Boxes distributed as those of torchvision's ``RandomResizedCrop``.

    Args:
        draws: shape (N, CROP_DRAWS).
        height: of the images.
        width: of the images.
        scale: smallest and largest share of the area.
        ratio: narrowest and widest aspect ratio, width over height.

    Returns:
        Top, left, height and width, each of shape (N,).
    """
    heights, widths = _boxes(draws, height * width, scale, ratio)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    # Ten misses: the largest central box of an allowed ratio.
    widest, tallest = width, height
    if width / height < min(ratio):
        tallest = round(width / min(ratio))
    elif width / height > max(ratio):
        widest = round(height * max(ratio))
    found, (h, w) = _first(fits, heights, widths)
    h, w = np.where(found, h, tallest), np.where(found, w, widest)
    top = np.where(found, np.floor(draws[:, 20] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(draws[:, 21] * (width - w + 1)), (width - w) // 2)
    return top, left, h, w


def erase_boxes(draws: Floats, size: int, scale: Range, ratio: Range) -> tuple[Floats, ...]:
    """Boxes distributed as those of torchvision's ``RandomErasing``, empty after ten misses; as crop_boxes."""
    widths, heights = _boxes(draws, size * size, scale, ratio)
    found, (h, w) = _first((heights < size) & (widths < size), heights, widths)
    top, left = np.floor(draws[:, 20] * (size - h + 1)), np.floor(draws[:, 21] * (size - w + 1))
    return top, left, np.where(found, h, 0), np.where(found, w, 0)


def _boxes(draws: Floats, area: int, scale: Range, ratio: Range) -> tuple[Floats, Floats]:
    """Ten tries (N, 10): the sides across and along the ratio."""
    areas = area * between(scale, draws[:, 0:20:2])
    ratios = np.exp(between((math.log(ratio[0]), math.log(ratio[1])), draws[:, 1:20:2]))
    return np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))


def _first(fits: NDArray[np.bool_], *values: Floats) -> tuple[NDArray[np.bool_], list[Floats]]:
    """Whether any try fits, and the values of the first that does."""
    rows, tries = np.arange(len(fits)), fits.argmax(1)
    return fits[rows, tries], [value[rows, tries] for value in values]


def affine_maps(
    angle: Floats, shift_x: Floats, shift_y: Floats, zoom: Floats, shear_x: Floats, shear_y: Floats
) -> Floats:
    """Maps from places in the view to places in the image, from the centre and in pixels.

    The inverse of torchvision's: shift of the image after rotation, zoom and shear, angles in degrees.

    Returns:
        Shape (N, 2, 3).
    """
    turn, sx, sy = np.radians(angle), np.radians(shear_x), np.radians(shear_y)
    a, c = np.cos(turn - sy) / np.cos(sy), np.sin(turn - sy) / np.cos(sy)
    b, d = -(a * np.tan(sx) + np.sin(turn)), np.cos(turn) - c * np.tan(sx)
    xx, xy, yx, yy = d / zoom, -b / zoom, -c / zoom, a / zoom
    rows = [xx, xy, -xx * shift_x - xy * shift_y], [yx, yy, -yx * shift_x - yy * shift_y]
    return np.stack([np.stack(row, 1) for row in rows], 1)


def adjustments(order: NDArray[np.int64], factors: Floats, channels: int) -> NDArray[np.float32]:
    """What :func:`adjust_` needs for one adjustment after the other.

    Args:
        order: BRIGHTNESS, CONTRAST and SATURATION, or some of them, in each row's order, shape (N, S).
        factors: of brightness, contrast and saturation, shape (N, 3), or some of them.
        channels: of the images; grey ones have no saturation.

    Returns:
        Factor, share of the gray image and share of its mean, shape (N, S, 3).
    """
    factor = np.take_along_axis(factors, order, 1)
    if channels == 1:
        factor = np.where(order == SATURATION, 1.0, factor)
    rest = 1 - factor
    return np.stack([factor, rest * (order == SATURATION), rest * (order == CONTRAST)], 2).astype(np.float32)


# Taps


def resize_taps(
    start: Tensor, length: Tensor, size: int, count: int, mirrored: Tensor
) -> tuple[Tensor, Tensor]:
    """Taps that resize ``length`` pixels from ``start`` on to ``size``: bilinear, antialiased where they shrink.

    Args:
        start: first pixel, shape (n,), float32.
        length: number of pixels, shape (n,), float32.
        size: number of pixels wanted.
        count: K, pixels under the widest filter, from :func:`taps_needed`.
        mirrored: 1 for rows that are read backwards, else 0, shape (n,), float32.

    Returns:
        Pixels and their weights, both (n, size, K).
    """
    start, length, mirrored = (number[:, None] for number in (start, length, mirrored))
    stride = length / size
    reach = stride.clamp(min=1)
    place = torch.arange(size, device=start.device) + 0.5
    centre = (place + mirrored * (size - 2 * place)) * stride
    first = (centre - reach + 0.5).floor_().clamp_(min=0)
    taps = first + torch.arange(count, device=start.device)[:, None, None]
    weights = (1 - (taps + 0.5 - centre).div_(reach).abs_()).clamp_(min=0)
    weights *= (length - taps).clamp_(0, 1)  # none beyond the box
    weights /= sum(weights)  # one after the other: the same bits for any number of zeros at the end
    taps = torch.minimum(taps, length - 1).add_(start)
    shape = (*centre.shape, count)
    return (
        torch.empty(shape, dtype=torch.int64, device=start.device).copy_(taps.permute(1, 2, 0)),
        torch.empty(shape, device=start.device).copy_(weights.permute(1, 2, 0)),
    )


def taps_needed(length: Floats, size: int) -> int:
    """Most pixels under the filter that resizes any of these lengths to ``size``."""
    return math.ceil(2 * max(1.0, float(length.max()) / size))


def _tapped(planes: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows: planes (C, n, A, B), taps and weights (n, size, K) to (C, n, size, B)."""
    channels, n, height, width = planes.shape
    size, count = taps.shape[1:]
    firsts = torch.arange(channels * n, device=planes.device).mul_(height).view(channels, n, 1, 1)
    sums = F.embedding_bag(
        (taps + firsts).view(-1, count),
        planes.contiguous().view(-1, width),  # of other strides torch sums by another way
        mode="sum",
        per_sample_weights=weights.expand(channels, -1, -1, -1).reshape(-1, count),
    )
    return sums.view(channels, n, size, width)


# Pixels


def crop(images: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """Cut a box out of every image and resize it.

    Args:
        images: shape (n, C, H, W), uint8 in [0, 255] or floating point in [0, 1].
        rows: taps and weights along the height, (n, size, K).
        columns: taps and weights along the width.

    Returns:
        Planes (C, n, size, size) on their side.
    """
    planes = images.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    taps, weights = rows
    planes = _tapped(planes, taps, weights / 255 if images.dtype == torch.uint8 else weights)
    return _tapped(planes.mT, *columns)


def upright(planes: Tensor) -> Tensor:
    """Planes (C, n, size, size) on their side as images (n, C, size, size), not contiguous."""
    return planes.permute(1, 0, 3, 2)


def blur(planes: Tensor, kernel: int, sigma: Tensor) -> Tensor:
    """Gaussian blur, reflected at the edges.

    Args:
        planes: shape (C, n, size, size), on their side.
        kernel: odd number of pixels.
        sigma: shape (n,).

    Returns:
        Images (n, C, size, size), not contiguous.
    """
    n, size = planes.shape[1:3]
    # As torchvision's: so wide that the outermost pixel lies at (kernel - 1) / sqrt(8), not at (kernel - 1) / 2.
    limit = (kernel - 1) / (2 * math.sqrt(2))
    offsets = torch.linspace(-limit, limit, kernel, device=planes.device)
    weights = torch.softmax(-((offsets / sigma[:, None]) ** 2), 1)[:, None].expand(-1, size, -1)
    places = torch.arange(size, device=planes.device)
    taps = (places[:, None] + torch.arange(kernel, device=planes.device) - kernel // 2).abs_()
    taps = (size - 1 - (size - 1 - taps).abs_()).clamp_(min=0).expand(n, -1, -1)
    return _tapped(_tapped(planes, taps, weights).mT, taps, weights).transpose(0, 1)


def gray(planes: Tensor) -> Tensor:
    """Luminance of planes (C, n, ...), C 1 or 3, to (n, ...)."""
    if len(planes) == 1:
        return planes[0].clone()
    red, green, blue = planes.unbind()
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def gray_(planes: Tensor, rows: Tensor) -> None:
    """Make some rows of planes gray, in place."""
    planes.index_copy_(1, rows, gray(planes.index_select(1, rows)).expand(len(planes), -1, -1, -1))


def adjust_(planes: Tensor, factor: Tensor, gray_share: Tensor, mean_share: Tensor) -> None:
    """Brightness, contrast or saturation in place, a row each its own, from :func:`adjustments`.

    clamp(factor x + gray_share g + mean_share mean(g), 0, 1) with the luminance g: brightness has no shares,
    saturation 1 - factor of g, contrast 1 - factor of the mean of g.

    Args:
        planes: shape (C, n, size, size), in [0, 1].
        factor: shape (n,), as the others.
        gray_share: share of the luminance.
        mean_share: share of its mean.
    """
    factor, gray_share, mean_share = (value[:, None, None] for value in (factor, gray_share, mean_share))
    luminance = gray(planes)
    mean = luminance.mean((1, 2), keepdim=True)
    luminance.mul_(gray_share).add_(mean.mul_(mean_share))
    torch.addcmul(luminance, planes, factor, out=planes).clamp_(0, 1)


def exchange(planes: Tensor, channels: Tensor) -> Tensor:
    """Planes (C, n, size, size) whose channels are those named in (n, C)."""
    rows = torch.arange(planes.shape[1], device=planes.device)
    return planes.flatten(0, 1).index_select(0, (channels.T * len(rows) + rows).flatten()).view_as(planes)


def shift_hue_(planes: Tensor, sixths: Tensor) -> None:
    """Shift the hue by at most a sixth of the circle either way, in place, without the way over HSV.

    Let M, D and m be the largest, the middle and the smallest of red, green and blue. A colour is
    d(x) = 2 M - m + D - 2 x away from the pure hue of its channel x, in units of (M - m) sixths of the circle, and
    that channel is clamp(2 M - m - d(x), m, M): only where d(x) is between one and two units does it matter. There a
    shift by t sixths changes d(x) by t units, up or down by the order of the two other channels, which is the same
    before and after a shift of at most one. So

        x' = clamp(2 x - D - t (M - m) sign(next channel - next but one), m, M).

    Args:
        planes: red, green and blue, shape (3, n, size, size), in [0, 1].
        sixths: t in [-1, 1], shape (n,).
    """
    red, green, blue = planes.unbind()
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    largest, smallest = torch.maximum(high, blue), torch.minimum(low, blue)
    middle = torch.maximum(low, torch.minimum(high, blue, out=high), out=high)
    change = torch.sub(largest, smallest, out=low).mul_(sixths[:, None, None])
    signs = torch.empty_like(planes)
    for one, other, sign in zip((green, blue, red), (blue, red, green), signs.unbind(), strict=True):
        torch.sub(one, other, out=sign)
    torch.add(middle.neg_(), planes, alpha=2, out=planes)
    planes.addcmul_(signs.sign_(), change, value=-1)
    torch.clamp(planes, smallest, largest, out=planes)


def erase_(images: Tensor, boxes: Tensor) -> None:
    """Blank a box of each image, in place.

    Args:
        images: shape (n, C, H, W).
        boxes: top, left, height and width, shape (n, 4).
    """
    y, x = (torch.arange(size, device=images.device) for size in images.shape[2:])
    top, left, tall, wide = boxes[:, :, None].unbind(1)
    rows, columns = (y >= top) & (y < top + tall), (x >= left) & (x < left + wide)
    images.masked_fill_((rows[:, None, :, None] & columns[:, None, None]), 0)


def affine(images: Tensor, maps: Tensor) -> Tensor:
    """Bilinear affine map, black where it reaches beyond the image.

    Args:
        images: shape (n, C, H, W), uint8 in [0, 255] or floating point in [0, 1].
        maps: from :func:`affine_maps`, float32.

    Returns:
        The same shape, float32 in [0, 1].
    """
    height, width = images.shape[2:]
    images = images.float() * (1 / 255) if images.dtype == torch.uint8 else images.float()
    x = torch.arange(width, device=images.device) + (1 - width) / 2
    y = torch.arange(height, device=images.device)[:, None] + (1 - height) / 2
    places = []
    for row, side in zip(maps.unbind(1), (width, height), strict=True):
        by_x, by_y, shift = (row * (2 / side))[:, :, None, None].unbind(1)
        places.append(x * by_x + (y * by_y + shift))
    grid = torch.stack(places, 3)
    framed = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    mapped = F.grid_sample(framed, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # As torchvision has it: the edge, which fades to black over a pixel, is once more weighted by how far it is in.
    return mapped[:, :-1] * mapped[:, -1:]
