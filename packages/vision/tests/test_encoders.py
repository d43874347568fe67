import pytest
import torch

from cl_vision.encoders import ResNet, SmallAlexNet, SmallConvNet, TorchvisionEncoder


def gradient_reaches_every_parameter(encoder, images):
    features = encoder(images)
    (features * torch.randn_like(features)).sum().backward()
    return all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32), (3, 33)])
def test_small_conv_net_maps_images_to_rows(norm, channels, side):
    torch.manual_seed(0)
    encoder = SmallConvNet(width=6, in_channels=channels, norm=norm)
    images = torch.randn(5, channels, side, side)
    assert encoder.dim == 48
    assert encoder(images).shape == (5, 48)
    assert gradient_reaches_every_parameter(encoder, images)


def test_small_conv_net_has_the_documented_size():
    assert 0.38e6 < sum(p.numel() for p in SmallConvNet(32).parameters()) < 0.42e6


@pytest.mark.parametrize(
    "encoder", [SmallConvNet(4, norm="group"), ResNet(18, norm="group")], ids=["small", "resnet"]
)
def test_group_norm_keeps_rows_apart(encoder):
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]), rtol=1e-4, atol=1e-5)


def test_batch_norm_couples_rows_in_training_only():
    encoder = SmallConvNet(4)
    images = torch.randn(3, 3, 32, 32)
    assert not torch.allclose(encoder(images)[:1], encoder(images[:1]), atol=1e-3)
    encoder.eval()
    torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]))


@pytest.mark.parametrize(("side", "pooled"), [(32, 3), (64, 7)])
def test_small_alex_net(side, pooled):
    torch.manual_seed(0)
    encoder = SmallAlexNet(side, in_channels=1)
    assert encoder.layers[-6].in_features == 192 * pooled**2
    images = torch.randn(3, 1, side, side)
    assert encoder(images).shape == (3, encoder.dim) == (3, 4096)
    assert gradient_reaches_every_parameter(encoder, images)
    with pytest.raises(ValueError, match=f"images must have {side}x{side} pixels, got 28x28"):
        encoder(torch.randn(3, 1, 28, 28))


@pytest.mark.parametrize(("depth", "dim"), [(18, 512), (34, 512), (50, 2048)])
def test_resnet_depths(depth, dim):
    encoder = ResNet(depth).eval()
    assert encoder.dim == dim
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, dim)


@pytest.mark.parametrize("channels", [1, 3])
def test_cifar_stem_keeps_the_resolution(channels):
    seen = {}
    for stem in ("cifar", "stl", "imagenet"):
        encoder = ResNet(18, stem=stem, in_channels=channels)
        encoder.network.layer1.register_forward_pre_hook(
            lambda _, inputs, stem=stem: seen.update({stem: inputs[0]})
        )
        encoder(torch.randn(2, channels, 32, 32))
    assert seen["stl"].shape[2:] == (16, 16)
    assert seen["cifar"].shape[2:] == (32, 32)
    assert seen["imagenet"].shape[2:] == (8, 8)


@pytest.mark.parametrize("stem", ["cifar", "stl"])
def test_resnet_trains_every_parameter(stem):
    torch.manual_seed(0)
    assert gradient_reaches_every_parameter(ResNet(18, stem=stem), torch.randn(2, 3, 16, 16))


def test_the_stl_stem_is_a_small_convolution_and_a_pooling():
    network = ResNet(18, stem="stl", in_channels=1).network
    assert network.conv1.weight.shape == (64, 1, 3, 3)
    assert (network.conv1.stride, network.maxpool.stride) == ((1, 1), 2)


@pytest.mark.parametrize(
    ("name", "dim", "side"),
    [
        ("mobilenet_v3_small", 1024, 64),
        ("shufflenet_v2_x0_5", 1024, 64),
        ("resnet18", 512, 64),
        ("vit_b_32", 768, 224),
        ("squeezenet1_1", 512, 64),
        ("googlenet", 1024, 64),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_torchvision_models_lose_their_classifier(name, dim, side, training):
    encoder = TorchvisionEncoder(name).train(training)
    assert encoder.dim == dim
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, side, side)).shape == (2, dim)


@pytest.mark.slow
def test_every_torchvision_classifier_ends_in_scores_of_its_classes():
    import torchvision

    build = torchvision.models.get_model
    for name in torchvision.models.list_models(module=torchvision.models):
        if name.startswith("regnet"):  # their constructors look at numbers
            continue
        with torch.device("meta"):
            whole = build(
                name,
                weights=None,
                **({"init_weights": False} if name in ("googlenet", "inception_v3") else {}),
            )
            encoder = TorchvisionEncoder(name)
        last = [
            m for m in whole.modules() if getattr(m, "out_features", getattr(m, "out_channels", 0)) == 1000
        ]
        assert encoder.dim == getattr(last[-1], "in_features", getattr(last[-1], "in_channels", 0)), name


def test_torchvision_weights_are_loaded_without_code(monkeypatch):
    import torchvision

    donor = torchvision.models.shufflenet_v2_x0_5()
    asked = {}

    def state_dict(self, *args, **options):
        asked.update(options)
        return donor.state_dict()

    monkeypatch.setattr(torchvision.models.ShuffleNet_V2_X0_5_Weights, "get_state_dict", state_dict)
    encoder = TorchvisionEncoder("shufflenet_v2_x0_5", weights="DEFAULT")
    assert asked["check_hash"] is True
    assert asked["weights_only"] is True
    torch.testing.assert_close(encoder.network.conv5[0].weight, donor.conv5[0].weight)


def test_errors_of_torchvision_models_that_are_not_of_the_size_stay(monkeypatch):
    encoder = TorchvisionEncoder("shufflenet_v2_x0_5")

    def fail(images):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(encoder.network, "forward", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        encoder(torch.randn(2, 3, 64, 64))


def test_an_export_fetches_no_pretrained_weights(monkeypatch, tmp_path):
    import torchvision

    from cl_core.losses import DCLLoss
    from cl_core.training.artifacts import export_method, load_export
    from cl_vision.methods import SimCLR

    donor = torchvision.models.shufflenet_v2_x0_5()
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **options: donor.state_dict())
    method = SimCLR(TorchvisionEncoder("shufflenet_v2_x0_5", weights="DEFAULT"), DCLLoss())
    assert method.encoder.pretrained == "DEFAULT"
    export_method(method, tmp_path)

    def fetch(self, *args, **options):
        raise AssertionError("fetched again")

    monkeypatch.setattr(weights, "get_state_dict", fetch)
    loaded = load_export(tmp_path)
    for name, value in method.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TorchvisionEncoder("resnet81"),
            r"no torchvision classifier 'resnet81'; did you mean .*'resnet18'",
        ),
        (lambda: TorchvisionEncoder("shufflenet_v2_x0_5", weights="DEFALT"), "did you mean 'DEFAULT'"),
        (lambda: TorchvisionEncoder("googlenet", weights="DEFAULT"), "weights must be None for googlenet"),
        (lambda: ResNet(19), "depth must be one of 18, 34, 50, got 19"),
        (lambda: ResNet(18, stem="small"), "stem must be one of 'cifar', 'stl', 'imagenet', got 'small'"),
        (lambda: SmallConvNet(0), "width must be an integer >= 1, got 0"),
        (lambda: SmallConvNet(8, norm="none"), "norm must be one of 'batch', 'group'"),
        (lambda: SmallConvNet(8)(torch.randn(2, 1, 8, 8)), r"images must have shape \(N, 3, H, W\)"),
        (
            lambda: SmallConvNet(8)(torch.randn(2, 1, 8, 8)),
            "pass --model.encoder.in_channels 1, or images of 3",
        ),
        (lambda: SmallConvNet(8)(torch.randn(2, 3, 7, 8)), "H, W >= 8.*: pass --data.image_size 8 or more"),
        (
            lambda: TorchvisionEncoder("shufflenet_v2_x0_5")(torch.randn(2, 1, 64, 64)),
            r"got \(2, 1, 64, 64\): pass images of 3 channels, as ImageFolder's --data.channels 3",
        ),
        (
            lambda: TorchvisionEncoder("vit_b_32")(torch.randn(2, 3, 64, 32)),
            "vit_b_32 does not take images of 64x32 pixels, .* pass --data.image_size 224",
        ),
        (
            lambda: TorchvisionEncoder("densenet121")(torch.randn(2, 3, 8, 8)),
            "densenet121 does not take images of 8x8 pixels, .* pass --data.image_size 29",
        ),
    ],
)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_raw_bytes_are_refused():
    with pytest.raises(TypeError, match="scaled, not raw bytes"):
        SmallConvNet(8)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
