"""SimCLR's own properties, and what the base class tells of a wrong set-up."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.optim import LARS
from tests.launch import run_processes
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, BATCHES, Data, as_is, run_step, step_batch, trainer
from tests.tolerances import TRAINING, f32, near

CASE = CASES["SimCLR"]


def dense_nt_xent(a, b, temperature):
    """Average -log softmax of the partner over all 2N anchors, in plain loops."""
    z = F.normalize(torch.cat([a, b]).detach().double(), dim=1)
    n, total = len(a), 0.0
    for i in range(2 * n):
        logits = {j: float(z[i] @ z[j]) / temperature for j in range(2 * n) if j != i}
        denominator = sum(torch.tensor(value).double().exp() for value in logits.values())
        total += float(denominator.log()) - logits[(i + n) % (2 * n)]
    return total / (2 * n)


@pytest.mark.parametrize("head_layers", [2, 3])
def test_loss_is_the_papers(head_layers):
    module = make("SimCLR", head_layers=head_layers, temperature=0.3)
    (view_a, view_b), labels = step_batch(CASE)
    loss = run_step(module, [[view_a, view_b], labels])["loss"]
    projections = module.projector(module.backbone(torch.cat([view_a, view_b])))
    assert loss.detach().item() == near(dense_nt_xent(*projections.chunk(2), 0.3))


def layer_names(head):
    return [type(layer).__name__.removeprefix("_Scale") for layer in head.modules() if not list(layer.children())]


@pytest.mark.parametrize("layers", [2, 3])
def test_head_equals_the_reference(layers):
    module = make("SimCLR", head_layers=layers)
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert layer_names(module.projector) == [*hidden * (layers - 1), "Linear", "BatchNorm1d"]
    linears = [m for m in module.projector.modules() if isinstance(m, nn.Linear)]
    assert [linear.bias for linear in linears] == [None] * layers
    assert [linear.out_features for linear in linears] == [8] * (layers - 1) + [128]
    last = [m for m in module.projector.modules() if isinstance(m, nn.BatchNorm1d)][-1]
    assert last.weight is not None
    assert last.bias is None


def test_evaluation_layer_takes_the_features_behind_the_first_layer_of_the_same_head():
    plain, tapped = make("SimCLR", head_layers=3).eval(), make("SimCLR", head_layers=3, evaluation_layer=1).eval()
    images = torch.rand(5, 3, 16, 16)
    first_layer = plain.projector.layers[:3]
    torch.testing.assert_close(tapped(images), first_layer(plain(images)))
    torch.testing.assert_close(tapped.projector(tapped(images)), plain.projector(plain(images)))


def test_own_projector_replaces_the_head():
    own = nn.Linear(8, 5)
    module = make("SimCLR", projector=own)
    assert module.projector is own
    run_step(module, step_batch(CASE))["loss"].backward()
    assert own.weight.grad is not None


def test_paper_defaults(tmp_path):
    torch.manual_seed(0)
    module = lc.SimCLR(TinyBackbone(), warmup_epochs=1)
    fit = trainer(tmp_path, CASE, epochs=2, accumulate_grad_batches=2)
    fit.fit(module, Data(BATCH))
    optimizer = fit.optimizers[0]
    assert isinstance(optimizer, LARS)
    assert module.temperature == 0.1
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-6, 0.0}
    # 0.3 x 8 images x 1 rank x 2 micro-batches / 256
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.3 * BATCH * 2 / 256)


def test_warmup_then_cosine_per_step(tmp_path):
    rates = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = make("SimCLR", lr=1.0, warmup_epochs=1)
    trainer(tmp_path, CASE, epochs=3, callbacks=[Rates()]).fit(module, Data(BATCH))
    warm, total = BATCHES, 3 * BATCHES
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / (total - warm))).item()) for k in range(total - warm)]
    assert rates == near([k / warm for k in range(warm)] + cosine, size=1)


@pytest.mark.slow
def test_optimizer_may_be_a_class_or_a_function(tmp_path):
    for optimizer in (torch.optim.RMSprop, lambda groups, lr: torch.optim.SGD(groups, lr=2 * lr)):
        module = make("SimCLR", optimizer=optimizer, lr=0.01)
        fit = trainer(tmp_path, CASE, epochs=1, limit_val_batches=0)
        fit.fit(module, Data(BATCH))
        fit.save_checkpoint(tmp_path / "callable.ckpt")
        saved = torch.load(tmp_path / "callable.ckpt", weights_only=True)["hyper_parameters"]["optimizer"]
        with pytest.raises(ValueError, match="optimizer="):  # a note in place of the callable
            make("SimCLR", optimizer=saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"`temperature` must be > 0, got 0\.0"),
        ({"temperature": -1.0}, r"`temperature` must be > 0"),
        ({"lr": 0.0}, r"`lr` must be > 0"),
        ({"weight_decay": -1e-4}, r"`weight_decay` must be >= 0"),
        ({"warmup_epochs": -1}, r"`warmup_epochs` must be >= 0"),
        ({"optimizer": "sdg"}, r"`optimizer` must be one of .* Did you mean 'sgd'"),
        ({"head_layers": 4}, r"`head_layers` must be one of 2, 3"),
        ({"head_norm": "group"}, r"`norm` must be one of"),
        ({"evaluation_layer": 1}, r"`evaluation_layer` must be 0 without SimCLR v2's own head"),
        ({"evaluation_layer": 1, "head_layers": 3, "projector": nn.Linear(8, 8)}, r"`evaluation_layer`"),
        ({"projection_dim": 0}, r"must be >= 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lc.SimCLR(TinyBackbone(), **arguments)


def test_unknown_backbone_names_near_ones():
    with pytest.raises(ValueError, match="resnet18"):
        lc.SimCLR("resnet_18")


def test_wrong_type_of_optimizer():
    with pytest.raises(TypeError, match="optimizer"):
        lc.SimCLR(TinyBackbone(), optimizer=3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([torch.rand(4, 3, 16, 16), torch.arange(4)], "ViewAugmentation"),
        ([[torch.rand(4, 3, 16, 16)], torch.arange(4)], "hold at least 2 views, got 1"),
        ([[torch.rand(4, 3, 16, 16), torch.rand(3, 3, 16, 16)], torch.arange(4)], "equal batch sizes"),
        ([[torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)], torch.arange(1)], "at least 2, got 1"),
    ],
)
def test_bad_batches(batch, message):
    with pytest.raises(ValueError, match=message):
        run_step(make("SimCLR"), batch)


def test_uint8_images_in_validation_name_the_callback():
    with pytest.raises(ValueError, match="ViewAugmentation"):
        make("SimCLR").validation_step((torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None), 0)


def test_image_size_that_the_backbone_cannot_take():
    module = lc.SimCLR("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="img_size"):
        run_step(module, [[torch.rand(2, 3, 32, 32)] * 2, torch.arange(2)])


def fit_without_end(tmp_path, **kwargs):
    trainer(tmp_path, CASE, epochs=-1, **kwargs).fit(make("SimCLR"), Data(BATCH))


@pytest.mark.slow
def test_endless_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`max_epochs` must end the run for the schedules, got -1.*max_steps"):
        fit_without_end(tmp_path)


def test_endless_epochs_with_max_steps_are_a_run(tmp_path):
    fit_without_end(tmp_path, max_steps=3)


def test_warmup_longer_than_the_run_names_both(tmp_path):
    with pytest.raises(ValueError, match=rf"fit into the {BATCHES} steps of the run, got '2 epochs of {BATCHES} st"):
        trainer(tmp_path, CASE, epochs=1).fit(make("SimCLR", warmup_epochs=2), Data(BATCH))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_loader_that_does_not_tell_its_batch_size_needs_lr(tmp_path):
    batches = [step_batch(CASE)] * 3
    fit = trainer(tmp_path, CASE, epochs=1, limit_val_batches=0)
    fit.callbacks = [c for c in fit.callbacks if not isinstance(c, lc.ViewAugmentation)]
    with pytest.raises(ValueError, match="`lr` must be given"):
        fit.fit(lc.SimCLR(TinyBackbone(), warmup_epochs=0), batches)


def test_warns_of_batchnorm_on_several_ranks():
    module = make("SimCLR")
    module._trainer = type("Ranks", (), {"world_size": 2})()
    with pytest.warns(UserWarning, match="sync_batchnorm=True"):
        module.on_fit_start()


def test_predict_gives_features_of_plain_images(tmp_path):
    module, data = make("SimCLR"), Data(BATCH)
    out = torch.cat(trainer(tmp_path, CASE).predict(module, data))
    expected = module.eval()(data.images("test").float() / 255)
    torch.testing.assert_close(out, expected.detach())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        ("resnet10t", {"small_images": True}),
        ("resnext26ts", {}),
        ("efficientnet_b0", {"small_images": True}),
        ("mobilenetv3_small_050", {"small_images": True}),
        ("convnext_atto", {"small_images": True}),
        ("swin_tiny_patch4_window7_224", {"backbone_kwargs": {"img_size": 32, "window_size": 4}}),
        ("vit_tiny_patch16_224", {"backbone_kwargs": {"img_size": 32, "patch_size": 8}}),
        ("resnet18x2", {"small_images": True}),
    ],
)
def test_a_member_of_each_family_takes_a_step(backbone, arguments):
    torch.manual_seed(0)
    module = lc.SimCLR(backbone, **arguments)
    out = run_step(module, [[torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)], torch.arange(4)])
    assert out["features"].shape == (4, module.feature_dim)
    out["loss"].backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def fsdp2_fit(rank, world_size):
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.tensor import DTensor

    (view_a, view_b), labels = step_batch(CASE)
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    share = [[view_a[rows], view_b[rows]], labels[rows]]
    module = make("SimCLR", norm=False).to(memory_format=torch.channels_last)  # as backbones of ours are
    strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": world_size, "logger": False, "use_distributed_sampler": False}
    fit = L.Trainer(max_epochs=2, strategy=strategy, limit_val_batches=0, **settings, **quiet)
    fit.fit(module, DataLoader([share] * 2, batch_size=None, collate_fn=as_is))
    assert all(isinstance(p, DTensor) for p in module.parameters())
    assert any(p.to_local().numel() < p.numel() for p in module.parameters()), "nothing is sharded"
    return {name: p.full_tensor().detach() for name, p in module.named_parameters()}


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # of the flattened features
def test_fsdp2_shards_and_equals_one_process():
    module = make("SimCLR", norm=False)
    fit = trainer(".", CASE, epochs=2, limit_val_batches=0)
    fit.callbacks = [c for c in fit.callbacks if not isinstance(c, lc.ViewAugmentation)]
    fit.fit(module, DataLoader([step_batch(CASE)] * 2, batch_size=None, collate_fn=as_is))
    for weights in run_processes(fsdp2_fit, 2, 2, init=False):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), **f32(TRAINING, size=0.1))


class StatefulBatches:
    """Somebody's own loader with a state, as torchdata's is, that yields views."""

    batch_size = BATCH

    def __init__(self):
        self.position, self.served = 0, []

    def __len__(self):
        return BATCHES

    def __iter__(self):
        while self.position < BATCHES:
            self.position += 1
            self.served.append(self.position)
            yield step_batch(CASE)
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The dirpath has changed")
def test_a_foreign_loader_gets_its_state_back_although_the_schedule_asked_for_its_length(tmp_path):
    def fit(folder, **kwargs):
        saved = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
        run = trainer(tmp_path, CASE, epochs=1, callbacks=[saved], limit_val_batches=0)
        run.callbacks = [c for c in run.callbacks if not isinstance(c, lc.ViewAugmentation)]
        loader = StatefulBatches()
        run.fit(make("SimCLR", lr=None), loader, **kwargs)
        return loader.served

    assert fit("whole") == [1, 2, 3, 4]
    assert fit("resumed", ckpt_path=tmp_path / "whole" / "step=2.ckpt", weights_only=True) == [3, 4]


def test_checkpoint_brings_negatives_and_the_schedule_of_the_temperature_back(tmp_path):
    negatives, schedule = lc.losses.Negatives("hard", beta=0.5), lc.nn.ScheduledTemperature(0.5, 0.1, steps=9)
    module = lc.SimCLR("small_convnet", weighting=negatives, temperature=schedule)
    fit = L.Trainer(accelerator="cpu", logger=False, max_epochs=1, default_root_dir=tmp_path)
    fit.strategy.connect(module)
    fit.save_checkpoint(tmp_path / "simclr.ckpt")
    saved = torch.load(tmp_path / "simclr.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["weighting"]["beta"] == 0.5
    loaded = lc.SimCLR.load_from_checkpoint(tmp_path / "simclr.ckpt", weights_only=True)
    assert (loaded.weighting, loaded.temperature) == (negatives, schedule)
