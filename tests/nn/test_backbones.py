"""Backbones: the width of their features, stems for small images, sizes that they refuse."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_contrast.nn import SmallConvNet, build_backbone, check_image_size, read_feature_dim, use_small_stem
from tests.tolerances import NETWORK, f32

FAMILIES = {  # one small member of each, with arguments that make it smaller
    "resnet18": {},
    "resnext26ts": {},
    "seresnext26d_32x4d": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 1},
    "nfnet_l0": {},
    "resnet18x2": {},
    "small_convnet": {},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_dim_is_what_the_network_yields(name):
    module, width = build_backbone(name, backbone_kwargs=FAMILIES[name])
    images = torch.randn(2, 3, 64, 64)
    check_image_size(module, images)
    with torch.no_grad():
        assert module.eval()(images).shape == (2, width)


def test_every_stored_width_of_timm_is_asked_in_the_right_order():
    module = build_backbone("mobilenetv3_small_050").module
    assert (module.num_features, module.head_hidden_size) == (288, 1024)
    assert read_feature_dim(module) == 1024
    assert build_backbone("resnet18", backbone_kwargs={"global_pool": "catavgmax"}).feature_dim == 1024


SMALL = {  # side of the last map for images of 32 pixels: before and with the small stem
    "resnet18": (1, 4),
    "resnext50_32x4d": (1, 4),
    "resnet18d": (1, 4),
    "resnetv2_18": (1, 4),
    "efficientnet_b0": (1, 2),
    "mobilenetv3_small_050": (1, 2),
    "convnext_atto": (1, 4),
    "nfnet_l0": (1, 4),
    "regnetx_002": (1, 2),
    "resnet18x2": (1, 4),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_small_images_keep_their_resolution(name):
    sides = []
    for small in (False, True):
        module, width = build_backbone(name, small_images=small)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            sides.append(module.eval().forward_features(images).shape[-1])
            assert module(images).shape == (2, width)
            assert 32 // module.feature_info[-1]["reduction"] == sides[-1]
    assert tuple(sides) == SMALL[name]


def test_small_resnet_stem_is_the_published_one():
    for network in (build_backbone("resnet18", small_images=True).module, torchvision_resnet(small=True)):
        conv = network.conv1
        assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
        assert (conv.in_channels, conv.out_channels) == (3, 64)
        assert isinstance(network.maxpool, nn.Identity)
        assert network.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # He, fan out


def torchvision_resnet(*, small):
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return build_backbone(network, small_images=small, feature_dim=512).module


def test_torchvision_resnet():
    network = torchvision_resnet(small=True)
    seen = []
    network.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert seen == [(2, 512, 4, 4)]


def test_small_stem_twice_is_once():
    module = build_backbone("resnet18", small_images=True).module
    weight = module.conv1.weight
    use_small_stem(module)
    assert module.conv1.weight is weight
    assert [stage["reduction"] for stage in module.feature_info] == [1, 1, 2, 4, 8]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.slow
def test_transformers_say_that_they_have_no_small_stem(name):
    with pytest.raises(ValueError, match=r"`small_images` must be False for .*Transformer.*img_size=32, patch_size=4"):
        build_backbone(name, small_images=True)
    kwargs = {"img_size": 32, "patch_size": 4} | (
        {"window_size": 4} if "swin" in name else {}
    )  # what the error advises
    module, width = build_backbone(name, backbone_kwargs=kwargs)
    images = torch.randn(2, 3, 32, 32)
    check_image_size(module, images)
    with torch.no_grad():
        assert module.eval()(images).shape == (2, width)


def test_unknown_stem_is_refused():
    for name, cls in (("densenet121", "DenseNet"), ("levit_128s", "LevitDistilled")):
        with pytest.raises(ValueError, match=f"`small_images` must be False for {cls}, whose stem is not known"):
            build_backbone(name, small_images=True)


@pytest.mark.parametrize(
    ("name", "millions", "width"),
    [("resnet50x2", 94, 4096), ("resnet50x4", 375, 8192), ("resnet101x2", 170, 4096), ("resnet152x2", 233, 4096)],
)
def test_wide_resnets_have_the_parameters_of_the_papers(name, millions, width):
    """Millions of parameters without classifier: SimCLR, and SimCLR v2, table 1."""
    with torch.device("meta"):
        module, feature_dim = build_backbone(name)
    assert feature_dim == width
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert module.conv1.out_channels == width // 32


@pytest.mark.slow
def test_width_one_is_the_ordinary_resnet():
    for depth in (18, 50):
        ours, theirs = build_backbone(f"resnet{depth}x1").module, timm.create_model(f"resnet{depth}", num_classes=0)
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            # timm shortens the shortcut of the first block in the same way
            # rounded alike but for the memory format of the convolutions
            torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), **f32(NETWORK))


@pytest.mark.slow
def test_wide_resnet_starts_as_timm_starts():
    module = build_backbone("resnet18x2", backbone_kwargs={"in_chans": 1}).module
    assert module.conv1.in_channels == 1
    for stage in (module.layer1, module.layer2):
        for block in stage:
            assert not block.bn2.weight.any()  # the last scale of every block starts at 0
            assert block.conv1.weight.std().item() == pytest.approx(
                (2 / (block.conv1.out_channels * 9)) ** 0.5, rel=0.05
            )


def test_small_convnet():
    torch.manual_seed(0)
    network, width = build_backbone("small_convnet", backbone_kwargs={"width": 4, "in_chans": 1})
    assert isinstance(network, SmallConvNet)
    assert width == network.num_features == 32
    images = torch.randn(3, 1, 32, 32)
    expected = images
    for stage in (network.stem, *network.stages):
        conv, norm, _ = stage
        expected = nn.functional.conv2d(expected, conv.weight.contiguous(), stride=2, padding=1)
        mean, var = expected.mean((0, 2, 3), keepdim=True), expected.var((0, 2, 3), unbiased=False, keepdim=True)
        expected = ((expected - mean) / (var + norm.eps).sqrt()).relu()
    torch.testing.assert_close(network(images), expected.mean((2, 3)), **f32(NETWORK, size=0.1))
    small = build_backbone("small_convnet", small_images=True).module
    assert small.stem(torch.randn(1, 3, 32, 32)).shape == (1, 24, 32, 32)


def test_modules_are_used_as_they_are():
    class Own(nn.Module):
        num_features = 7

    network = Own()
    module, width = build_backbone(network)
    assert module is network
    assert width == 7
    assert build_backbone(network, feature_dim=9).feature_dim == 9
    assert build_backbone(nn.Flatten(), feature_dim=12).feature_dim == 12


@pytest.mark.parametrize(
    ("backbone", "options", "error", "message"),
    [
        (
            "resnet19",
            {},
            ValueError,
            r"`backbone` must be a name that timm knows.*got 'resnet19'\. Did you mean 'resnet18'",
        ),
        ("resnet77x2", {}, ValueError, "`backbone` must be a name that timm knows"),
        ("resnet50x0", {}, ValueError, "`width` must be >= 1, got 0"),
        (3, {}, TypeError, "`backbone` must be a name or an nn.Module, got 'int'"),
        (
            nn.Flatten(),
            {},
            ValueError,
            "have the width of its features as `num_features`, got 'Flatten'. Pass `feature_dim`",
        ),
        (nn.Flatten(), {"feature_dim": 0}, ValueError, "`feature_dim` must be >= 1, got 0"),
        (nn.Flatten(), {"feature_dim": 2.0}, TypeError, "`feature_dim` must be a whole number, got 2.0"),
        (
            nn.Flatten(),
            {"feature_dim": 2, "backbone_kwargs": {"a": 1}},
            ValueError,
            "`backbone_kwargs` must be None where",
        ),
        (
            "resnet18",
            {"backbone_kwargs": {"num_classes": 10}},
            ValueError,
            "`backbone_kwargs` must not hold `num_classes`",
        ),
        ("small_convnet", {"backbone_kwargs": {"width": 0}}, ValueError, "`width` must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(backbone, options, error, message):
    with pytest.raises(error, match=message):
        build_backbone(backbone, **options)


def test_a_classifier_is_refused():
    with_classifier = timm.create_model("resnet18", num_classes=10)
    with pytest.raises(ValueError, match=r"must have no classifier, got 'ResNet with 10 classes'. Call `reset_class"):
        build_backbone(with_classifier)
    with_classifier.reset_classifier(0)
    assert build_backbone(with_classifier).feature_dim == 512


@pytest.mark.parametrize(
    ("name", "kwargs", "shape", "message"),
    [
        ("vit_tiny_patch16_224", {}, (3, 32, 32), r"`images` must be 224 x 224 pixels .*got \(32, 32\).*img_size=32"),
        ("swin_tiny_patch4_window7_224", {}, (3, 96, 96), "`images` must be 224 x 224 pixels for this SwinTransformer"),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (3, 40, 32), r"multiples of \(16, 16\)"),
        ("convnext_atto", {}, (3, 16, 16), "`images` must be at least 32 pixels wide and high for this ConvNeXt"),
        ("resnet18", {}, (1, 32, 32), r"`images` must have 3 channels for this ResNet, got 1\..*in_chans=1"),
        ("efficientnet_b0", {"in_chans": 1}, (3, 32, 32), "`images` must have 1 channels for this EfficientNet, got 3"),
    ],
)
def test_images_that_the_backbone_cannot_take(name, kwargs, shape, message):
    module = build_backbone(name, backbone_kwargs=kwargs).module
    images = torch.randn(2, *shape)
    with pytest.raises(ValueError, match=message):
        check_image_size(module, images)
    with pytest.raises((RuntimeError, AssertionError)):  # it is true that the network cannot take them
        module.eval()(images)


@pytest.mark.parametrize(
    ("name", "kwargs", "shape"),
    [
        ("resnet18", {}, (3, 8, 8)),
        ("convnext_atto", {}, (3, 32, 40)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (3, 48, 32)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, (3, 40, 32)),
        ("small_convnet", {}, (3, 20, 20)),
    ],
)
def test_images_that_it_can_take(name, kwargs, shape):
    module, width = build_backbone(name, backbone_kwargs=kwargs)
    images = torch.randn(2, *shape)
    check_image_size(module, images)
    with torch.no_grad():
        assert module.eval()(images).shape == (2, width)


def test_modules_that_tell_nothing_are_not_judged():
    check_image_size(nn.Flatten(), torch.zeros(1, 5, 3, 3))
