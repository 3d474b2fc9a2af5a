"""The command ``lightning-contrast embed``: write the features of a data set as parquet shards."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

from lightning_contrast._checks import check_choice, fail
from lightning_contrast.cli._command_line import Parser
from lightning_contrast.cli._names import short_names_in_yaml

_DESCRIPTION = (
    "Write the features, labels and paths of a data set as parquet shards, resumed by shard. Start it with torchrun "
    "for several processes, or with --ray_workers on a Ray cluster."
)
CPU = torch.device("cpu")
_SPLITS = ("train", "val", "test", "predict")


def run_embed(args: Sequence[str]) -> Path:
    """Parse the arguments of the command, embed the data and print the folder.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The folder.

    Raises:
        SystemExit: With status 2, if the arguments cannot be parsed.
        ValueError: If the split is unknown, or the machine has no such device.
    """
    from lightning_contrast.evaluation import embed_dataset, load_subject

    parser = Parser(prog="lightning-contrast embed", description=_DESCRIPTION)
    parser.add_argument("model", type=str, help="path of a checkpoint or an exported backbone, or name of timm")
    parser.add_argument("folder", type=str, help="folder of the shards")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    parser.add_argument("--split", type=str, default="predict", help="train, val, test or predict")
    parser.add_argument("--shard_size", type=int, default=4096, help="rows per file")
    parser.add_argument("--device", type=str, default="auto", help="of the network; auto: a GPU if there is one")
    parser.add_argument("--ray_workers", type=int, default=0, help="actors of Ray; 0: without Ray")
    with short_names_in_yaml():
        config = parser.parse_args(list(args))
        instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # its name since jsonargparse 4.49
        built = instantiate(config)
    check_choice("split", built.split, _SPLITS)
    starts = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized()  # by torchrun
    if starts:
        torch.distributed.init_process_group("gloo")
    try:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # downloads, once per machine
            built.data.prepare_data()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        built.data.setup({"train": "fit", "val": "validate"}.get(built.split, built.split))
        loader = getattr(built.data, f"{built.split}_dataloader")()
        subject = load_subject(built.model)
        subject.module.to(_device(built.device))
        folder = embed_dataset(
            subject, loader, built.folder, shard_size=built.shard_size, ray_workers=built.ray_workers
        )
    finally:
        if starts:
            torch.distributed.destroy_process_group()
    sys.stdout.write(f"{folder}\n")
    return folder


def _device(name: str) -> torch.device:
    """Return the device of the network; "auto" is the GPU of this process among those of the machine."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, or no driver
            fail("device", "be a device of this machine", name, str(error).strip().splitlines()[0].rstrip("."))
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else CPU
