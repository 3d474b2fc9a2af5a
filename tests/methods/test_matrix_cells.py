"""Cells of the matrix on one process: clipping, recomputed layers, compilation, onlookers, names, exports."""

import json
import shutil
from dataclasses import replace

import lightning as L
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from tests.callbacks.probe_modules import random_state
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, fill_queue, make
from tests.methods.matrix_runs import PATIENCE, Record, assert_close, batches, primary, run
from tests.methods.test_contract import (
    BATCHES,
    PIXELS,
    assert_equal_states,
    data,
    flat,
    pairs_of,
    state,
    trainer,
    weights,
)
from tests.tolerances import FORMULA, NETWORK, bound, f32

CLIP = 1e-3


class WatchSteps(L.Callback):
    """Compares what the optimizer gets with what the backward passes gave, and counts what moves."""

    def __init__(self):
        self.backward, self.steps, self.moves, self.handles, self.last = {}, [], [], [], None

    def on_train_start(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                self.handles.append(parameter.register_hook(lambda grad, name=name: self.keep(name, grad)))
        optimizer = trainer.optimizers[0]
        self.handles.append(optimizer.register_step_post_hook(lambda *_: self.on_step(pl_module)))

    def keep(self, name, gradient):
        """Add up what a backward pass gives: of one micro-batch, since a module called twice gives two parts."""
        self.backward[name] = self.backward.get(name, 0) + gradient

    def on_step(self, module):
        got = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        self.steps.append((got, self.backward))
        self.backward = {}

    def held(self, module):
        """Return copies of the weights, without prototypes: SwAV sets their length to 1 in each step, which rounds."""
        named = [(name, p) for name, p in module.named_parameters() if name != "prototypes.weight"]
        online = {name: p.detach().clone() for name, p in named if p.requires_grad}
        return online, [weights(momentum) for _, momentum in pairs_of(module)]

    def on_before_backward(self, trainer, pl_module, loss):
        """Look only here: at its start a run of SwAV brings the prototypes to length 1, which moves them once."""
        if self.last is not None:
            self.note(pl_module)
        self.last = self.held(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.note(pl_module)
        for handle in self.handles:
            handle.remove()

    def note(self, module):
        """Note whether the batch that has just ended, callbacks included, has moved the online and momentum weights."""
        now = self.held(module)
        differ = any(not torch.equal(a, b) for a, b in zip(self.last[0].values(), now[0].values(), strict=True))
        pairs = zip(self.last[1], now[1], strict=True)
        self.moves.append((differ, *(any(not torch.equal(a[key], b[key]) for key in a) for a, b in pairs)))


@primary
@pytest.mark.matrix("accumulated, clipped")
def test_accumulation_with_clipping(name, tmp_path):
    module, watch = fill_queue(make(name, lr=1.0)), WatchSteps()
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": CLIP, "limit_val_batches": 0}
    fit = trainer(tmp_path, CASES[name], epochs=1, callbacks=[watch], **settings)
    fit.fit(module, data(name))
    pairs = len(pairs_of(module))
    assert watch.moves == [(step,) * (1 + pairs) for step in (False, True) * (BATCHES // 2)]
    assert fit.global_step == len(watch.steps) == BATCHES // 2
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == BATCHES // 2
    updates = [callback.updates for callback in fit.callbacks if isinstance(callback, MomentumUpdate)]
    assert updates == [BATCHES // 2] * len(updates)
    # What a method freezes at first has no gradient any more: SwAV drops it before the clipping, DINO after it.
    clipped = [{key: given[key] for key in (got if name == "SwAV" else given)} for got, given in watch.steps]
    norms = [torch.stack([gradient.norm() for gradient in kept.values()]).norm() for kept in clipped]
    assert norms[0] > CLIP
    for (got, given), norm in zip(watch.steps, norms, strict=True):
        factor = min(1.0, CLIP / (norm + 1e-6))
        assert_close(got, {key: given[key] * factor for key in got}, bound(FORMULA) * CLIP, "gradient", scale=1.0)


def recomputed(module):
    """Let the backbone compute its layers twice, and return the name of a layer inside one of them."""
    backbone = module.backbone
    if isinstance(backbone, lc.nn.PatchGrid):
        lc.nn.checkpoint_activations(backbone.network, ["layers"])
        return "backbone.network.layers.3"
    if isinstance(backbone, TinyBackbone):
        lc.nn.checkpoint_activations(backbone, ["layers"])
        return "backbone.layers.3"
    lc.nn.checkpoint_activations(backbone)
    return next(name for name, _ in module.named_modules() if name.endswith("blocks.1.mlp"))


@primary
@pytest.mark.matrix("activation checkpointing")
def test_recomputed_layers_change_nothing(name, tmp_path):
    inside = recomputed(make(name))

    def watched_run(recompute):
        module, calls = make(name), []
        if recompute:
            recomputed(module)
        layer = dict(module.named_modules())[inside]
        handle = layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        probe = lc.OnlineLinearProbe(num_classes=9, features=inside)
        settings = {"epochs": 1, "limit_val_batches": 0}
        trainer(tmp_path, CASES[name], callbacks=[probe], **settings).fit(module, data(name))
        handle.remove()
        return state(module), flat(probe.state_dict()), sum(calls)

    (plain, probe, calls), (again, same_probe, twice) = watched_run(False), watched_run(True)
    assert_equal_states(plain, again)
    assert twice == 2 * calls > 0
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(same_probe[key])) for key, value in probe.items())


def one_block(module):
    """Leave the transformers of a module their first block: tracing a second one takes as long and adds nothing."""
    for part in module.modules():
        if isinstance(getattr(part, "blocks", None), nn.Sequential | nn.ModuleList):
            part.blocks = part.blocks[:1]
    return module


def compiled_and_not(rank, name, backend):
    """Run the method twice, in a process of its own: autograd in a fork of a process that compiled would fail.

    Of four views the last is left out, so that there is one local crop.
    """
    if CASES[name].views == 4:
        CASES[name] = replace(CASES[name], views=3)
    states = []
    for compiled in (False, True):
        module = one_block(make(name, norm=False))
        counter = torch._dynamo.utils.counters
        run(torch.compile(module, backend=backend) if compiled else module, batches(name))
        states.append(state(module))
    return states, counter["stats"]["unique_graphs"]


@primary
@pytest.mark.dist
@pytest.mark.matrix("torch.compile")
def test_compiled_equals_eager(name):
    ((states, graphs),) = run_processes(compiled_and_not, 1, name, "aot_eager", init=False, timeout=PATIENCE)
    assert graphs > 0
    assert_same_run(states)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.matrix("torch.compile")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["SimCLR", "BYOL", "MoCo"])
def test_compiled_with_inductor_equals_eager(name):
    ((states, graphs),) = run_processes(compiled_and_not, 1, name, "inductor", init=False, timeout=PATIENCE)
    assert graphs > 0
    assert_same_run(states)


def assert_same_run(states):
    eager, compiled = (
        {key: value.view(torch.float32) if key.endswith("bits") else value for key, value in one.items()}
        for one in states
    )
    assert_close(compiled, eager, bound(NETWORK), "compiled and not")


@primary
@pytest.mark.matrix("watched")
@pytest.mark.filterwarnings("ignore:.*CollapseMonitor")
def test_onlookers_change_nothing(name, tmp_path):
    def fit(watchers):
        module, seen = make(name), Record()
        torch.manual_seed(1)
        trainer(tmp_path, CASES[name], callbacks=[*watchers, seen]).fit(module, data(name))
        return module.trainer, state(module), seen.losses, random_state()

    watchers = [
        lc.OnlineLinearProbe(num_classes=9),
        lc.OnlineKNN(num_classes=9, k=3),
        lc.CollapseMonitor(every_n_steps=BATCHES, samples=16, snapshot_dir=tmp_path),
        lc.TrainingCostMonitor(),
        lc.InvarianceMonitor(samples=8, changes=["hue", "crop"], png_dir=tmp_path),
        lc.ViewLogger(png_dir=tmp_path),
        lc.EmbeddingLogger(samples=8, layout=None, png_dir=tmp_path),
    ]
    # The projector of IBOT gives two things, that of BindModalities sees one view.
    contrasts = CASES[name].views > 1 and name not in ("IBOT", "BindModalities")
    if contrasts:
        watchers.append(lc.InstanceDiscriminationMonitor(every_n_steps=1))
    (_, plain, losses, random), (run, watched, same_losses, same_random) = fit([]), fit(watchers)
    assert_equal_states(plain, watched)
    assert losses == same_losses
    assert torch.equal(random[0], same_random[0])
    assert random[1:] == same_random[1:]
    logged = {"linear_probe/top1", "knn/top1", "collapse/rankme", "throughput/images_per_s", "invariance/hue"}
    assert logged <= run.callback_metrics.keys()
    assert {path.name.split("_step")[0] for path in tmp_path.glob("*.png")} >= {"views", "embeddings_neighbours"}
    if contrasts:
        assert "contrast/top1" in run.callback_metrics


def named(name):
    """Return a method whose backbone is given by name, and that backbone anew, as timm makes it."""
    case = CASES[name]
    if case.backbone is TinyBackbone:
        backbone, kwargs = "test_resnet", {}
    else:
        backbone, kwargs = "test_vit", {"img_size": PIXELS, "patch_size": 4, "depth": 2}
    if name == "IJEPA":
        kwargs |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if name in ("MAE", "SimMIM", "Data2Vec"):
        kwargs |= {"global_pool": "avg", "fc_norm": False}  # their defaults
    if name == "Data2Vec":
        kwargs |= {"init_values": 1e-4}  # as well
    if name in ("DINOv2", "DINOv3"):
        kwargs |= {"init_values": 1e-5}  # its default, LayerScale
    settings = {"optimizer": "sgd", "lr": 0.05, "warmup_epochs": 0} | case.settings
    if name == "VICRegL":
        settings |= {"matches": (1, 1)}  # the last map of this network has one cell
    if name == "VJEPA":
        kwargs = {"frames": 4, "img_size": PIXELS, "patch_size": 4}
        module = case.make("small_video_vit", backbone_kwargs=kwargs, **settings)
        return module, lc.nn.build_tubelet_backbone("small_video_vit", backbone_kwargs=kwargs).module
    module = case.make(backbone, backbone_kwargs=kwargs or None, **settings)
    fresh = timm.create_model(backbone, num_classes=0, **kwargs)
    if name == "CPC":
        fresh = lc.nn.PatchGrid(lc.nn.replace_batchnorm(fresh), 8, 4)
    if name == "TemporalCPC":
        fresh = lc.nn.replace_batchnorm(fresh)
    return module, fresh


def fit_a_batch(module, name, tmp_path):
    """Move all weights and averages of a module, and return its trainer."""
    run = trainer(tmp_path, CASES[name], epochs=1, limit_train_batches=1, limit_val_batches=0)
    run.fit(module, data(name))
    return run


@primary
@pytest.mark.matrix("checkpoint")
def test_a_method_with_a_named_backbone_loads_without_arguments(name, tmp_path):
    module, _ = named(name)
    fit_a_batch(module, name, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
    again = type(module).load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert_equal_states(state(module), state(again))
    assert dict(module.hparams) == dict(again.hparams)


@primary
@pytest.mark.slow
@pytest.mark.matrix("exported")
def test_an_exported_backbone_gives_the_same_features(name, tmp_path):
    module, fresh = named(name)
    fit_a_batch(module, name, tmp_path)
    images = torch.rand(3, 3, PIXELS, PIXELS)
    with torch.no_grad():
        features = module.eval()(images)
    spec = {"size": PIXELS, "mean": None, "std": None}

    saved = torch.load(lc.export.export(module, tmp_path / "backbone.pt"), weights_only=True)
    assert saved["input_spec"] == spec
    fresh.load_state_dict(saved["state_dict"], strict=True)
    with torch.no_grad():
        if name != "VJEPA":  # a layout of 2-D convolutions
            fresh.to(memory_format=torch.channels_last)  # as this package lays them out
        again = fresh.eval()(images)
    torch.testing.assert_close(again, features, **f32(NETWORK))  # timm's own forward pass has other kernels

    path = lc.export.export(module, tmp_path / "backbone.onnx", format="onnx")
    session = onnxruntime.InferenceSession(path)
    (given,) = session.run(["features"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), features, **f32(NETWORK))
    assert json.loads(session.get_modelmeta().custom_metadata_map["input_spec"]) == spec
