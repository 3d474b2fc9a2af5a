"""A large contrastive batch in the memory of a small one: GradientCache runs the backbone in chunks, exactly."""

import argparse

import lightning as L
import torch

import lightning_contrast as lc


class Gradient(L.Callback):
    """Keeps the gradient of the first step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Copy it."""
        found = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.value = torch.cat(found).clone()


def step(batch_size, chunk):
    """Make one step with seed 0; return its loss, its gradient and the megabytes kept."""
    L.seed_everything(0, verbose=False)
    data = lc.data.EmojiDataModule(batch_size=batch_size)
    sizes = {"embed_dim": 96, "depth": 3, "num_heads": 3}
    # LayerNorm in the network and in the head: BatchNorm would have statistics of a chunk.
    model = lc.SimCLR(
        "small_vit", backbone_kwargs=sizes, head_norm="layer", optimizer="adamw", lr=1e-3, warmup_epochs=0
    )
    gradient, kept = Gradient(), {}  # bytes of each storage that the backward pass needs

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    callbacks = [lc.StepSeed(0), lc.ViewAugmentation(lc.augment.simclr_cifar_views(32)), gradient]
    if chunk is not None:
        callbacks.append(lc.GradientCache(chunk))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        trainer.fit(model, datamodule=data)
    return float(trainer.callback_metrics["train/loss"]), gradient.value, sum(kept.values()) / 2**20


def main():
    """Compare a step of the whole batch with one in chunks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    options = parser.parse_args()
    whole, chunked = step(options.batch_size, None), step(options.batch_size, options.chunk)
    difference = float((whole[1] - chunked[1]).norm() / whole[1].norm())
    for name, (loss, _, kept) in {"whole": whole, f"chunks of {options.chunk}": chunked}.items():
        print(f"{name}: loss {loss:.5f}, {kept:.0f} MB kept for the backward pass")
    print(f"relative difference of the gradients {difference:.1e}")


if __name__ == "__main__":
    main()
