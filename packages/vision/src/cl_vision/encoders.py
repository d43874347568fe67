"""Image encoders: from a batch of images to one feature row an image, without a classifier."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchvision.models import resnet

from cl_core import _checks, plugins

_IMAGENET_CLASSES = 1000  # of all torchvision's classifiers

Norm: TypeAlias = Literal["batch", "group"]
"""``"batch"`` couples the rows of a batch (running statistics at evaluation), ``"group"`` does not."""


class Encoder(nn.Module):
    """Base of every encoder: maps images (N, C, H, W) to features (N, ``dim``).

    Attributes:
        dim: number of features, set by the subclass.
    """

    dim: int

    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch of images, shape (N, dim)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(images).")


class SmallConvNet(Encoder):
    """Four 3x3 convolutions of widths w, 2w, 4w, 8w, three poolings, a global average.

    The network of quick runs on small images: at ``width=32`` it has 0.4 million parameters. The smallest
    image is 8x8 (handwritten digits): three poolings leave one pixel.

    Args:
        width: channels w of the first convolution; ``dim`` is 8w.
        in_channels: channels of the images, 1 for grey.
        norm: ``"batch"``, or ``"group"`` for rows that must not depend on their batch.

    Cost: about 0.7 million multiply-adds a 8x8 image at width 32, sixteen times that at 32x32.
    """

    def __init__(self, width: int = 32, in_channels: int = 3, norm: Norm = "batch") -> None:
        super().__init__()
        _positive_integer("width", width)
        _positive_integer("in_channels", in_channels)
        normalise = _norm_layer(norm)
        self.width, self.in_channels, self.norm = width, in_channels, norm
        self.dim = 8 * width
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, out in enumerate((width, 2 * width, 4 * width, 8 * width)):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                normalise(out),
                nn.ReLU(inplace=True),
            ]
            if stage < 3:
                layers.append(nn.MaxPool2d(2))
            channels = out
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images (N, in_channels, H, W) with H, W >= 8, shape (N, 8 * width)."""
        _check_images(images, channels=self.in_channels, at_least=8)
        return self.layers(images).mean(dim=(2, 3))


class SmallAlexNet(Encoder):
    """The network of small contrastive experiments: five convolutions and two fully connected layers, 4096 features.

    Its last layer, to 128 columns, is the projector (``MLPProjector(layers=1)``); probes read what comes before, as the
    authors of alignment and uniformity and of CACR do.

    Args:
        image_size: height and width of the images, at least 15.
        in_channels: channels of the images.

    Reference: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on
    the Hypersphere", ICML 2020, arXiv 2005.10242.
    """

    def __init__(self, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        _positive_integer("image_size", image_size)
        _positive_integer("in_channels", in_channels)
        if image_size < 15:
            raise ValueError(f"image_size must be at least 15 (three poolings of width 3), got {image_size}.")
        self.image_size, self.in_channels, self.dim = image_size, in_channels, 4096
        layers: list[nn.Module] = []
        channels, side = in_channels, image_size
        for out, pooled in ((96, True), (192, True), (384, False), (384, False), (192, True)):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            if pooled:
                layers.append(nn.MaxPool2d(3, 2))
                side = (side - 3) // 2 + 1
            channels = out
        layers.append(nn.Flatten())
        for width in (192 * side * side, 4096):
            layers += [nn.Linear(width, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images (N, in_channels, image_size, image_size), shape (N, 4096)."""
        _check_images(images, channels=self.in_channels)
        if tuple(images.shape[2:]) != (self.image_size, self.image_size):
            size = "x".join(map(str, images.shape[2:]))
            raise ValueError(
                f"images must have {self.image_size}x{self.image_size} pixels, got {size}: pass "
                "--model.encoder.image_size, or --data.image_size."
            )
        return self.layers(images)


class ResNet(Encoder):
    """A torchvision ResNet without its classifier.

    Args:
        depth: 18, 34 or 50; ``dim`` is 512, 512 or 2048.
        stem: ``"cifar"`` for small images (3x3 convolution of stride 1, no max-pooling), ``"imagenet"`` for
            the original one (7x7 of stride 2 and max-pooling), ``"stl"`` for 64 to 96 pixels between the two (3x3
            convolution of stride 1 and max-pooling), as STL-10 and Tiny ImageNet are often trained on. Of 96 pixels the
            first stage sees 96, 24 or 48; which of them a paper on STL-10 used has to be looked up there.
        in_channels: channels of the images.
        norm: ``"batch"`` or ``"group"``.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385; the
    small stem as in Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
    arXiv 2002.05709, B.9.
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50] = 18,
        stem: Literal["cifar", "stl", "imagenet"] = "cifar",
        in_channels: int = 3,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        _checks.choice("depth", depth, (18, 34, 50))
        _checks.choice("stem", stem, ("cifar", "stl", "imagenet"))
        _positive_integer("in_channels", in_channels)
        self.depth, self.stem, self.in_channels, self.norm = depth, stem, in_channels, norm
        block = resnet.Bottleneck if depth == 50 else resnet.BasicBlock
        stages = [2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3]
        network = resnet.ResNet(block, stages, norm_layer=_norm_layer(norm))
        if stem == "cifar":
            network.maxpool = nn.Identity()
        if stem != "imagenet":
            network.conv1 = _first_convolution(in_channels, kernel=3, stride=1)
        elif in_channels != 3:
            network.conv1 = _first_convolution(in_channels, kernel=7, stride=2)
        self.dim = network.fc.in_features
        network.fc = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Features of images (N, in_channels, H, W), shape (N, dim)."""
        _check_images(images, channels=self.in_channels)
        return self.network(images)


class TorchvisionEncoder(Encoder):
    """Any of torchvision's classifiers by name, the layer that makes scores of classes removed.

    GoogLeNet and Inception have no auxiliary classifiers here, and come without pretrained weights, which are for
    inputs of another scale than all others.

    Args:
        name: a name of ``torchvision.models.list_models``, for example ``"convnext_tiny"``.
        weights: None for random weights, or the name of torchvision's weights for this model, for example
            ``"DEFAULT"``: downloaded once by torchvision, checked, and read without executing code.

    Attributes:
        weights: always None, so that an export, which holds the weights themselves, is read without fetching
            torchvision's once more.
        pretrained: the name of the weights that it was built with, or None.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(plugins.unknown("torchvision classifier", name, known))
        self.name, self.weights, self.pretrained = name, None, weights
        auxiliary = name in ("googlenet", "inception_v3")
        if auxiliary and weights is not None:
            raise ValueError(f"weights must be None for {name}, got {weights!r}.")
        options = {"aux_logits": False, "init_weights": True} if auxiliary else {}
        network = torchvision.models.get_model(name, weights=None, **options)
        widths = {path: _width_before_scores(module) for path, module in network.named_modules()}
        path, width = [(path, width) for path, width in widths.items() if width][-1]
        if weights is not None:
            _load_torchvision_weights(network, name, weights)
        self.dim = width
        owner, _, attribute = path.rpartition(".")
        setattr(network.get_submodule(owner), attribute, nn.Identity())
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Features of images (N, 3, H, W) of a size the model allows, shape (N, dim)."""
        _check_images(images, channels=3, adjustable=False)
        try:
            return self.network(images)
        except (AssertionError, RuntimeError) as error:
            side = self._known_size()
            if tuple(images.shape[2:]) == (side, side) or not self._takes(images.new_zeros(2, 3, side, side)):
                raise  # it is not the size
            height, width = images.shape[2:]
            raise ValueError(
                f"{self.name} does not take images of {height}x{width} pixels, but for example of {side}x{side}: pass "
                f"--data.image_size {side}."
            ) from error

    def _known_size(self) -> int:
        """Height and width that torchvision's model was built for, or the smallest that its weights are."""
        weights = torchvision.models.get_model_weights(self.name).DEFAULT
        return getattr(self.network, "image_size", None) or max(weights.meta["min_size"])

    def _takes(self, images: Tensor) -> bool:
        try:
            with torch.no_grad():
                self.network(images)
        except (AssertionError, RuntimeError):
            return False
        return True


class ModuleEncoder(Encoder):
    """A network of one's own: any module that maps images (N, C, H, W) to features (N, dim).

        cl-vision fit --config dcl/digits --model.encoder ModuleEncoder --model.encoder.module my_package.nets.MyNet

    An export holds the name of its class, the arguments that it was built with and its weights, but no code. It is read
    where that class is imported already: ``import my_package.nets``, or ``--import my_package.nets`` for the command.

    Args:
        module: the network; on the command line its class by import path, and the arguments of that.
        dim: number of features; None looks at what two black images give, as is done for lazy modules too.
        in_channels: channels of the images.
        image_size: height and width of these two images, which are all that it is for.
        arguments: what ``module`` was built with, by name, for an export. None where the module stores each argument as
            an attribute of that name, and for the command, which knows them.

    Attributes:
        arguments: always None, as they are written down with the module.

    Raises:
        ValueError: in one sentence, for arguments that the class does not take, or a module that gives no features.
    """

    def __init__(
        self,
        module: nn.Module,
        dim: int | None = None,
        in_channels: int = 3,
        image_size: int = 32,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        from cl_core.training.artifacts import note_arguments

        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
        for name, value in (("dim", dim), ("in_channels", in_channels), ("image_size", image_size)):
            if value is not None or name != "dim":
                _checks.count(name, value)  # type: ignore[arg-type]
        if arguments is not None:
            if not isinstance(arguments, dict):
                raise TypeError(f"arguments must be a dict or None, got {type(arguments).__name__}.")
            try:
                inspect.signature(type(module)).bind(**arguments)
            except TypeError as error:
                raise ValueError(f"arguments must be those of {type(module).__name__}: {error}.") from None
            note_arguments(module, arguments)
        self.module, self.in_channels, self.image_size, self.arguments = module, in_channels, image_size, None
        # Lazy modules have no weights before they see images.
        lazy = any(map(is_lazy, (*module.parameters(), *module.buffers())))
        self.dim = self._found_dim(dim) if dim is None or lazy else dim

    def forward(self, images: Tensor) -> Tensor:
        """Features of images (N, in_channels, H, W), shape (N, dim)."""
        _check_images(images, channels=self.in_channels)
        features = self.module(images)
        self._check(features, images, self.dim)
        return features  # type: ignore[no-any-return]

    def _found_dim(self, dim: int | None) -> int:
        """Columns of the features of two black images, ``dim`` if given; modes and statistics stay as they are."""
        like = next((p for p in self.module.parameters() if p.is_floating_point()), torch.empty(0))
        images = torch.zeros(
            2, self.in_channels, self.image_size, self.image_size, device=like.device, dtype=like.dtype
        )
        modes = {part: part.training for part in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad():
                features = self.module(images)
        except Exception as error:  # whatever a network says of images that it is not for
            raise ValueError(
                f"{type(self.module).__name__} takes no images of shape {tuple(images.shape)} "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}): pass "
                "--model.encoder.in_channels and --model.encoder.image_size, or --model.encoder.dim."
            ) from error
        finally:
            for part, mode in modes.items():
                part.training = mode
        self._check(features, images, dim)
        return int(features.shape[1])

    def _check(self, features: Any, images: Tensor, dim: int | None) -> None:
        """Refuse anything but floating-point rows, one an image."""
        found, hint, rows = type(features).__name__, "", images.shape[0]
        if isinstance(features, Tensor):
            numbers = features.is_floating_point() and features.ndim == 2 and features.shape[0] == rows
            if numbers and dim in (None, features.shape[1]):
                return
            found = f"{features.dtype} of shape {tuple(features.shape)}"
            if numbers:
                hint = f": pass --model.encoder.image_size {images.shape[2]}, or another --model.encoder.dim"
        raise ValueError(
            f"{type(self.module).__name__} must return floating-point features of shape ({rows}, {dim or 'dim'}) for "
            f"{rows} images, got {found}{hint}."
        )


def create_encoder(
    name: str | None = None, *, pretrained_path: str | Path | None = None, **options: Any
) -> Encoder:
    """An encoder by name, with the weights of a run or an export if one is named.

    Args:
        name: a class of this module (``"SmallConvNet"``, or ``"ModuleEncoder"`` around a ``module``), ``"resnet18"``,
            ``"resnet34"`` or ``"resnet50"`` for :class:`ResNet`, or any torchvision classifier that
            :class:`TorchvisionEncoder` takes, such as ``"convnext_tiny"``. None for the encoder of ``pretrained_path``.
        pretrained_path: run folder or export whose method has such an encoder; its weights are copied.
        options: of the class.

    Returns:
        The encoder, on the CPU, in training mode as torch's modules come.

    Raises:
        FileNotFoundError: if ``pretrained_path`` is neither a run nor an export.
        ValueError: in one sentence, for an unknown name or weights that do not fit.
    """
    if name is None:
        if pretrained_path is None or options:
            raise ValueError(
                "name must be given unless pretrained_path brings an encoder as it is, without options."
            )
        return _trained_encoder(pretrained_path).train()
    encoder = _named(name, options)
    if pretrained_path is not None:
        trained = _trained_encoder(pretrained_path)
        try:
            encoder.load_state_dict(trained.state_dict())
        except RuntimeError:
            raise ValueError(
                f"the weights of {pretrained_path} are of another encoder, {type(trained).__name__} of dim "
                f"{trained.dim}, and do not fit {name!r} with these options; leave the name out to get theirs."
            ) from None
    return encoder


def _named(name: str, options: dict[str, Any]) -> Encoder:
    own = {kind.__name__: kind for kind in (ModuleEncoder, ResNet, SmallAlexNet, SmallConvNet)}
    depths: dict[str, Literal[18, 34, 50]] = {"resnet18": 18, "resnet34": 34, "resnet50": 50}
    if name in own:
        return own[name](**options)
    if name in depths:
        return ResNet(depths[name], **options)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(plugins.unknown("encoder", name, [*own, *depths, *torchvision.models.list_models()]))
    return TorchvisionEncoder(name, **options)


def _trained_encoder(place: str | Path) -> Encoder:
    from cl_core.training.artifacts import is_export, load_export
    from cl_core.training.run import RunFolder

    run = RunFolder.around(place)
    export = run.export if run is not None else Path(place)
    if not is_export(export):
        raise FileNotFoundError(
            f"{place} is neither a finished run nor an export: it holds no weights to take."
        )
    encoder = getattr(load_export(export), "encoder", None)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"{place} holds no encoder of images.")
    return encoder


def _width_before_scores(module: nn.Module) -> int:
    """Columns, or channels, that a layer makes scores of ImageNet's classes of; 0 for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features if module.out_features == _IMAGENET_CLASSES else 0
    if isinstance(module, nn.Conv2d):
        return module.in_channels if module.out_channels == _IMAGENET_CLASSES else 0
    return 0


def _load_torchvision_weights(network: nn.Module, name: str, weights: str) -> None:
    members = torchvision.models.get_model_weights(name)
    if weights not in members.__members__:
        raise ValueError(plugins.unknown(f"weights of {name}", weights, members.__members__))
    state = members[weights].get_state_dict(progress=False, check_hash=True, weights_only=True)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights {weights!r} of {name} do not fit torchvision's own model.") from error


def _first_convolution(in_channels: int, *, kernel: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def _norm_layer(norm: Norm) -> Any:
    _checks.choice("norm", norm, ("batch", "group"))
    return nn.BatchNorm2d if norm == "batch" else _group_norm


def _group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least two channels where the number allows it."""
    groups = math.gcd(32, channels)
    if groups == channels > 1:
        groups //= 2
    return nn.GroupNorm(groups, channels)


def _positive_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def _check_images(images: Tensor, *, channels: int, at_least: int = 1, adjustable: bool = True) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor of shape (N, {channels}, H, W), got {type(images).__name__}."
        )
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < at_least:
        sizes = f" with H, W >= {at_least}" if at_least > 1 else ""
        hint = ""
        if images.ndim == 4 and images.shape[1] != channels:
            own = f"--model.encoder.in_channels {images.shape[1]}, or " if adjustable else ""
            hint = f": pass {own}images of {channels} channels, as ImageFolder's --data.channels {channels}"
        elif images.ndim == 4:
            hint = f": pass --data.image_size {at_least} or more"
        raise ValueError(
            f"images must have shape (N, {channels}, H, W){sizes}, got {tuple(images.shape)}{hint}."
        )
    if not torch.is_floating_point(images):
        raise TypeError(f"images must be floating point (scaled, not raw bytes), got {images.dtype}.")
