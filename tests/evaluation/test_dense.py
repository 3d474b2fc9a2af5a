"""Dense protocols against loops written out, torchmetrics and hand-made maps; loaders of torchvision; the report."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.datasets import Cityscapes, VOCSegmentation

from lightning_contrast import evaluation as ev
from lightning_contrast.data import EmojiScenesDataModule
from lightning_contrast.evaluation import protocols
from lightning_contrast.nn import build_backbone
from tests.tolerances import NETWORK, assert_same_bits, f32, near, near64

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "dynamic_img_size": True}


def stripes(count=24, seed=0):
    """Return maps (count, 6, 4, 4) that tell two classes and the ground apart, and masks (count, 8, 8)."""
    g = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 3, (count, 4, 4), generator=g)
    centers = torch.eye(6)[:3] * 3
    maps = centers[cells].permute(0, 3, 1, 2) + 1.2 * torch.randn(count, 6, 4, 4, generator=g)
    return maps, cells.repeat_interleave(2, 1).repeat_interleave(2, 2)


# Scores


def test_scores_are_those_of_a_loop_and_of_torchmetrics():
    prediction, masks = torch.randint(0, 4, (3, 5, 7)), torch.randint(0, 4, (3, 5, 7))
    masks[0, 0], masks[1, 2] = 255, -1
    found = ev.segmentation_scores(prediction, masks, num_classes=5)
    known = (masks >= 0) & (masks != 255)
    for label in range(4):
        both = (known & (prediction == label) & (masks == label)).sum()
        either = (known & ((prediction == label) | (masks == label))).sum()
        assert float(found.iou[label]) == near64(float(both / either.double()))
    assert found.iou[4].isnan()  # neither in the masks nor in the predictions: not part of the mean
    assert found.miou == near64(float(found.iou[:4].mean()))
    assert found.confusion.shape == (3, 5, 5)
    assert int(found.confusion.sum()) == int(known.sum())
    assert int(found.confusion[0, 2, 3]) == int(((masks[0] == 2) & (prediction[0] == 3)).sum())
    theirs = MulticlassJaccardIndex(4, ignore_index=255)(prediction, masks.masked_fill(~known, 255))
    assert found.miou == near(float(theirs))


def test_shares_of_patches_leave_void_pixels_out():
    masks = torch.tensor([[[0, 1, 2, 2], [1, 255, 2, 2], [255, 255, 0, 0], [-1, 255, 0, 1]]])
    shares = protocols.patch_shares(masks, 3, (2, 2))
    expected = torch.tensor([[[1 / 3, 0], [0, 0.75]], [[2 / 3, 0], [0, 0.25]], [[0, 1.0], [0, 0]]])
    torch.testing.assert_close(shares[0], expected)


def test_shares_are_made_of_some_images_at_a_time(monkeypatch):
    masks = torch.randint(0, 4, (40, 6, 6))
    masks[3, :2] = 255
    expected = torch.cat([protocols.patch_shares(mask[None], 4, (2, 3)) for mask in masks])
    sizes, one_hot = [], F.one_hot
    monkeypatch.setattr(F, "one_hot", lambda classes, number: sizes.append(len(classes)) or one_hot(classes, number))
    assert_same_bits(protocols.patch_shares(masks, 4, (2, 3)), expected)
    assert sizes == [16, 16, 8]  # a number per pixel and class takes 64 GB for VOC


# Protocols


def test_patch_knn_is_the_vote_of_hummingbird_written_out():
    (train, masks), (test, truth) = stripes(), stripes(5, seed=1)
    masks[0, :2, :2] = 255  # a patch that is void
    found = ev.segmentation_knn(train, masks, test, truth, num_classes=3, k=7, temperature=0.1)
    shares = protocols.patch_shares(masks, 3, (4, 4)).permute(0, 2, 3, 1).reshape(-1, 3)
    bank = F.normalize(train.permute(0, 2, 3, 1).reshape(-1, 6), dim=1)
    bank, shares = bank[1:], shares[1:]
    votes = torch.zeros(5, 3, 4, 4)
    for image in range(5):
        for row in range(4):
            for column in range(4):
                cosines = bank @ F.normalize(test[image, :, row, column], dim=0)
                values, rows = cosines.topk(7)
                votes[image, :, row, column] = (values / 0.1).softmax(0) @ shares[rows]
    prediction = F.interpolate(votes, size=(8, 8), mode="bilinear").argmax(1)
    expected = ev.segmentation_scores(prediction, truth, num_classes=3)
    assert found.miou == near64(expected.miou)
    assert torch.equal(found.confusion, expected.confusion)
    assert found.miou > 0.5  # chance is 0.2
    some = [ev.segmentation_knn(train, masks, test, truth, num_classes=3, k=7, memory=40, seed=s) for s in (0, 0, 1)]
    assert torch.equal(some[0].confusion, some[1].confusion)
    assert not torch.equal(some[0].confusion, some[2].confusion)


def test_the_linear_layer_learns_and_repeats():
    (train, masks), (test, truth) = stripes(), stripes(6, seed=1)
    masks[:4] = 255
    runs = [
        ev.segmentation_linear(train, masks, test, truth, num_classes=3, steps=steps, lr=0.03, seed=seed)
        for steps, seed in ((80, 0), (80, 0), (80, 1), (1, 0))
    ]
    assert torch.equal(runs[0].confusion, runs[1].confusion)
    assert not torch.equal(runs[0].confusion, runs[2].confusion)
    assert runs[0].miou > max(0.5, runs[3].miou + 0.03)
    blind = ev.segmentation_linear(torch.zeros_like(train), masks, test, truth, num_classes=3, steps=20)
    assert blind.miou < 0.3


def test_void_pixels_do_not_teach_the_linear_layer():
    (train, masks), (test, truth) = stripes(8), stripes(4, seed=1)
    masks[:, :4] = 255
    other = train.clone()
    given = {"num_classes": 3, "steps": 1}
    first = ev.segmentation_linear(train, masks, test, truth, **given)
    changed = masks.masked_fill(masks == 255, -1)
    second = ev.segmentation_linear(other, changed, test, truth, **given)
    assert torch.equal(first.confusion, second.confusion)
    taught = ev.segmentation_linear(train, masks.masked_fill(masks == 255, 2), test, truth, num_classes=3, steps=60)
    assert not torch.equal(taught.confusion, first.confusion)


# Maps of networks


def test_maps_of_a_transformer_are_its_patch_tokens():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, reg_tokens=2, **SMALL)
    images = torch.randn(2, 3, 32, 48)
    vit.eval()
    with torch.no_grad():
        tokens = vit.forward_features(images)
    vit.train()
    maps = ev.patch_features(vit, images)
    assert maps.shape == (2, 24, 4, 6)
    assert_same_bits(maps[1, :, 2, 5], tokens[1, 3 + 2 * 6 + 5])
    assert vit.training


class Wrapped(nn.Module):
    """Layers before and after a network, which is called, or whose ``forward_features`` is."""

    def __init__(self, network, called):
        super().__init__()
        self.network, self.called = network, called

    def forward(self, images):
        given = 2 * images + 1
        found = self.network(given) if self.called else self.network.forward_features(given).mean(1)
        return found[:, :3].view(3)  # of one image only


@pytest.mark.parametrize("called", [True, False])
def test_layers_before_a_network_change_its_map(called):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    wrapped = Wrapped(vit, called)
    assert_same_bits(ev.patch_features(wrapped, images), ev.patch_features(vit, 2 * images + 1))
    assert not vit._forward_pre_hooks
    assert "forward_features" not in vars(vit)
    smaller = nn.Sequential(nn.AvgPool2d(2), vit)
    assert ev.patch_features(smaller, torch.randn(2, 3, 64, 64)).shape == (2, 24, 4, 4)


@pytest.mark.parametrize("name", ["small_convnet", "resnet18"])
def test_the_mean_of_a_convnets_map_is_its_features(name):
    network = build_backbone(name).module.eval()
    images = torch.randn(2, 3, 64, 64)
    maps = ev.patch_features(network, images)
    assert maps.shape[2:] == ((4, 4) if name == "small_convnet" else (2, 2))
    with torch.no_grad():
        torch.testing.assert_close(maps.mean((2, 3)), network(images), **f32(NETWORK, size=1.0))
    assert not any(module._forward_hooks for module in network.modules() if module is not network)


def test_maps_of_other_networks():
    images = torch.rand(2, 3, 32, 32)
    cells = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    assert_same_bits(ev.patch_features(cells, images), F.avg_pool2d(images, 8))
    deep = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert ev.patch_features(deep, images).shape == (2, 5, 4, 4)
    assert ev.patch_features(nn.Sequential(nn.Conv2d(3, 5, 8, stride=4), deep[1]), images, layer="0").shape[1] == 5
    with pytest.raises(ValueError, match="`model` must have a map of patches"):
        ev.patch_features(nn.Flatten(), images)
    with pytest.raises(ValueError, match="`layer` must be a submodule of Sequential, got 'x'"):
        ev.patch_features(deep, images, layer="x")


class Tokens(nn.Module):
    """A transformer of somebody else: the only map is that of its patch embedding, before any layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, 8)

    def forward(self, images):
        return self.layer(self.embed(images).flatten(2).mT).mean(1)


def test_a_patch_embedding_is_not_taken_for_features():
    with pytest.raises(ValueError, match=r"`model` must have a map of patches .*got \(2, 16, 8\)"):
        ev.patch_features(Tokens(), torch.rand(2, 3, 32, 32))


# Attention


def test_attention_against_masks_by_hand():
    maps = torch.zeros(2, 2, 2, 2)
    maps[0, 0] = torch.tensor([[0.5, 0.2], [0.2, 0.1]])  # 0.6 needs two patches: (0, 0), (0, 1)
    maps[0, 1] = torch.tensor([[0.0, 0.1], [0.1, 0.8]])  # one patch: (1, 1)
    maps[1] = torch.tensor([[0.1, 0.7], [0.1, 0.1]])
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2, :3] = True
    masks[1, 2:] = True
    found = ev.attention_scores(maps, masks)
    assert found["jaccard_of_heads"].tolist() == [[6 / 8, 0], [0, 0]]
    assert found["jaccard"].tolist() == [6 / 8, 0]
    assert found["pointing"].tolist() == [False, False]  # the mean of the heads of the first is largest at (1, 1)
    assert found["foreground"].tolist() == [6 / 16, 0.5]
    masks[0, 3, 3] = masks[1, 1, 3] = True
    assert ev.attention_scores(maps, masks)["pointing"].tolist() == [True, True]
    assert ev.attention_scores(maps, masks, mass=1.0)["jaccard"].tolist() == near([7 / 16, 9 / 16])


# Detection


def test_average_precision_by_hand():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    truth = [box, box[:1]]
    near_box = torch.tensor([[0.0, 0.0, 10.0, 8.0]])  # IoU 0.8
    found = [torch.cat([box[:1], near_box, box[1:] + 40]), near_box]
    scores = [torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.6])]
    # ranks: right, double, wrong, right; precision 1, 1/2, 1/3, 1/2 -> 1, 1/2, 1/2, 1/2; recall 1/3, ..., 2/3
    assert ev.average_precision(found, scores, truth) == near64((1 + 1 / 2) / 3)
    assert ev.average_precision(found, scores, truth, iou=0.9) == near64(1 / 3)
    nothing = [torch.zeros(0, 4)] * 2
    assert ev.average_precision(nothing, [torch.zeros(0)] * 2, truth) == 0
    with pytest.raises(ValueError, match="`truth` must hold at least one box"):
        ev.average_precision(found, scores, nothing)


@pytest.mark.slow
def test_the_detector_learns_on_a_frozen_backbone():
    g = torch.Generator().manual_seed(0)
    images, boxes = torch.zeros(12, 3, 64, 64), []
    for image in images:
        left, top = (8 * torch.randint(0, 5, (2,), generator=g)).tolist()
        image[:, top : top + 24, left : left + 24] = 1
        boxes.append(torch.tensor([[left, top, left + 24, top + 24]]).float())
    network = nn.Sequential(nn.AvgPool2d(8), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(8))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    runs = [ev.detection_frozen(network, images, boxes, images, boxes, steps=steps, lr=3e-3) for steps in (100, 1, 1)]
    assert runs[0]["ap50"] > 0.6 > 0.2 > runs[1]["ap50"]
    assert runs[1] == runs[2]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


# Scenes


def test_masks_and_boxes_of_scenes_are_those_of_their_things():
    data = EmojiScenesDataModule(scenes=6, test_scenes=2)
    masks, classes, boxes, pairs = data.masks(), data.class_masks(), data.boxes(), data.pairs()
    for scene in range(6):
        assert torch.equal(classes[scene] > 0, masks[scene].any(0))
        for place in range(2):
            group = data.emoji.class_names.index(data.emoji.groups[pairs[scene, place]])
            assert set(classes[scene][masks[scene, place]].tolist()) == {1 + group}
            rows, columns = masks[scene, place].nonzero().T
            ends = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            assert boxes[scene, place].tolist() == ends


# Loaders of torchvision, on archives made up here


def voc(root):
    """Write three images in the layout of VOC 2012; pixel (row, column) of a mask is its quarter, the last is void."""
    base = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (12, 8), (80 * number, 0, 0)).save(base / "JPEGImages" / f"{number}.jpg", quality=100)
        mask = np.zeros((8, 12), np.uint8)
        mask[:4, 6:], mask[4:, :6], mask[4:, 6:] = 5, 20, 255
        picture = Image.fromarray(mask, "P")
        picture.putpalette([value for color in range(256) for value in (color, 255 - color, 7)])
        picture.save(base / "SegmentationClass" / f"{number}.png")
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text("0\n1\n2\n")
    return VOCSegmentation(str(root), year="2012", image_set="train", download=False)


def cityscapes(root):
    """Write one image in the layout of Cityscapes whose halves are road (7, train id 0) and car (26, train id 13)."""
    for name, kind in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        folder = root / name / "train" / "aachen"
        folder.mkdir(parents=True)
        pixels = np.full((4, 8), 7, np.uint8)
        pixels[:, 4:], pixels[3] = 26, 3  # out of roi
        picture = Image.fromarray(pixels) if name == "gtFine" else Image.new("RGB", (8, 4), (9, 9, 9))
        picture.save(folder / f"aachen_000000_000019_{kind}.png")
    return Cityscapes(str(root), split="train", mode="fine", target_type="semantic")


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_sets_of_torchvision_are_read(tmp_path):
    images, masks = ev.read_segmentation(voc(tmp_path / "voc"), size=4)
    assert images.shape == (3, 3, 4, 4)
    assert images.dtype == torch.uint8
    assert [int(image[0].float().mean().round()) for image in images] == pytest.approx([0, 80, 160], abs=2)
    assert masks[1].tolist() == [[0, 0, 5, 5]] * 2 + [[20, 20, 255, 255]] * 2
    found = ev.segmentation_scores(masks.masked_fill(masks == 255, 0), masks, num_classes=21)
    assert found.miou == 1
    assert int(found.confusion.sum()) == 3 * 12
    some, _ = ev.read_segmentation(VOCSegmentation(str(tmp_path / "voc"), image_set="train"), size=4, limit=2)
    assert torch.equal(some, images[:2])
    _, masks = ev.read_segmentation(cityscapes(tmp_path / "city"), size=4)
    assert masks.tolist() == [[[0, 0, 13, 13]] * 3 + [[255] * 4]]
    with pytest.raises(TypeError, match="`dataset` must yield a PIL image and a PIL mask"):
        ev.read_segmentation([torch.zeros(3)], size=4)
    with pytest.raises(ValueError, match="`dataset` must hold at least one image"):
        ev.read_segmentation([], size=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: ev.segmentation_knn(x, y, x[:, :5], y, num_classes=3), "`test` must be as wide as `train`"),
        (lambda x, y: ev.segmentation_knn(x, y[:3], x, y, num_classes=3), "`train` must be maps"),
        (lambda x, y: ev.segmentation_knn(x, y, x, y, num_classes=2), "`masks` must hold classes below 2, got 2"),
        (lambda x, y: ev.segmentation_knn(x, y, x, y, num_classes=3, k=999), "`k` must be <= 384"),
        (lambda x, y: ev.segmentation_linear(x, y, x, y, num_classes=3, steps=0), "`steps` must be >= 1"),
        (lambda x, y: ev.segmentation_linear(x, y * 0 - 1, x, y, num_classes=3), "`train_masks` must have labeled"),
        (lambda x, y: ev.segmentation_scores(y + 1, y, num_classes=3), "`prediction` must lie in 0..2"),
        (lambda x, y: ev.segmentation_scores(y, y.float(), num_classes=3), "`masks` must be integers"),
        (lambda x, y: ev.attention_scores(x, y[:2]), r"`masks` must be \(B, H, W\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*stripes())
