"""Remedies against a shortcut: tell roles (jobs, fantasy) from activities, where most roles in training are men."""

import argparse
import json

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc

ROLES = """ artist astronaut construction-worker cook detective elf factory-worker fairy farmer firefighter genie guard
 health-worker judge mage mechanic office-worker pilot police-officer scientist singer student superhero supervillain
 teacher technologist vampire zombie """.replace("\n", "")
STRENGTHS = {"group DRO": 0.01, "HSIC": 100}  # 1 for the others
KINDS = {"HSIC": {}, "gradient reversal": {"penalty": "adversary", "num_groups": 2}}  # in each class
REMEDIES = "none", "balanced weights", "group DRO", "HSIC", "gradient reversal", "FSCL", "counterfactual pairs"


class Classifier(L.LightningModule):
    """A backbone and a linear head, trained with a remedy on batches (views, labels, gender, weights)."""

    def __init__(self, remedy, strength):
        super().__init__()
        self.backbone, width = lc.nn.build_backbone("small_convnet")
        self.head, self.remedy, self.strength = torch.nn.Linear(width, 2), remedy, strength
        self.group_dro = lc.losses.GroupDRO(4, strength)

    def training_step(self, batch, batch_idx):
        """Return the loss of a batch."""
        views, labels, gender, weights = batch
        features = self.backbone(views[0])
        if self.remedy == "group DRO":
            return self.group_dro(self.head(features), labels, 2 * labels + gender)
        loss = (torch.nn.functional.cross_entropy(self.head(features), labels, reduction="none") * weights).mean()
        if self.remedy == "FSCL":
            pair = torch.nn.functional.normalize(torch.stack([features, self.backbone(views[1])], dim=1), dim=2)
            loss = loss + self.strength * lc.losses.fair_supcon_loss(pair, labels, gender, temperature=0.1)
        return loss

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def persons(data, split):
    """Return images of men, then of the same persons as women; role (1) or activity (0), and gender (1: women)."""
    men, women = data.twins(split)
    names = [data.captions(split)[row][4:].replace(" ", "-") for row in men]
    labels = torch.tensor([int(f" {name} " in ROLES) for name in names]).repeat(2)
    return data.images(split)[torch.cat([men, women])], labels, torch.arange(2).repeat_interleave(len(men))


def run(remedy, strength, epochs, seed, fold):
    """Train with a remedy; return figures on other persons, each as a man and as a woman: gap, worst group ..."""
    L.seed_everything(seed)
    data, strength = lc.data.EmojiDataModule(validation_fold=fold), strength or STRENGTHS.get(remedy, 1)
    images, labels, gender = persons(data, "train")
    kept = (labels != gender) | (torch.rand(len(labels)) < 0.1)  # a tenth of the images that contradict the shortcut
    kept |= kept.roll(len(kept) // 2) & (remedy == "counterfactual pairs")  # each image with that of the other gender
    groups = (2 * labels + gender) * (remedy == "balanced weights")  # or all are one
    weights = lc.data.balanced_weights(groups.masked_fill(~kept, -1))
    dataset = TensorDataset(*(values[kept] for values in (images, labels, gender, weights)))
    views = lc.ViewAugmentation(lc.augment.make_policy([lc.augment.ViewSpec(32, (0.6, 1), gray_p=0)] * 2), seed=seed)
    places = [lambda batch, y=y: batch[2].where(batch[1] == y, -1) for y in range(2) if remedy in KINDS]
    penalties = [lc.AttributePenalty(of, weight=strength, name=str(y), **KINDS[remedy]) for y, of in enumerate(places)]
    model, loader = Classifier(remedy, strength), DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_epochs=epochs, callbacks=[views, *penalties], accelerator="cpu", **quiet).fit(model, loader)
    images, labels, gender = persons(data, "val")
    logits = model.head(lc.evaluation.encode(model.backbone, images, views.policy.eval_transform))
    found = lc.metrics.GroupAccuracy(4)(logits.argmax(1), labels, 2 * labels + gender)
    return {k: v.tolist() for k, v in found.items()} | {"gap": found["groups"].view(2, 2).diff().abs().max().item()}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--remedy", choices=REMEDIES, default="none")
for name, kind, default in (("strength", float, None), ("epochs", int, 60), ("seed", int, 0), ("fold", int, None)):
    parser.add_argument(f"--{name}", type=kind, default=default)  # a fold, 1-4: judge on training persons
print(json.dumps((options := vars(parser.parse_args())) | run(**options)))
