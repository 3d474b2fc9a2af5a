"""Views cut from whole images: the places and shapes of the crops, and who gets which images."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import lightning_contrast as lc
from lightning_contrast.augment import ViewSpec, make_policy
from lightning_contrast.augment.fused import FusedResizedCrop
from lightning_contrast.augment.whole_images import WholeImages, center_squares
from lightning_contrast.contracts import split_batch
from lightning_contrast.data import ImageFolderDataModule
from tests.tolerances import assert_same_bits

COLUMNS, ROWS = 240, 90
CROPS = 6000


def write_ramp(folder, name, *, turned=False):
    """Write an image whose red value is the column, 0..239, and whose green value is the row, 0..89."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((ROWS, COLUMNS, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(COLUMNS)[None], np.arange(ROWS)[:, None]
    exif = Image.Exif()
    if turned:
        pixels = np.rot90(pixels).copy()
        exif[0x0112] = 6  # viewers turn it upright, a quarter clockwise
    Image.fromarray(pixels).save(folder / name, exif=exif)


def boxes(size, scale, *, stretched=64):
    """Return left, top, width and height of crops in pixels of the file, drawn in a stretched square."""
    torch.manual_seed(0)
    sizes = np.tile(np.array(size), (CROPS, 1))
    box = FusedResizedCrop(8, scale).draw(CROPS, stretched, stretched, sizes=sizes)["box"]
    return torch.from_numpy(box) * torch.tensor([size[0], size[1], size[0], size[1]]) / stretched


def torchvisions(size, scale):
    torch.manual_seed(1)
    image = torch.zeros(1, *size)
    return torch.tensor(
        [v2.RandomResizedCrop.get_params(image, scale=scale, ratio=(3 / 4, 4 / 3)) for _ in range(CROPS)]
        if hasattr(v2.RandomResizedCrop, "get_params")
        else [
            [params[key] for key in ("top", "left", "height", "width")]
            for params in (v2.RandomResizedCrop(8, scale).make_params([image]) for _ in range(CROPS))
        ]
    ).float()


@pytest.mark.parametrize("size", [(ROWS, COLUMNS), (COLUMNS, ROWS), (100, 130)], ids=str)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.14)], ids=str)
def test_crops_of_a_stretched_image_are_torchvisions_of_the_image(size, scale):
    ours, theirs = boxes(size, scale, stretched=256), torchvisions(size, scale)
    for quantity in (
        lambda box: box[:, 2] * box[:, 3] / (size[0] * size[1]),  # area
        lambda box: (box[:, 3] / box[:, 2]).log(),  # aspect ratio
        lambda box: (box[:, 1] + box[:, 3] / 2) / size[1],  # center
        lambda box: (box[:, 0] + box[:, 2] / 2) / size[0],
    ):
        levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
        spread = quantity(theirs).std().clamp_min(0.01)
        gap = (quantity(ours).quantile(levels) - quantity(theirs).quantile(levels)).abs() / spread
        assert gap.max() < 0.12, gap  # 6,000 draws each: a standard error of up to 0.04 at these levels
    for axis in (0, 1):  # which rows and columns of the file are seen, by tenths
        edges = torch.linspace(0, size[axis], 11)
        middle = ((edges[1:] + edges[:-1]) / 2).floor() + 0.5  # centers of pixels, which no rounding of a box reaches
        seen = [
            ((box[:, axis, None] <= middle) & (middle < box[:, axis, None] + box[:, axis + 2, None]))
            for box in (ours, theirs)
        ]
        assert (seen[0].float().mean(0) - seen[1].float().mean(0)).abs().max() < 0.04


def test_boxes_stay_in_the_square_and_equal_sizes_change_nothing():
    sizes = np.array([[3, 400], [400, 3], [1, 1], [64, 64]])
    for seed in range(30):
        torch.manual_seed(seed)
        box = FusedResizedCrop(8).draw(4, 64, 64, sizes=sizes)["box"]
        assert (box[:, :2] >= 0).all()
        assert (box[:, 2:] >= 1).all()
        assert (box[:, :2] + box[:, 2:] <= 64).all()
        assert (box == box.round()).all()
        torch.manual_seed(seed)
        plain = FusedResizedCrop(8).draw(4, 64, 64)
        torch.manual_seed(seed)
        same = FusedResizedCrop(8).draw(4, 64, 64, sizes=np.full((4, 2), 64))
        assert (plain["box"] == same["box"]).all()
        assert (plain["flip"] == same["flip"]).all()


@pytest.fixture
def folder(tmp_path):
    for place in range(8):
        write_ramp(tmp_path / "images" / "a", f"{place}.jpg", turned=place % 2 == 1)
    return tmp_path / "images"


def test_both_views_see_the_whole_image_at_its_shape(folder):
    data = ImageFolderDataModule(folder, size=128, batch_size=8, num_workers=0)
    (images, labels) = next(iter(data.train_dataloader()))
    assert images.shape == images.pixels.shape == (8, 3, 128, 128)
    assert images.sizes.tolist() == [[ROWS, COLUMNS]] * 8  # also of those that EXIF turns
    assert split_batch([images, labels])[0] is images
    assert type(images + 1) is type(images[:2]) is torch.Tensor  # of other rows the shapes would be wrong
    moved = images.to(torch.float32)
    assert moved.dtype == torch.float32
    assert moved.sizes is images.sizes
    spec = ViewSpec(24, (0.05, 0.14), jitter_p=0.0, gray_p=0.0, flip=0.0)
    policy = make_policy([spec, spec])
    centers = []
    for seed in range(40):
        torch.manual_seed(seed)
        first, second = policy(images)
        for view in (first, second):
            column = 255 * view[:, 0].mean((1, 2))
            width = 255 * (view[:, 0, :, -1] - view[:, 0, :, 0]).mean(1) * 24 / 23
            height = 255 * (view[:, 1, -1] - view[:, 1, 0]).mean(1) * 24 / 23
            ratio = width / height
            assert (
                ratio > 0.6
            ).all()  # 3/4 to 4/3, to a pixel of the square; stretched it would be up to 2.7 times off
            assert (ratio < 1.7).all()
        centers.append(torch.stack([255 * view[:, 0].mean((1, 2)) for view in (first, second)]))
        assert column.isfinite().all()
    found = torch.cat(centers, dim=1)
    assert found.min() < 30  # both sides
    assert found.max() > 210
    assert abs(np.corrcoef(found.numpy())[0, 1]) < 0.15  # 320 pairs: the views of a step are cut independently


def test_evaluation_and_banks_get_the_central_square(folder):
    data = ImageFolderDataModule(folder, folder, size=90, batch_size=4, num_workers=0)
    with pytest.warns(UserWarning, match="training images too"):
        images, _ = next(iter(data.val_dataloader()))
    assert isinstance(images, torch.Tensor)
    of_bank = data.train_dataloader().dataset[0][0]
    whole, _ = next(iter(data.train_dataloader()))
    for square in (images[0], of_bank, 255 * center_squares(whole)[0]):
        columns = square[0].float().mean(0)
        assert columns[0] == pytest.approx((COLUMNS - ROWS) / 2, abs=4)
        assert columns[-1] == pytest.approx((COLUMNS + ROWS) / 2, abs=4)


class Seen(L.LightningModule):
    """Notes what a step gets."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append(images)
        return self.layer(torch.ones(1, 1)).sum() + 0 * labels.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnPolicy:
    """A policy that knows no `WholeImages`."""

    def __call__(self, images):
        return [images.float() / 255, images.float() / 255]

    def eval_transform(self, images):
        return images.float() / 255


def test_a_trainer_without_view_augmentation_gets_tensors(folder, make_trainer):
    data = ImageFolderDataModule(folder, size=32, batch_size=4, num_workers=0)
    module = Seen()
    make_trainer(max_epochs=1).fit(module, data)
    assert [image.shape for image in module.seen] == [(4, 3, 32, 32)] * 2
    assert all(type(image) is torch.Tensor for image in module.seen)


@pytest.mark.parametrize("workers", [0, 1])
def test_view_augmentation_replaces_whole_images(folder, make_trainer, workers):
    def seen(policy):
        data = ImageFolderDataModule(folder, size=32, batch_size=4, num_workers=workers)
        module = Seen()
        make_trainer(max_epochs=1, callbacks=[lc.ViewAugmentation(policy, seed=1)], enable_checkpointing=False).fit(
            module, data
        )
        return module.seen

    ours = seen(lc.augment.simclr_views(16, local_views=1))
    assert [[view.shape[-1] for view in views] for views in ours] == [[16, 16, 8]] * 2
    assert_same_bits(seen(lc.augment.simclr_views(16, local_views=1)), ours)
    assert [view.shape for view in seen(OwnPolicy())[0]] == [(4, 3, 32, 32)] * 2  # the pixels, stretched


def test_a_policy_evaluates_the_central_squares():
    images = WholeImages(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), np.array([[60, 90], [32, 8]] * 2))
    policy = lc.augment.simclr_views(16)
    assert_same_bits(policy.eval_transform(images), policy.eval_transform(center_squares(images)))
    assert (policy.eval_transform(images) - policy.eval_transform(images.pixels)).abs().max() > 0.01  # stretched


def test_accelerator_backend_and_stock_views(folder):
    images = WholeImages(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), np.array([[60, 90]] * 4))
    for options in ({"backend": "accelerator"}, {"backend": "cpu"}, {"fused": False}):
        assert [view.shape for view in lc.augment.byol_views(16, **options)(images)] == [(4, 3, 16, 16)] * 2
    views = []
    for backend in ("accelerator", "cpu"):
        torch.manual_seed(0)
        views.append(make_policy([ViewSpec(16, (0.2, 1.0), jitter_p=0.0, gray_p=0.0)], backend=backend)(images)[0])
    assert (views[0] - views[1]).abs().max() < 0.01  # the same boxes; 8 bits on a CPU
