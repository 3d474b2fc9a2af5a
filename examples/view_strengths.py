"""Strengths of views: constant, growing, learned from the difficulty of the task, or the worst for the network."""

import argparse

import lightning as L
import torch

import lightning_contrast as lc
from lightning_contrast import evaluation, losses
from lightning_contrast.seeding import seeded

GRID = (0.25, 0.5, 0.75, 1.0)


class ChosenStrength(L.Callback):
    """A strength that is chosen every few steps by the loss of some fixed images.

    "worst" takes that of the greatest loss. "learned" grows while the loss is below a target and falls above it, so the
    task stays as hard as it was chosen to be.
    """

    def __init__(self, kind, policy, images, *, every=10, target=1.5, rate=0.05):
        self.kind, self.policy, self.images = kind, policy, images
        self.every, self.target, self.rate, self.value, self.course = every, target, rate, 0.5, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """Choose anew."""
        if trainer.global_step % self.every == 0:
            found = {s: self.loss(module, s) for s in (GRID if self.kind == "worst" else (self.value,))}
            up = self.rate if found.get(self.value, 0.0) < self.target else -self.rate
            self.value = max(found, key=found.get) if self.kind == "worst" else min(1.0, max(0.0, self.value + up))
            self.course.append(self.value)

    @torch.no_grad()
    def loss(self, module, strength):
        """Return the loss of the fixed images at a strength; the run does not notice."""
        self.policy.set_strength(strength)
        module.eval()
        with seeded(0, module.device):
            views = self.policy(self.images.to(module.device))
        z_a, z_b = (module.projector(module.backbone(view)) for view in views)
        module.train()
        return float(losses.nt_xent(z_a, z_b, temperature=0.2))

    def state_dict(self):
        """Return what a resumed run needs."""
        return {"value": self.value}

    def load_state_dict(self, state_dict):
        """Restore it."""
        self.value = state_dict["value"]


def main(arguments=None):
    """Train, and report frozen features and the course of the strength."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("full", "curriculum", "learned", "worst"), default="learned")
    for name, default in (("epochs", 20), ("batches", 99), ("seed", 0), ("fold", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    L.seed_everything(options.seed)
    data = lc.data.EmojiDataModule(256, seed=options.seed, validation_fold=options.fold or None)
    policy = lc.augment.simclr_cifar_views(32)
    chosen = ChosenStrength(options.kind, policy, data.images("train")[:256])
    fixed = {"full": 1.0, "curriculum": lc.augment.StrengthSchedule(0.2, 1.0)}
    strength = fixed.get(options.kind, lambda step: chosen.value)
    model = lc.SimCLR("small_convnet", temperature=0.2, optimizer="adamw", lr=2e-3, warmup_epochs=0)
    callbacks = [lc.ViewAugmentation(policy, seed=options.seed, strength=strength), lc.StepSeed(options.seed)]
    settings = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "limit_val_batches": 0}
    callbacks += [] if options.kind in fixed else [chosen]
    trainer = L.Trainer(max_epochs=options.epochs, limit_train_batches=options.batches, callbacks=callbacks, **settings)
    trainer.fit(model, datamodule=data)
    train, judged = (evaluation.encode(model, data.images(s), policy.eval_transform) for s in ("train", "val"))
    knn = evaluation.knn_top1(train, data.labels("train"), judged, data.labels("val"), num_classes=9)
    print(f"{options.kind}: k-NN {knn:.3f}, strengths {[round(value, 2) for value in chosen.course[-5:]]}")
    return knn, chosen.course


if __name__ == "__main__":
    main()
