"""Your own backbone: a timm name, networks of torchvision and of the Transformers library, and a module of your own."""

import argparse

import lightning as L
import torchvision
from torch import nn

import lightning_contrast as lc


def hugging_face_resnet50():
    """A ResNet-50 of the Transformers library, with random weights and a stem for 32 pixels."""
    from transformers import ResNetConfig, ResNetModel  # pip install transformers

    network = ResNetModel(ResNetConfig())  # ResNetModel.from_pretrained(...) has weights
    network.embedder.embedder.convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.embedder.pooler = nn.Identity()
    return network


def hugging_face_vit():
    """A small ViT of the Transformers library, with random weights."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 192}
    return ViTModel(ViTConfig(image_size=32, patch_size=4, **sizes), add_pooling_layer=False)


def torchvision_resnet18():
    """A ResNet-18 of torchvision without its classifier."""
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return network


class OwnNetwork(nn.Module):
    """Any module from images (B, 3, H, W) to features (B, F) or maps (B, F, h, w), which are averaged."""

    num_features = 64  # F

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1))

    def forward(self, images):
        """Return a map (B, 64, 4, 4)."""
        return self.layers(images)


BACKBONES = {  # what is given to a method as `backbone`, and its options
    "timm": lambda: ("resnet10t", {"small_images": True}),
    "torchvision": lambda: (torchvision_resnet18(), {"small_images": True, "feature_dim": 512}),
    "huggingface": lambda: (hugging_face_resnet50(), {}),
    "huggingface vit": lambda: (hugging_face_vit(), {"tokens": "cls"}),
    "own": lambda: (OwnNetwork(), {}),
}


def main():
    """Train MoCo with the backbone, and encode with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=list(BACKBONES), default="torchvision")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, default=38, help="per epoch")
    options = parser.parse_args()
    L.seed_everything(0)
    backbone, settings = BACKBONES[options.backbone]()
    model = lc.MoCo(backbone, queue_size=1024, optimizer="adamw", lr=1e-3, warmup_epochs=0, **settings)
    data, policy = lc.data.EmojiDataModule(batch_size=64), lc.MoCo.views(32)
    trainer = L.Trainer(max_epochs=options.epochs, limit_train_batches=options.batches, limit_val_batches=0)
    trainer.callbacks.append(lc.ViewAugmentation(policy))
    trainer.fit(model, datamodule=data)
    features = lc.evaluation.encode(model, data.images("val")[:64], policy.eval_transform)
    print(f"{options.backbone}: features {tuple(features.shape)}, RankMe {float(lc.metrics.rankme(features)):.1f}")


if __name__ == "__main__":
    main()
