"""Three LightningModules as their authors would write them: nothing here knows of this package."""

import lightning as L
import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

CLASSES = 3


def convolutions(width, final):
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2),
        nn.BatchNorm2d(width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.AdaptiveAvgPool2d(2),
        final,
    )


def labelled_images(batch_size=8):
    """Return loaders of (images in 0..1, labels), as for any classifier."""
    sets = [FakeData(size, (3, 12, 12), CLASSES, ToTensor()) for size in (32, 16)]
    return DataLoader(sets[0], batch_size, shuffle=True), DataLoader(sets[1], batch_size)


class Classifier(L.LightningModule):
    """A supervised classifier with a schedule and a metric of its own."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = convolutions(6, nn.Flatten())
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images):
        return self.head(self.dropout(self.encoder(images)))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", (self(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class LightlySimCLR(pl.LightningModule):
    """The SimCLR example of lightly's documentation, with a small backbone, and a validation step for the probes."""

    def __init__(self):
        super().__init__()
        self.backbone = convolutions(6, nn.AdaptiveAvgPool2d(1))
        self.projection_head = SimCLRProjectionHead(6, 12, 8)
        self.criterion = NTXentLoss()

    def forward(self, x):
        x = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(x)

    def training_step(self, batch, batch_index):
        (x0, x1) = batch[0]
        z0 = self.forward(x0)
        z1 = self.forward(x1)
        loss = self.criterion(z0, z1)
        self.log("train_loss_ssl", loss)
        return loss

    def validation_step(self, batch, batch_index):
        self.log("val_norm", self.forward(batch[0]).norm(dim=1).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def lightly_views(batch_size=8):
    """Return loaders of ([view, view], labels, file names), as lightly's transform and dataset make them."""
    transform = SimCLRTransform(input_size=12)
    dataset = LightlyDataset.from_torch_dataset(FakeData(32, (3, 16, 16), CLASSES), transform=transform)
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True), labelled_images()[1]


class GAN(L.LightningModule):
    """A generative adversarial network as in Lightning's own tutorial: two optimizers, and `forward` takes noise."""

    def __init__(self, latent_dim=5):
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim = latent_dim
        self.generator = nn.Sequential(nn.Linear(latent_dim, 3 * 12 * 12), nn.Sigmoid(), nn.Unflatten(1, (3, 12, 12)))
        self.discriminator = nn.Sequential(convolutions(6, nn.Flatten()), nn.Linear(24, 1))

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, judged, real):
        return F.binary_cross_entropy_with_logits(judged, torch.full_like(judged, float(real)))

    def training_step(self, batch, batch_idx):
        images, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(len(images), self.latent_dim).type_as(images)

        self.toggle_optimizer(optimizer_g)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), True)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real = self.adversarial_loss(self.discriminator(images), True)
        fake = self.adversarial_loss(self.discriminator(self(z).detach()), False)
        d_loss = (real + fake) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def validation_step(self, batch, batch_idx):
        self.log("val_real", self.discriminator(batch[0]).mean())

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=2e-4) for net in (self.generator, self.discriminator)]
