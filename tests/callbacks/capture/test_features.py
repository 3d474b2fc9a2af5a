"""Features read from steps and layers of modules that know nothing of it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_contrast.callbacks.capture.features import FeatureHook, named_layers, pool


class Net(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        self.backbone = layer or nn.Linear(4, 5)
        self.blocks = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.blocks(self.backbone(x))


def tapped(name, module, rows, tokens="mean"):
    tap = FeatureHook(name, tokens)
    tap.attach(module)
    tap.arm(rows)
    return tap


class Gives(nn.Module):
    """Returns whatever it is told to."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_a_layer_is_read_without_changing_it():
    module, x = Net(), torch.randn(3, 4)
    tap = tapped("blocks.0", module, 3)
    out = module(x)
    features = tap.read(module, None)
    assert torch.equal(features, module.blocks[0](module.backbone(x)).detach())  # not what ReLU left in its place
    assert not features.requires_grad
    out.sum().backward()


def test_the_step_output_comes_before_the_backbone_and_only_for_it():
    module, x, given = Net(), torch.randn(3, 4), torch.randn(3, 2)
    for name, expected in (("backbone", given), ("features", given), ("blocks", module(x).detach())):
        tap = tapped(name, module, 3)
        module(x)
        assert torch.equal(tap.read(module, {"loss": 1, "features": given}), expected)
        tap.detach()
    tap = tapped("backbone", module, 3)
    module(x)
    assert torch.equal(tap.read(module, {"loss": 1}), module.backbone(x).detach())


def test_of_several_calls_the_first_of_fitting_size_counts():
    module = Net()
    calls = [torch.randn(5, 4), torch.randn(6, 4), torch.randn(3, 4)]
    tap = tapped("backbone", module, 3)
    outputs = [module.backbone(x) for x in calls]
    assert torch.equal(tap.read(module, None), outputs[1][:3].detach())  # two views, one after the other


def test_calls_outside_a_step_and_recomputations_are_not_read():
    module, x = Net(), torch.randn(3, 4)
    tap = tapped("backbone", module, 3)
    out = checkpoint(module.backbone, x, use_reentrant=False)
    first = out.detach().clone()
    with torch.no_grad():
        module.backbone.weight.add_(1)
    out.sum().backward()  # calls the layer again, with other weights
    assert torch.equal(tap.read(module, None), first)
    module(x)
    tap.arm(3)
    with pytest.raises(ValueError, match="name a layer that is called in each step, got 'backbone'"):
        tap.read(module, None)


def test_shapes_are_pooled():
    maps, tokens = torch.randn(4, 3, 2, 5), torch.randn(4, 7, 3)
    torch.testing.assert_close(pool(maps, 2, "mean"), torch.stack([m.flatten(1).mean(1) for m in maps[:2]]))
    torch.testing.assert_close(pool(tokens, 4, "mean"), torch.stack([sum(t) / 7 for t in tokens]))
    assert torch.equal(pool(tokens, 4, "cls"), tokens[:, 0])
    assert torch.equal(pool(maps[:, :, 0, 0], 4, "cls"), maps[:, :, 0, 0])
    assert pool(torch.randn(4), 4, "mean") is None
    assert pool(maps, 3, "mean") is None
    assert pool(maps, 8, "mean") is None
    assert pool(maps[:0], 4, "mean") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32])
def test_features_are_float32_with_memory_of_their_own(dtype):
    value = torch.randn(4, 3).to(dtype)
    features = pool(value, 4, "mean")
    assert features.dtype == torch.float32
    assert features.data_ptr() != value.data_ptr()


def test_wrappers_do_not_change_names():
    module = Net()
    module.backbone = torch.compile(module.backbone, backend="eager")
    layers = named_layers(module)
    assert list(layers) == ["backbone", "blocks", "blocks.0", "blocks.1"]
    assert layers["backbone"] is module.backbone  # the wrapper, which is what the module calls


def test_attaching_again_hooks_once_and_follows_a_replaced_layer():
    module, x = Net(), torch.randn(3, 4)
    tap = FeatureHook("backbone")
    for _ in range(2):
        tap.attach(module)
    assert len(module.backbone._forward_hooks) == 1
    old, module.backbone = module.backbone, nn.Linear(4, 2)
    tap.attach(module)
    assert not old._forward_hooks
    tap.arm(3)
    module.backbone(x)
    assert tap.read(module, None).shape == (3, 2)
    tap.detach()
    tap.detach()
    assert not module.backbone._forward_hooks


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((torch.ones(3, 2),), TypeError, r"layer that returns a tensor \('backbone' does not\), got 'tuple'"),
        (torch.ones(4, 2), ValueError, r"features of 3 images, one row per label, got the shape \(4, 2\)"),
        (torch.ones(3), ValueError, r"got the shape \(3,\)"),
    ],
)
def test_what_is_not_features_is_named(value, error, message):
    module = Net(Gives(value))
    tap = tapped("backbone", module, 3)
    module.backbone(None)
    with pytest.raises(error, match=message):
        tap.read(module, None)


def test_a_wrong_step_output_is_named():
    module = Net()
    tap = tapped("backbone", module, 3)
    with pytest.raises(TypeError, match=r'step output "features"` must be a tensor, got \'list\''):
        tap.read(module, {"features": [1]})
    tap.arm(3)
    with pytest.raises(ValueError, match=r"features of 3 images.*\(2, 4\)"):
        tap.read(module, {"features": torch.ones(2, 4)})


def test_unknown_names_list_near_ones():
    with pytest.raises(ValueError, match=r"submodule of Net, got 'blocks\.2'\. Near names: .*'blocks\.0'"):
        FeatureHook("blocks.2").attach(Net())
    module = nn.ModuleDict({"trunk": nn.Linear(1, 1)})
    tap = tapped("backbone", module, 3)  # the steps may return features
    with pytest.raises(ValueError, match=r"It has 'trunk' and their submodules; or return \"features\""):
        tap.read(module, None)
