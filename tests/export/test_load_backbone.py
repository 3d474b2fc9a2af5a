"""An exported backbone is built again as it was, and cannot be read as another network."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import lightning_contrast as lc
from lightning_contrast.export import export, load_backbone
from lightning_contrast.nn import build_backbone
from tests.export.test_export import convnet
from tests.tolerances import NETWORK, f32

SPEC = {"size": 64, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}


def vary(network, seed=0):
    """Give weights and statistics values that a fresh network has not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.02)
    return network


CASES = {
    "resnet10t": {},
    "resnet10t small": {"small_images": True},
    "resnet18d small": {"small_images": True},
    "mobilenetv3_small_100 small": {"small_images": True},
    "resnet10t pooled": {"backbone_kwargs": {"global_pool": "max"}},
    "resnet18x1 small": {"small_images": True},
    "small_convnet": {"backbone_kwargs": {"width": 4}},
    "test_vit": {"backbone_kwargs": {"img_size": 64, "patch_size": 16, "depth": 1, "dynamic_img_size": True}},
}
READ_WRONGLY = {"resnet10t small", "resnet18d small", "mobilenetv3_small_100 small", "resnet10t pooled"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_network_is_built_again_and_never_read_as_another(case, tmp_path):
    name = case.split()[0]
    model = lc.SimCLR(name, **CASES[case])
    vary(model.backbone)
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    path = export(model, tmp_path / "net.pt", input_spec=SPEC)
    again = load_backbone(path)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.backbone.eval()(images)
        torch.testing.assert_close(again(images), expected)
    assert again.input_spec == SPEC
    assert not again.training
    if name in timm.list_models():  # what a reader without this package would do
        plain = timm.create_model(name, num_classes=0).eval()
        weights = torch.load(path, weights_only=True)["state_dict"]
        try:
            plain.load_state_dict(weights)
        except RuntimeError as error:
            refused = str(error)
        else:
            refused = None
            torch.testing.assert_close(plain(images), expected)
        assert ("needs_load_backbone." in (refused or "")) == (case in READ_WRONGLY)


@pytest.mark.slow
def test_a_resnet_loads_strictly_into_torchvision_without_its_classifier(tmp_path):
    model = lc.SimCLR("resnet50")
    vary(model.backbone)
    weights = torch.load(export(model, tmp_path / "net.pt", input_spec=SPEC), weights_only=True)["state_dict"]
    network = torchvision.models.resnet50()
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.weight"):
        network.load_state_dict(weights)
    network.fc = nn.Identity()
    network.load_state_dict(weights, strict=True)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), model.backbone.eval()(images), **f32(NETWORK))


def test_a_module_of_the_user_has_to_be_given_and_to_be_the_same(tmp_path):
    path = export(vary(convnet()), tmp_path / "net.pt", input_spec=SPEC | {"size": 12})
    with pytest.raises(ValueError, match="`backbone` must be given for this file, got None"):
        load_backbone(path)
    assert load_backbone(path, convnet()).input_spec["size"] == 12
    other = convnet()
    other[0].stride = (2, 2)  # the same weights
    with pytest.raises(ValueError, match="`backbone` must compute the features of the exported network"):
        load_backbone(path, other)
    with pytest.raises(ValueError, match="`backbone` must fit the weights of the file"):
        load_backbone(path, nn.Linear(2, 2))


@pytest.mark.slow
def test_arguments_that_a_file_cannot_hold(tmp_path):
    model = lc.SimCLR("resnet10t", backbone_kwargs={"act_layer": nn.SiLU})
    path = export(model, tmp_path / "net.pt", input_spec=SPEC)
    with pytest.raises(ValueError, match="`backbone` must be given for this file"):
        load_backbone(path)
    with pytest.raises(ValueError, match="compute the features of the exported network"):
        load_backbone(path, timm.create_model("resnet10t", num_classes=0))
    load_backbone(path, timm.create_model("resnet10t", num_classes=0, act_layer=nn.SiLU))


def test_only_files_of_the_export_are_read(tmp_path):
    torch.save({"state_dict": convnet().state_dict()}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="`path` must be an exported backbone"):
        load_backbone(tmp_path / "plain.pt")
    spec = {"size": 8, "mean": None, "std": None}
    with pytest.raises(ValueError, match=r"`input_spec` must be the input of the backbone, got .* The backbone raises"):
        export(lc.SimCLR("test_vit"), tmp_path / "vit.pt", input_spec=spec)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.slow
def test_an_exported_backbone_starts_another_run(small, tmp_path):
    model = lc.SimCLR("resnet10t", small_images=small)
    path = export(vary(model), tmp_path / "net.pt", input_spec=SPEC)
    other = lc.BYOL("resnet10t", small_images=small, hidden_dim=8, projection_dim=4)
    lc.resuming.from_pretrained_backbone(other, path)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(other.backbone.state_dict()[name], tensor)
        assert torch.equal(other.momentum_backbone.state_dict()[name], tensor)
    wrong = lc.SimCLR("resnet10t", small_images=not small)
    with pytest.raises(ValueError, match=f"`weights` must have the stem of the backbone, small_images={not small}"):
        lc.resuming.from_pretrained_backbone(wrong, path)
    with pytest.raises(ValueError, match="have the stem of the backbone"):
        lc.resuming.from_pretrained_backbone(wrong, build_backbone("resnet10t", small_images=small).module)


@pytest.mark.parametrize(
    "build",
    [
        lambda: lc.TemporalCPC("resnet10t", context_dim=8),  # with LayerNorm in place of BatchNorm
        lambda: lc.TemporalContrast("small_video_convnet", projection_dim=8),
        lambda: lc.VJEPA("small_video_vit", predictor_dim=24, predictor_depth=1, backbone_kwargs={"depth": 1}),
    ],
    ids=["TemporalCPC", "TemporalContrast", "VJEPA"],
)
@pytest.mark.slow
def test_networks_of_clips_are_built_again(build, tmp_path):
    torch.manual_seed(0)
    model = build()
    vary(model.backbone)
    again = load_backbone(export(model, tmp_path / "net.pt", input_spec=SPEC | {"size": 32}))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model.backbone.eval()(images))
