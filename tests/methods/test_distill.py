"""Distill and SEED: the teacher is no part of the student, its precision and mode, where it comes from, its cache."""

import copy
import functools

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.nn import FeatureCache, FrozenTeacher, build_backbone
from lightning_contrast.nn import distillation_objectives as objectives
from tests.callbacks.step_modules import QUIET
from tests.methods.cases import CASES, TinyBackbone, Tutor, fill_queue, make
from tests.methods.test_contract import BATCH, BATCHES, PIXELS, data, run_step, step_batch, trainer
from tests.tolerances import FORMULA, NETWORK, f32, near


class Counting(Tutor):
    """Counts its forward passes, and notes what it got."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, images):
        self.calls += 1
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        self.seen.append((grad, autocast, self.training, images.dtype))
        return super().forward(images)


def images(seed=5):
    return step_batch(CASES["Distill"], seed=seed)[0][0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_teacher_runs_once_a_step_in_its_precision_in_eval_mode_without_gradient(precision, tmp_path):
    teacher = Counting()
    module = make("Distill", teacher=teacher)
    before = copy.deepcopy(teacher.state_dict())
    run = trainer(tmp_path, CASES["Distill"], epochs=1, limit_val_batches=1, precision=precision)
    run.fit(module, data("Distill"))
    assert teacher.calls == BATCHES
    assert set(teacher.seen) == {(False, False, False, torch.float64)}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert module.teacher is teacher


def test_no_parameter_of_the_teacher_is_one_of_the_module(tmp_path):
    module = make("SEED")
    held = {id(parameter) for parameter in module.teacher.parameters()}
    assert held
    assert not held & {id(parameter) for parameter in module.parameters()}
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    assert not any("teacher" in name and "digest" not in name for name in module.state_dict())
    module.train()
    module.bfloat16()
    assert next(module.teacher.parameters()).dtype == torch.float64


def test_losses_are_those_of_the_features_of_both():
    module = fill_queue(make("SEED", temperature=0.3, teacher_temperature=0.05))
    view = images()
    student, teacher = module.projector(module.backbone(view)), module.teacher(view.double())
    expected = losses.seed_loss(
        student,
        teacher.float(),
        module.objective.queue.features,
        student_temperature=0.3,
        teacher_temperature=0.05,
        queue_mask=module.objective.queue.mask,
    )
    out = run_step(module, [view])
    torch.testing.assert_close(out["loss"].float(), expected, **f32(NETWORK))
    torch.testing.assert_close(out["keys"].float(), F.normalize(teacher.float(), dim=1), **f32(FORMULA))


def test_compress_with_one_queue_compares_both_with_the_teachers_features():
    module, view = fill_queue(make("Distill", loss="compress_one_queue", queue_size=24)), images()
    assert isinstance(module.projector, nn.Identity)
    queue = module.objective.queue
    student, teacher = module.backbone(view), module.teacher(view.double()).float()
    rows = queue.features, queue.features
    expected = losses.compress_loss(student, teacher, *rows, temperature=0.04, queue_mask=queue.mask)
    out = run_step(module, [view])
    torch.testing.assert_close(out["loss"], expected, **f32(NETWORK, size=10))
    torch.testing.assert_close(out["keys"], F.normalize(teacher, dim=1), **f32(FORMULA))
    other = make("Distill", loss="compress_one_queue", queue_size=24, teacher=Wide()).projector
    assert (other.in_features, other.out_features) == (8, 5)


def test_compress_with_momentum_queues_the_keys_of_the_ema_network():
    plain, module = (
        fill_queue(make("Distill", loss=loss, queue_size=24)) for loss in ("compress", "compress_momentum")
    )
    with torch.no_grad():
        next(module.momentum_backbone.parameters()).mul_(-0.5)
    view = images()
    before, out = run_step(plain, [view]), run_step(module, [view])
    assert torch.equal(before["loss"], out["loss"])
    assert torch.equal(before["keys"], out["keys"])
    keys = F.normalize(module.momentum_backbone(view), dim=1)
    torch.testing.assert_close(out["student_keys"], keys, **f32(FORMULA))
    assert not torch.allclose(before["student_keys"], out["student_keys"], atol=0.1)
    assert not out["student_keys"].requires_grad
    assert [type(callback) for callback in module.default_callbacks()] == [lc.QueueUpdate, lc.MomentumUpdate]
    assert module.momentum_pairs() == [(module.backbone, module.momentum_backbone)]  # the head is an identity


def test_small_crops_have_a_queue_and_a_loss_of_their_own():
    module = fill_queue(make("SEED", small_crops=2))
    view, small = images(), [images(seed)[..., :8, :8] for seed in (6, 7)]
    own, crops = module.objective.queue, module.objective.small_queue
    with torch.no_grad():
        crops.features.copy_(crops.features.flip(1))
    expected = 0
    for queue, rows in ((own, view), (crops, torch.cat(small))):  # a batch of its own for BatchNorm
        student, teacher = module.projector(module.backbone(rows)), module.teacher(rows.double()).float()
        temperatures = {"student_temperature": 0.2, "teacher_temperature": 0.01}
        expected += losses.seed_loss(student, teacher, queue.features, **temperatures, queue_mask=queue.mask)
    out = run_step(module, [[view, *small]])
    torch.testing.assert_close(out["loss"], expected, **f32(NETWORK, size=10))
    first = F.normalize(module.teacher(small[0].double()).float(), dim=1)
    torch.testing.assert_close(out["small_keys"], first, **f32(FORMULA))
    assert out["features"].shape == (BATCH, 8)
    with pytest.raises(ValueError, match="must hold 3 views"):
        run_step(module, [[view, *small[:1]]])


def test_a_run_with_small_crops_fills_both_queues():
    policy = lc.SEED.views(16, small_crops=3, small_size=8)
    shapes = [tuple(view.shape) for view in policy(torch.rand(2, 3, 20, 20))]
    assert shapes == [(2, 3, 16, 16), *[(2, 3, 8, 8)] * 3]
    module = make("SEED", small_crops=3)
    loader = torch.utils.data.DataLoader(torch.randint(256, (8, 3, 20, 20), dtype=torch.uint8), batch_size=4)
    settings = {"max_epochs": 1, "limit_val_batches": 0, "callbacks": [lc.ViewAugmentation(policy)]}
    run = L.Trainer(**settings, **QUIET)
    run.fit(module, loader, loader)
    assert int(module.objective.queue.mask.sum()) == int(module.objective.small_queue.mask.sum()) == 8
    assert not torch.allclose(module.objective.queue.features[:8], module.objective.small_queue.features[:8])


def test_disco_adds_the_contrast_of_the_students_views():
    batch = step_batch(CASES["Distill disco"])
    both, alone = (fill_queue(make("Distill disco", contrastive_weight=w)) for w in (1.0, 0.0))
    a, b = batch[0]
    key = both.momentum_projector(both.momentum_backbone(b))
    query = both.projector(both.backbone(a))
    queue = both.objective.queue
    contrast = losses.info_nce(query, key, queue.features, temperature=0.2, negatives_mask=queue.mask)
    difference = run_step(both, batch)["loss"] - run_step(alone, batch)["loss"]
    assert difference.item() == near(contrast.item(), NETWORK, size=100.0)


def test_crd_draws_every_image_but_itself_and_takes_z_once():
    module = make("Distill crd", num_negatives=0)
    indices = torch.tensor([0, 5, 31])
    drawn = module.objective.negatives(indices)
    assert [sorted(row) for row in drawn.tolist()] == [[i for i in range(32) if i != own] for own in (0, 5, 31)]
    some = make("Distill crd", num_negatives=400).objective.negatives(indices)
    assert all(set(row) == set(range(32)) - {own} for row, own in zip(some.tolist(), (0, 5, 31), strict=True))
    batch = step_batch(CASES["Distill crd"])
    run_step(module, batch)
    z = module.objective.normalizer_bits.clone()
    assert bool((z.view(torch.float32) > 0).all())
    with torch.no_grad():
        module.objective.teacher_head.weight.mul_(2)
    run_step(module, batch)
    assert torch.equal(module.objective.normalizer_bits, z)


def test_crd_estimates_z_in_the_first_step_only_and_again_after_a_load_without_it(monkeypatch):
    counted, estimate = [], objectives.crd_normalizers
    monkeypatch.setattr(objectives, "crd_normalizers", lambda *a, **k: counted.append(1) or estimate(*a, **k))
    module, batch = make("Distill crd"), step_batch(CASES["Distill crd"])
    fresh = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(3):
        run_step(module, batch)
    assert len(counted) == 1
    used = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(fresh)  # as a tuner does after its trial
    assert run_step(module, batch)["loss"].isfinite()
    assert len(counted) == 2
    module.load_state_dict(used)
    run_step(module, batch)
    assert torch.equal(module.objective.normalizer_bits, used["objective.normalizer_bits"])


def test_cached_features_are_those_of_the_first_view_and_the_teacher_rests(tmp_path):
    teacher = Counting()
    module = make("Distill features cached", teacher=teacher)
    run = trainer(tmp_path, CASES["Distill features cached"], epochs=3, limit_val_batches=0)
    run.fit(module, data("Distill features cached"))
    assert teacher.calls == BATCHES
    assert bool(module.cache.mask.all())
    first = module.cache.features.clone()
    module.cache.push(torch.ones(2, 8), torch.tensor([3, 4]))
    assert torch.equal(module.cache.features[5:], first[5:])
    view, indices = images(), torch.arange(BATCH)
    (rows,) = module.targets([view], indices)
    assert torch.equal(rows, module.cache.features[:BATCH])
    assert teacher.calls == BATCHES


def test_a_cache_that_knows_some_asks_for_the_others():
    module = make("Distill features cached")
    module.cache.push(torch.full((2, 8), 7.0), torch.tensor([1, 30]))
    view = images()
    (rows,) = module.targets([view], torch.arange(BATCH))
    expected = module.teacher(view.double()).detach()
    expected[1] = 7
    torch.testing.assert_close(rows, expected)


def test_the_cache_keeps_rows_unchanged_and_ignores_what_is_not_finite():
    cache = FeatureCache(4, 2)
    rows = torch.tensor([[3.0, 4.0], [torch.nan, 1.0], [8.0, 8.0]])
    cache.push(rows, torch.tensor([2, 0, 2]))
    assert cache.features.tolist() == [[0, 0], [0, 0], [8, 8], [0, 0]]
    assert cache.mask.tolist() == [False, False, True, False]


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_teacher(tmp_path):
    first = trainer(tmp_path, CASES["SEED"], epochs=1, limit_val_batches=0)
    first.fit(make("SEED"), data("SEED"))
    first.save_checkpoint(tmp_path / "one.ckpt")
    other = Tutor()
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1e-3
    module = make("SEED", teacher=other)
    run = trainer(tmp_path, CASES["SEED"], epochs=2, limit_val_batches=0)
    with pytest.raises(ValueError, match="`teacher` must be that of the checkpoint"):
        run.fit(module, data("SEED"), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


@pytest.mark.parametrize("kind", [lc.Distill, lc.SEED])
def test_a_teacher_that_is_a_module_has_to_be_given_to_load_a_checkpoint(kind, tmp_path):
    module = kind("small_convnet", Tutor(), optimizer="sgd", lr=0.1, backbone_kwargs={"width": 2})
    path = tmp_path / "one.ckpt"
    saved = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(saved | {"pytorch-lightning_version": "2.5.0"}, path)
    load = functools.partial(kind.load_from_checkpoint, path, weights_only=True)
    with pytest.raises(ValueError, match=r"'teacher': .*Call `load_from_checkpoint\(path, teacher=\.\.\.\)`"):
        load()
    teacher = Tutor()
    assert load(teacher=teacher).teacher is teacher


def test_teachers_by_name_file_and_checkpoint(tmp_path):
    kwargs = {"width": 3}
    state = torch.get_rng_state()
    named = lc.Distill(TinyBackbone(), "small_convnet", teacher_kwargs=kwargs | {"pretrained": False})
    assert named.frozen_teacher.feature_dim == 24
    torch.set_rng_state(state)
    method = lc.SimCLR("small_convnet", backbone_kwargs=kwargs, lr=0.1)
    run_step(method, [[torch.rand(4, 3, PIXELS, PIXELS) for _ in range(2)]])  # moves BatchNorm's averages
    view = torch.rand(2, 3, PIXELS, PIXELS)
    with torch.no_grad():
        expected = method.eval()(view)
    exported = lc.export.export(
        method, tmp_path / "backbone.pt", input_spec={"size": PIXELS, "mean": None, "std": None}
    )
    run = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    run.strategy.connect(method)
    run.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    for teacher in (str(exported), exported, str(tmp_path / "run.ckpt"), method):
        module = lc.Distill(TinyBackbone(), teacher)
        torch.testing.assert_close(module.frozen_teacher(view), expected, **f32(FORMULA))


@pytest.mark.parametrize(("name", "width"), [("mobilenetv3_large_100", 1280), ("efficientnet_b0", 1280)])
def test_small_students_by_name(name, width):
    model = lc.SEED(name, Tutor(), queue_size=24)
    assert model.feature_dim == width  # as timm returns them, after MobileNetV3's last layer
    loss = run_step(fill_queue(model), step_batch(CASES["SEED"]))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.backbone.parameters())


class Tokens(nn.Module):
    """Returns four tokens per image."""

    num_features = 3

    def forward(self, images):
        return images.mean((2, 3))[:, None] * torch.arange(4.0)[:, None]


def test_tokens_of_a_teacher_are_pooled_as_it_was_built():
    pooled = build_backbone(Tokens(), tokens="mean").module
    teacher = lc.Distill(TinyBackbone(), pooled).frozen_teacher
    torch.testing.assert_close(teacher(images()), 1.5 * images().mean((2, 3)))
    with pytest.raises(ValueError, match=r"`teacher` must return features \(B, 3\), .*Pool its tokens in a wrapper"):
        lc.Distill(TinyBackbone(), Tokens()).frozen_teacher(images())


def test_a_student_does_not_depend_on_its_teachers_initialization():
    students = []
    for width in (2, 5):
        torch.manual_seed(0)
        kwargs = {"width": width, "pretrained": False}
        students.append(lc.Distill(TinyBackbone(), "small_convnet", loss="rkd", teacher_kwargs=kwargs).backbone)
    for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_student_is_used_without_its_teacher_but_not_trained(tmp_path):
    module = make("SEED", teacher=None, teacher_dim=8)
    module.load_state_dict(make("SEED").state_dict())
    assert module.teacher is None
    assert module(images()).shape == (BATCH, 8)
    run = trainer(tmp_path, CASES["SEED"], epochs=1, limit_val_batches=0)
    with pytest.raises(ValueError, match="`teacher` must be given for a fit"):
        run.fit(module, data("SEED"))


def test_seeds_rate_ramps_from_that_of_256_images(tmp_path):
    module = make("SEED", lr=0.12, warmup_epochs=5)
    assert module.lr_factor(0, 50, 200) == pytest.approx(0.25)
    assert module.lr_factor(25, 50, 200) == pytest.approx(0.625)
    assert module.lr_factor(50, 50, 200) == 1
    assert make("SEED", lr=0.01).lr_factor(0, 50, 200) == 1


class Wide(nn.Module):
    num_features = 5

    def forward(self, images):
        return images.mean((2, 3))


def _refused(**kwargs):
    return lambda: lc.Distill(TinyBackbone(), **({"teacher": Tutor()} | kwargs))


OWN = TinyBackbone()
VALUE_ERRORS = {
    "no teacher": (_refused(teacher=None), "`teacher_dim` must be given without a teacher"),
    "loss": (_refused(loss="sed"), "`loss` must be one of .* Did you mean 'seed'"),
    "no samples": (_refused(loss="crd"), "`num_samples` must be given"),
    "cache": (_refused(cache_features=True), "`num_samples` must be given with `cache_features`"),
    "cache of two": (_refused(loss="disco", cache_features=True, num_samples=4), "`cache_features` must be False"),
    "temperature": (_refused(loss="seed", temperature=0.0), "`temperature` must be > 0"),
    "teacher temperature": (_refused(loss="seed", teacher_temperature=0.0), "`teacher_temperature` must be > 0"),
    "queue": (_refused(loss="seed", queue_size=0), "`size` must be >= 1"),
    "small crops": (_refused(small_crops=2), "`small_crops` must be 0 unless loss=.seed"),
    "crops below 0": (_refused(loss="seed", small_crops=-1), "`small_crops` must be >= 0"),
    "cached crops": (
        _refused(loss="seed", small_crops=2, cache_features=True, num_samples=4),
        "`cache_features` must be F",
    ),
    "momentum": (_refused(momentum=1.5), "`momentum` must lie in"),
    "untrained": (_refused(teacher="small_convnet"), "`teacher` must have published weights"),
    "unknown": (_refused(teacher="resnet1000"), "`backbone` must be a name that timm knows"),
    "arguments": (_refused(teacher_kwargs={"a": 1}), "`teacher_kwargs` must be None"),
    "teacher's width": (
        lambda: lc.Distill(TinyBackbone(), Wide()).frozen_teacher(images()),
        r"must return features \(B, 5\)",
    ),
    "width of a module": (
        lambda: lc.Distill(TinyBackbone(), Wide(), teacher_dim=6).frozen_teacher(images()),
        r"`teacher` must return features \(B, 6\), got .*Set `teacher_dim=3`",
    ),
    "width of a name": (
        _refused(teacher="resnet18", teacher_kwargs={"pretrained": False}, teacher_dim=77),
        "`teacher_dim` must be 512, the width of the teacher, got 77",
    ),
    "no width": (_refused(teacher=nn.Flatten()), "Here `backbone` is the teacher, and `feature_dim` is `teacher_dim`"),
    "one network": (lambda: lc.Distill(OWN, nn.Sequential(OWN), teacher_dim=8), "`teacher` must share no weights"),
    "SEED's loss": (lambda: lc.SEED(TinyBackbone(), Tutor(), loss="crd"), "`loss` must be one of 'seed'"),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_bad_values_are_refused(name):
    call, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_teacher_of_no_kind_is_refused():
    with pytest.raises(TypeError, match="`teacher` must be a name, a path or a module"):
        lc.Distill(TinyBackbone(), 7)


def test_a_step_needs_indices_where_features_are_cached():
    module = make("Distill features cached")
    with pytest.raises(ValueError, match="`batch` must hold sample indices"):
        run_step(module, [images(), torch.arange(BATCH)])
    with pytest.raises(ValueError, match=r"`indices` must lie in \[0, 32\)"):
        run_step(module, [images(), torch.arange(BATCH), torch.arange(BATCH) + 30])


def test_the_digest_is_that_of_the_weights():
    a, b = (FrozenTeacher(Tutor(), 8) for _ in range(2))
    assert a.digest == b.digest
    assert FrozenTeacher(Tutor().float(), 8).digest != a.digest
