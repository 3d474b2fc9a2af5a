"""What a run of a domain's views leaves behind: an exported backbone is given what it was trained with."""

import json

import onnx
import pytest
import torch
from torch import nn

from lightning_contrast import augment
from lightning_contrast.augment import ViewPolicy
from lightning_contrast.augment.domains import chest_xray_views, ct_views, histology_views, satellite_views
from lightning_contrast.export import export, load_backbone
from tests.tolerances import NETWORK, f32

SATELLITE = {"scale": (0, 10_000), "indices": [(7, 3)], "mean": [0.2] * 14, "std": [0.1] * 14}
POLICIES = {
    "satellite": (satellite_views(16, **SATELLITE), 13, (0, 10_000)),
    "ct": (ct_views(16, window="lung"), 1, (-1024, 3071)),
    "wide": (chest_xray_views((16, 24), mean=[0.5], std=[0.2]), 1, (0, 1)),
    "histology": (histology_views(16), 3, (0, 1)),
}


def stored(channels, limits):
    """Images on the scale of a domain, (5, channels, 30, 26)."""
    torch.manual_seed(0)
    low, high = limits
    images = low + (high - low) * torch.rand(5, channels, 30, 26)
    return images if limits == (0, 1) else images.round().to(torch.int16)


def network(channels):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net.num_features = 16
    return net.eval()


def test_a_spec_says_what_differs_from_pixels_in_0_to_1():
    found = {name: policy.input_spec for name, (policy, _, _) in POLICIES.items()}
    assert found["satellite"] == {
        "size": 16,
        "mean": [0.2] * 14,
        "std": [0.1] * 14,
        "scale": [0.0, 10_000.0],
        "indices": [[7, 3]],
    }
    assert found["ct"].keys() == {"size", "mean", "std", "scale", "window"}
    assert found["ct"]["scale"] == [-1024.0, 3071.0]
    assert found["ct"]["window"] == pytest.approx([(-1350 + 1024) / 4095, (150 + 1024) / 4095])
    assert found["wide"] == {"size": [16, 24], "mean": [0.5], "std": [0.2]}
    assert found["histology"].keys() == {"size", "mean", "std"}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_made_of_the_spec_prepares_images_alike(name):
    policy, channels, limits = POLICIES[name]
    spec = json.loads(json.dumps(policy.input_spec))
    assert spec == policy.input_spec
    images = stored(channels, limits)
    made = ViewPolicy.from_input_spec(spec)
    assert torch.equal(made.eval_transform(images), policy.eval_transform(images))
    assert made.input_spec == spec


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.slow
def test_an_exported_backbone_gets_what_it_was_trained_with(name, tmp_path):
    """From the stored images to the features, through the file of weights and the graph."""
    import onnxruntime

    policy, channels, limits = POLICIES[name]
    total = channels + len(policy.indices)
    net, images = network(total), stored(channels, limits)
    with torch.no_grad():
        expected = net(policy.eval_transform(images))
    path = export(net, tmp_path / "net.pt", input_spec=policy.input_spec)
    loaded = load_backbone(path, network(total))
    with torch.no_grad():
        features = loaded(ViewPolicy.from_input_spec(loaded.input_spec).eval_transform(images))
    torch.testing.assert_close(features, expected)
    path = export(net, tmp_path / "net.onnx", format="onnx", input_spec=policy.input_spec)
    spec = json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["input_spec"])
    given = ViewPolicy.from_input_spec(spec).eval_transform(images)
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"images": given.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(found), expected, **f32(NETWORK))


def test_images_of_a_spec_without_statistics():
    spec = {"size": 8, "mean": None, "std": None}
    assert ViewPolicy.from_input_spec(spec).eval_transform(torch.rand(1, 3, 9, 9)).shape == (1, 3, 8, 8)
    assert ViewPolicy.from_input_spec(spec, channels=4).eval_transform(torch.rand(1, 4, 9, 9)).shape == (1, 4, 8, 8)
    policy = augment.simclr_views(8)
    images = torch.rand(2, 3, 9, 9)
    made = ViewPolicy.from_input_spec(policy.input_spec)
    assert torch.equal(made.eval_transform(images), policy.eval_transform(images))
    other = ViewPolicy.from_input_spec(policy.input_spec, interpolation="bilinear")
    assert not torch.equal(other.eval_transform(images), policy.eval_transform(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [5, 5]}, "`scale` must be a pair"),
        ({"scale": 255}, "`scale` must be a pair"),
        ({"window": [1, 0]}, "`window` must be a pair"),
        ({"size": [8, 8, 8]}, "`size` must be a whole number of pixels, or"),
        ({"size": 0}, "`size` must be >= 1"),
        ({"interpolation": "bicubc"}, "Did you mean 'bicubic'"),
        ({"crop": 0.9}, r"`input_spec` must have known entries, got \['crop'\]"),
        ({"indices": [[0, 9]]}, "`indices` must hold pairs of two of the 2 bands"),
    ],
)
def test_bad_specs(change, message, tmp_path):
    spec = {"size": 8, "mean": [0.5] * 3, "std": [0.2] * 3} | change
    with pytest.raises(ValueError, match=message):
        ViewPolicy.from_input_spec(spec)
    if "indices" not in change:
        with pytest.raises(ValueError, match=message):
            export(network(3), tmp_path / "net.pt", input_spec=spec)
    with pytest.raises(ValueError, match="`input_spec` must hold the size, mean and std"):
        ViewPolicy.from_input_spec({"size": 8})
