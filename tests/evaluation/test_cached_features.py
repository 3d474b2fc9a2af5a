"""The feature pass: order, cache keys, resume after a kill, ranks, files and bad input."""

import json
import os
import signal
from types import SimpleNamespace

import lightning as L
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import lightning_contrast as lc
from lightning_contrast.augment.domains import satellite_views
from lightning_contrast.checkpoints import load_checkpoint
from lightning_contrast.evaluation import cached_features, encode, load_subject
from lightning_contrast.evaluation.feature_pass import subjects
from lightning_contrast.evaluation.feature_pass.cache import write_file
from lightning_contrast.evaluation.feature_pass.subjects import spec_transform
from tests.launch import ChildError, run_processes
from tests.tolerances import NETWORK, assert_same_bits, f32

IMAGES = torch.randint(0, 256, (26, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(26) % 4
SET = TensorDataset(IMAGES, LABELS)


class Network(nn.Module):
    """Counts its images in a file, and kills its process at one of them."""

    def __init__(self, log=None, die_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Dropout())
        self.log, self.die_at = log, die_at

    def __repr__(self):
        return "Network"

    def forward(self, images):
        if self.log is not None:
            with self.log.open("a") as file:
                file.write("x" * len(images))
            if self.die_at is not None and self.log.stat().st_size >= self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(images)


def loader(data=SET, **options):
    return DataLoader(data, 4, **options)


def run(folder, model=None, data=SET, shard_size=8, **options):
    return cached_features(
        model or Network(), loader(data, **options), folder=folder, shard_size=shard_size, progress=False
    )


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
    """The second one writes while the first one does, as two reports with one folder of features."""
    save, inside = torch.save, []

    def slow(content, file):
        if not inside:
            inside.append("second")
            write_file({"value": torch.tensor(2)}, tmp_path / "shard.pt")
        save(content, file)

    monkeypatch.setattr(os, "getpid", lambda: len(inside))
    monkeypatch.setattr(torch, "save", slow)
    first = {"value": torch.tensor(1)}
    write_file(first, tmp_path / "shard.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["shard.pt"]
    assert load_checkpoint(tmp_path / "shard.pt") == first


def test_rows_are_those_of_the_dataset_in_its_order(tmp_path):
    model = Network().train()
    expected = encode(model, IMAGES, lambda images: images / 255, batch_size=4)
    state = torch.get_rng_state()
    found = run(tmp_path, model, shuffle=True, drop_last=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(found.features, expected)
    assert_same_bits(found.labels, LABELS)
    assert model.training
    part = run(tmp_path, model, Subset(SET, [5, 3, 20]))
    assert_same_bits(part.labels, LABELS[[5, 3, 20]])


def test_a_second_pass_reads_the_files_and_changes_are_computed_again(tmp_path):
    log = tmp_path / "log"
    run(tmp_path / "cache", Network(log))
    assert log.stat().st_size == 26 + 4  # four images are part of the key
    first = run(tmp_path / "cache", Network(log))
    assert log.stat().st_size == 26 + 4 + 4
    other = Network(log)
    with torch.no_grad():
        other.layer[1].bias[0] += 1
    second = run(tmp_path / "cache", other)
    assert log.stat().st_size == 26 + 4 + 4 + 30
    assert not torch.equal(first.features, second.features)
    run(tmp_path / "cache", Network(log), TensorDataset(IMAGES, LABELS.flip(0)))
    assert log.stat().st_size == 26 + 4 + 4 + 30 + 30
    spec = load_subject(Network(log), lambda images: images.float())
    found = cached_features(spec, loader(), folder=tmp_path / "cache", shard_size=8, progress=False)
    assert not torch.equal(found.features, first.features)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_networks_without_weights_are_told_apart(tmp_path):
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, images):
            return images.flatten(1) * self.factor

    assert_same_bits(2 * run(tmp_path, Scale(1)).features, run(tmp_path, Scale(2)).features)


@pytest.mark.dist
def test_a_killed_pass_resumes_after_its_last_whole_shard(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(ChildError):
        run_processes(lambda _: run(tmp_path / "cache", Network(log, die_at=22)), 1)
    before = log.stat().st_size
    assert before == 24  # four for the key, two shards of 8, one batch of the third
    shards = sorted(path.name for path in (tmp_path / "cache").glob("*/shard*"))
    assert shards == ["shard-00000.pt", "shard-00001.pt"]
    found = run(tmp_path / "cache", Network(log))
    assert log.stat().st_size - before == 4 + 10
    assert_same_bits(found.features, run(tmp_path / "other").features)


def test_a_damaged_shard_is_computed_again(tmp_path):
    expected = run(tmp_path)
    path = next(tmp_path.glob("*/shard-00001.pt"))
    path.write_bytes(path.read_bytes()[:-50])
    assert_same_bits(run(tmp_path).features, expected.features)


@pytest.mark.dist
def test_two_ranks_share_the_work_and_give_one_processes_bits(tmp_path):
    torch.set_num_threads(1)
    expected = run(tmp_path / "one")

    def on_rank(rank):
        log = tmp_path / f"log{rank}"
        found = run(tmp_path / "two", Network(log))
        return found.features, found.labels, log.stat().st_size

    results = run_processes(on_rank, 2)
    for features, labels, _ in results:
        assert_same_bits(features, expected.features)
        assert_same_bits(labels, expected.labels)
    assert [count for _, _, count in results] == [4 + 16, 10]


def test_files_and_columns(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (200, 20, 20)).save(tmp_path / "images" / name / "0.png")
    folder = ImageFolder(tmp_path / "images", transform=pil_to_tensor)
    first = run(tmp_path / "cache", data=folder)
    assert first.labels.tolist() == [0, 1]
    Image.new("RGB", (8, 8), (20, 20, 20)).save(tmp_path / "images" / "b" / "0.png")
    assert not torch.equal(run(tmp_path / "cache", data=folder).features, first.features)
    data = lc.data.EmojiDataModule(256, captions=True)
    data.setup("test")
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    found = cached_features(model, data.test_dataloader(), folder=tmp_path / "cache", progress=False)
    assert found.columns["artist"].tolist() == [0] * 312 + [1] * 312
    assert_same_bits(found.labels, data.labels("test"))


def test_an_exported_backbone_brings_its_input(tmp_path):
    spec = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    network = lc.nn.build_backbone("small_convnet").module
    lc.export.export(network, tmp_path / "network.pt", input_spec=spec)
    subject = load_subject(tmp_path / "network.pt")
    assert subject.input_spec == spec
    assert subject.source == "file network.pt"
    images = subject.preprocess(torch.full((2, 3, 32, 40), 255, dtype=torch.uint8))
    assert images.shape == (2, 3, 16, 16)
    assert images[0, 0, 0, 0] == 2


def test_a_backbone_of_another_domain_gets_the_range_the_shape_and_the_indices_of_its_views():
    policy = satellite_views((24, 16), channels=4, scale=(0, 10_000), indices=[(3, 0)], mean=[0.5] * 5, std=[0.2] * 5)
    model = nn.Flatten()
    model.input_spec = json.loads(json.dumps(policy.input_spec))  # as in a file
    bands = torch.randint(0, 10_000, (3, 4, 30, 40), dtype=torch.int16)
    assert_same_bits(load_subject(model).preprocess(bands), policy.eval_transform(bands))


def test_a_checkpoint_of_a_run_brings_the_input_of_its_views(tmp_path):
    data = lc.data.EmojiDataModule(64)
    policy = lc.augment.simclr_views(24, mean=[0.5] * 3, std=[0.25] * 3)
    model = lc.SimCLR("small_convnet", warmup_epochs=0)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[lc.ViewAugmentation(policy)],
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    subject = load_subject(tmp_path / "run.ckpt")
    assert subject.input_spec == {"size": 24, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    images = data.images("test")[:4]
    expected = encode(model, images, policy.eval_transform)
    assert_same_bits(encode(subject.module, images, subject.preprocess), expected)
    found = load_subject(model)  # with the views of its Trainer
    assert found.input_spec == subject.input_spec
    assert_same_bits(found.preprocess(images), policy.eval_transform(images))


def test_a_name_brings_the_transform_of_timm():
    spec = {"size": 20, "mean": [0.5] * 3, "std": [0.25] * 3}
    images = torch.randint(0, 256, (2, 3, 50, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = spec_transform(spec | {"interpolation": "bicubic"}, crop_pct=0.8)(images)
    resized = F.interpolate(images.float() / 255, (25, 30), mode="bicubic", antialias=True).clamp(0, 1)
    expected = (resized[..., 2:22, 5:25] - 0.5) / 0.25
    torch.testing.assert_close(found, expected, **f32(NETWORK, size=1))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(SET)


def with_output(output):
    class Odd(nn.Module):
        def forward(self, images):
            return output(images)

    return Odd()


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (None, Stream(), TypeError, "`loader` must be a DataLoader whose rows are read by index"),
        (with_output(lambda x: x), SET, ValueError, r"`model` must return features \(B, F\) \(Odd does not\)"),
        (with_output(lambda x: (x, x)), SET, TypeError, r"`model` must return features \(B, F\) \(Odd does not\)"),
        (with_output(lambda x: x.flatten(1) * float("nan")), SET, ValueError, "`model` must return finite features"),
        (3, SET, TypeError, "`model` must be a module, a path or a name"),
        ("resnet18.pt", SET, FileNotFoundError, "resnet18.pt"),
        (None, TensorDataset(IMAGES[:0]), ValueError, "`loader` must draw at least one row"),
    ],
    ids=["stream", "map", "tuple", "NaN", "number", "no file", "no rows"],
)
def test_bad_input_is_named(tmp_path, model, data, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, model, data)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Cannot write features to"):
        run(tmp_path / "file")


def test_the_specification_of_a_timm_name_holds_its_resampling(monkeypatch):
    """An export of the network is otherwise compared and labeled as bilinear."""
    network = timm.create_model("resnet10t", num_classes=0)
    network.pretrained_cfg = dict(network.pretrained_cfg) | {"interpolation": "lanczos", "crop_pct": 0.9}
    monkeypatch.setattr(subjects, "load_teacher", lambda name: SimpleNamespace(module=network))
    assert load_subject("resnet10t").input_spec["interpolation"] == "bicubic"


def saved(method, path):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(method)
    trainer.save_checkpoint(path)
    return path


VIT = {"backbone_kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2}}


@pytest.mark.parametrize(
    "make",
    [
        lambda: lc.MAE("small_vit", decoder_dim=16, decoder_depth=1, decoder_heads=2, **VIT),
        lambda: lc.IJEPA("small_vit", predictor_dim=24, predictor_depth=1, predictor_heads=2, **VIT),
        lambda: lc.DINOv2("small_vit", num_prototypes=8, hidden_dim=8, bottleneck_dim=4, **VIT),  # layer scale
        lambda: lc.CPC("small_convnet", context_layers=1),  # no BatchNorm
        lambda: lc.TemporalCPC("small_convnet"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weights_only:UserWarning")
def test_checkpoints_of_methods_that_change_their_backbone(make, tmp_path):
    method = make().eval()
    found = load_subject(saved(method, tmp_path / "run.ckpt"))
    images = torch.rand(2, 3, 64, 64) if isinstance(method, lc.CPC) else torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.module.eval()(images), method(images))
    assert not any(name.startswith(("decoder", "head", "predictor")) for name, _ in found.module.named_parameters())


class Changed(lc.SimCLR):
    """A method of a user, with a layer in its backbone."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.backbone.extra = nn.Linear(3, 3)


@pytest.mark.filterwarnings("ignore:.*weights_only:UserWarning")
def test_checkpoints_that_cannot_be_rebuilt_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`model` must be a checkpoint of a method.*export.export"):
        load_subject(saved(Changed("small_convnet"), tmp_path / "changed.ckpt"))
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"`model` must be a checkpoint of a method.*Sequential"):
        load_subject(saved(lc.SimCLR(module, feature_dim=4), tmp_path / "module.ckpt"))


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch):
    def load(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(subjects, "load_teacher", load)
    with pytest.raises(ValueError, match="`model` must be a name whose weights timm can download, got 'resnet18: Conn"):
        load_subject("resnet18")
