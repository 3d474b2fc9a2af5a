"""The same run on one process, by DDP, or sharded by FSDP: python launch.py --strategy ddp --devices 2.

On several nodes start it on each with torchrun or srun, and set num_nodes: see docs/launch.md.
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import lightning_contrast as lc


def strategy(name, devices):
    """Return a strategy of Lightning: copies of the model that average gradients, or shards of it (FSDP2)."""
    if name == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1) if name == "fsdp" else "auto"


def main():
    """Train SimCLR with a transformer; W processes give the loss of one with the joined batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", choices=["auto", "ddp", "fsdp"], default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu", help="gpu for accelerators")
    parser.add_argument("--batch_size", type=int, default=128, help="of all devices together")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batches", type=int, default=19, help="per epoch")
    options = parser.parse_args()
    L.seed_everything(0)
    data = lc.data.EmojiDataModule(batch_size=options.batch_size // options.devices)  # of one process
    sizes = {"embed_dim": 96, "depth": 3, "num_heads": 3}
    model = lc.SimCLR(
        "small_vit", backbone_kwargs=sizes, head_norm="layer", optimizer="adamw", lr=1e-3, warmup_epochs=0
    )
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=strategy(options.strategy, options.devices),
        max_epochs=options.epochs,
        limit_train_batches=options.batches,
        limit_val_batches=0,
        enable_progress_bar=False,
        callbacks=[lc.StepSeed(0), lc.ViewAugmentation(lc.augment.simclr_cifar_views(32))],
    )
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint("launch.ckpt")  # called on every rank, which a sharded model needs
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    loss = float(trainer.callback_metrics["train/loss"])
    if trainer.is_global_zero:
        print(f"{options.strategy}, {trainer.world_size} processes: loss {loss:.4f}, rank 0 holds {held / total:.2f}")
        print(f"{torch.distributed.get_backend()}" if torch.distributed.is_initialized() else "one process")


if __name__ == "__main__":
    main()
