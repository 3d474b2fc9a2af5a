"""Views in every kind of batch, loader and stage, and nothing left behind."""

import dataclasses
import warnings
from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_contrast.callbacks import OnlineLinearProbe, StepSeed, ViewAugmentation
from lightning_contrast.runtime.batch_transfer import BatchTransforms
from lightning_contrast.seeding import derived_seed
from tests.callbacks.probe_modules import images_and_labels
from tests.callbacks.step_modules import QUIET
from tests.launch import run_processes
from tests.tolerances import FORMULA, ROUNDED, bound, f32


class Policy(nn.Module):
    """Two noisy views; plain images are halved so that one sees which it was."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.input_spec = {"size": (8, 8), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        self.grad_was_on = self.autocast_was_on = False

    def forward(self, images):
        self.grad_was_on |= torch.is_grad_enabled()
        self.autocast_was_on |= torch.is_autocast_enabled("cpu")
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return [images + torch.rand(()) for _ in range(2)]

    def eval_transform(self, images):
        return (images.float() / 255 if images.dtype == torch.uint8 else images) / 2


class Sees(L.LightningModule):
    """Notes the batches of every stage."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.layer.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["predict"].append(batch)
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run_fit(module, callbacks, train, val=None, *, trainer=None, **kwargs):
    trainer = trainer or L.Trainer(callbacks=callbacks, **({"max_epochs": 1} | QUIET | kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, train, val, ckpt_path=None)
    return trainer


IMAGES, LABELS = images_and_labels(8)
FLOATS = IMAGES.float() / 255


class Pair(NamedTuple):
    picture: Tensor
    kind: Tensor


@dataclasses.dataclass
class Record:
    image: Tensor
    label: Tensor
    index: Tensor | None = None


LAYOUTS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y, torch.arange(len(y))],
    "named tuple": Pair,
    "dict": lambda x, y: {"image": x, "label": y, "path": "a"},
    "dataclass": lambda x, y: Record(x, y),
    "tensor": lambda x, y: x,
    "one-tuple": lambda x, y: (x,),
}


def parts(batch):
    """Return (images, labels) of a batch of any of the layouts, by hand."""
    if isinstance(batch, dict):
        return batch["image"], batch["label"]
    if isinstance(batch, Record):
        return batch.image, batch.label
    if isinstance(batch, Tensor):
        return batch, LABELS
    if isinstance(batch[0], Tensor) and len(batch) == 2 and batch[1].ndim == 4:
        return list(batch), LABELS
    return batch[0], batch[1] if len(batch) > 1 else LABELS


def loader(layout="tuple", images=IMAGES, batches=2):
    """Return a loader whose batches are all the same objects, which nobody may write to."""
    return DataLoader([LAYOUTS[layout](images, LABELS)] * batches, batch_size=None, collate_fn=lambda batch: batch)


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_gets_views_and_every_other_stage_plain_images(layout, kind):
    images = IMAGES if kind == "uint8" else FLOATS
    before, data = images.clone(), loader(layout, images)
    module = Sees()
    trainer = run_fit(module, [ViewAugmentation(Policy())], data, data)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    for batch in module.seen["train"]:
        views, labels = parts(batch)
        assert type(views) is list
        assert len(views) == 2
        for view in views:
            shift = view - FLOATS
            torch.testing.assert_close(shift, shift.mean().expand_as(shift), **f32(FORMULA))
        assert not torch.equal(*views)
        assert torch.equal(labels, LABELS)
    for stage in ("val", "test", "predict"):
        assert module.seen[stage]
        for batch in module.seen[stage]:
            plain, labels = parts(batch)
            torch.testing.assert_close(plain, FLOATS / 2)
            assert torch.equal(labels, LABELS)
    expected = type(LAYOUTS[layout](images, LABELS)) if layout != "tensor" else list
    assert isinstance(module.seen["train"][0], expected)
    assert torch.equal(images, before)
    assert data.dataset[0] is not module.seen["train"][0]


def test_everything_else_in_a_batch_stays():
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], loader("dict"))
    assert module.seen["train"][0]["path"] == "a"
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], loader("list"))
    assert torch.equal(module.seen["train"][0][2], torch.arange(8))


def test_the_sanity_check_sees_plain_images():
    class Stops(Sees):
        def on_train_start(self):
            self.before_training = list(self.seen["val"])

    module = Stops()
    run_fit(module, [ViewAugmentation(Policy())], loader(), loader(), num_sanity_val_steps=2)
    assert len(module.before_training) == 2
    torch.testing.assert_close(module.before_training[0][0], FLOATS / 2)


def test_batches_of_evaluation_are_left_alone_when_asked():
    normalised = FLOATS * 4 - 2
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy(), evaluate=False)], loader(), loader(images=normalised))
    assert torch.equal(module.seen["val"][0][0], normalised)


def test_several_validation_loaders():
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], loader(), [loader(), loader("dict")])
    torch.testing.assert_close(module.seen["val"][0][0], FLOATS / 2)
    torch.testing.assert_close(module.seen["val"][-1]["image"], FLOATS / 2)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
@pytest.mark.parametrize("collection", [dict, list])
def test_combined_loaders(mode, collection):
    loaders = [loader(batches=1), loader("dict", batches=3)]
    iterables = dict(zip("ab", loaders, strict=True)) if collection is dict else loaders
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], CombinedLoader(iterables, mode))
    flat = []
    for batch in module.seen["train"]:
        flat += batch.values() if collection is dict else batch
    views = [parts(batch)[0] for batch in flat if batch is not None]
    assert all(type(each) is list and len(each) == 2 for each in views)
    assert len(views) == {"max_size_cycle": 6, "min_size": 2, "max_size": 4}[mode]


def test_combined_loaders_of_bare_images_are_not_taken_for_views():
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], [loader("tensor", FLOATS), loader("tensor", FLOATS)])
    assert all(len(batch) == 2 and all(len(parts(one)[0]) == 2 for one in batch) for batch in module.seen["train"])


@pytest.mark.parametrize("collection", [dict, list])
def test_combined_loaders_of_validation(collection):
    loaders = [loader(), loader("dict")]
    iterables = dict(zip("ab", loaders, strict=True)) if collection is dict else loaders
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], loader(), CombinedLoader(iterables, "min_size"))
    for batch in module.seen["val"]:
        for one in batch.values() if collection is dict else batch:
            torch.testing.assert_close(parts(one)[0], FLOATS / 2)


def test_overfit_batches():
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], loader(batches=4), overfit_batches=1, max_epochs=2)
    assert [len(parts(batch)[0]) for batch in module.seen["train"]] == [2, 2]


def test_it_stays_in_place_through_fits_and_validations_and_then_is_gone():
    module, callback = Sees(), ViewAugmentation(Policy())
    trainer = run_fit(module, [callback], loader(), loader())
    trainer.validate(module, loader(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    run_fit(module, [], loader(), loader(), trainer=trainer)
    assert all(len(parts(batch)[0]) == 2 for batch in module.seen["train"])
    assert len(module.seen["train"]) == 4
    for batch in module.seen["val"]:
        torch.testing.assert_close(batch[0], FLOATS / 2)  # halved once, not once for each setup
    assert "batch_to_device" not in vars(trainer.strategy)


@pytest.mark.parametrize("where", ["training_step", "validation_step", "policy"])
def test_an_exception_leaves_the_strategy_as_it_was(where):
    class Breaks(Sees):
        def training_step(self, batch, batch_idx):
            raise KeyError if where == "training_step" else None

        def validation_step(self, batch, batch_idx):
            raise KeyError

    class BreakingPolicy(Policy):
        def forward(self, images):
            raise KeyError

    policy = BreakingPolicy() if where == "policy" else Policy()
    trainer = L.Trainer(callbacks=[ViewAugmentation(policy)], max_epochs=1, **QUIET)
    sanity = {"validation_step": loader()}.get(where)
    with pytest.raises(KeyError):
        run_fit(Breaks(), [], loader(), sanity, trainer=trainer)
    assert "batch_to_device" not in vars(trainer.strategy)
    module = Sees()
    trainer.callbacks[:] = [ViewAugmentation(Policy())]
    run_fit(module, [], loader(), trainer=trainer)
    assert len(parts(module.seen["train"][0])[0]) == 2


def test_several_wrappers_come_and_go_in_any_order():
    class Strategy:
        def batch_to_device(self, batch, device=None, dataloader_idx=0):
            return [*batch, "moved"]

    strategy = Strategy()
    add_a, add_b = (lambda batch: [*batch, "a"]), (lambda batch: [*batch, "b"])
    for transform in (add_a, add_b, add_a):
        BatchTransforms.add(strategy, transform)
    assert strategy.batch_to_device([]) == ["moved", "a", "b"]
    BatchTransforms.remove(strategy, add_a)
    assert strategy.batch_to_device([]) == ["moved", "b"]
    BatchTransforms.remove(strategy, add_a)
    BatchTransforms.remove(strategy, add_b)
    assert vars(strategy) == {}
    assert strategy.batch_to_device([]) == ["moved"]


def test_the_attribute_of_somebody_else_is_put_back():
    class Strategy:
        pass

    def foreign(batch, device=None, dataloader_idx=0):
        return [*batch, "foreign"]

    def transform(batch):
        return [*batch, "ours"]

    strategy = Strategy()
    strategy.batch_to_device = foreign
    BatchTransforms.add(strategy, transform)
    assert strategy.batch_to_device([]) == ["foreign", "ours"]
    BatchTransforms.remove(strategy, transform)
    assert strategy.batch_to_device is foreign


def views_seen(callbacks, *, epochs=2, ckpt_path=None, global_seed=0, save=None):
    module = Sees()
    torch.manual_seed(global_seed)
    trainer = L.Trainer(callbacks=callbacks, max_epochs=epochs, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return torch.stack([torch.stack(parts(batch)[0]) for batch in module.seen["train"]])


def test_with_a_seed_views_depend_on_seed_epoch_and_batch_alone(tmp_path):
    views = views_seen([ViewAugmentation(Policy(), seed=3)], save=tmp_path / "two.ckpt")
    assert torch.equal(views, views_seen([ViewAugmentation(Policy(), seed=3)], global_seed=9))
    assert not torch.equal(views, views_seen([ViewAugmentation(Policy(), seed=4)]))
    assert len({float(view.sum()) for batch in views for view in batch}) == 8  # 2 epochs, 2 batches, 2 views
    longer = views_seen([ViewAugmentation(Policy(), seed=3)], epochs=3)
    resumed = views_seen([ViewAugmentation(Policy(), seed=3)], epochs=3, ckpt_path=tmp_path / "two.ckpt")
    assert torch.equal(longer[4:], resumed)


def test_without_a_seed_views_come_from_the_global_generator():
    assert torch.equal(views_seen([ViewAugmentation(Policy())]), views_seen([ViewAugmentation(Policy())]))
    assert not torch.equal(
        views_seen([ViewAugmentation(Policy())]), views_seen([ViewAugmentation(Policy())], global_seed=1)
    )


def test_a_seed_leaves_the_global_generator_alone():
    views_seen([ViewAugmentation(Policy(), seed=3)])
    after = torch.get_rng_state()
    module = Sees()
    torch.manual_seed(0)
    run_fit(module, [], loader(), max_epochs=2)
    assert torch.equal(after, torch.get_rng_state())


def test_step_seed_gives_its_seed_and_an_own_seed_wins():
    given = views_seen([ViewAugmentation(Policy()), StepSeed(3)])
    assert torch.equal(given, views_seen([ViewAugmentation(Policy(), seed=3)]))
    own = views_seen([StepSeed(3), ViewAugmentation(Policy(), seed=4)])
    assert torch.equal(own, views_seen([ViewAugmentation(Policy(), seed=4)]))


def test_derived_seeds_differ_in_every_part():
    seeds = {derived_seed(s, e, b, r) for s in range(3) for e in range(3) for b in range(3) for r in range(3)}
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 23) != derived_seed(12, 3)


@pytest.mark.dist
def test_ranks_make_different_views():
    def on_rank(rank):
        module = Sees()
        run_fit(module, [ViewAugmentation(Policy(), seed=3)], loader(), strategy="ddp", devices=2)
        return torch.stack(parts(module.seen["train"][0])[0])

    one, other = run_processes(on_rank, 2, init=False)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_views_have_the_precision_of_the_run_and_are_made_in_float32(precision, dtype):
    class Checks(Policy):
        def forward(self, images):
            assert images.dtype in (torch.uint8, torch.float32)
            return super().forward(images)

    policy = Checks()
    for images in (IMAGES, FLOATS):
        module = Sees()
        run_fit(module, [ViewAugmentation(policy)], loader(images=images), loader(images=images), precision=precision)
        assert {view.dtype for view in module.seen["train"][0][0]} == {dtype}
        assert module.seen["val"][0][0].dtype == dtype
    assert not policy.grad_was_on
    assert not policy.autocast_was_on


def test_the_checkpoint_says_what_an_image_has_to_become(tmp_path):
    trainer = run_fit(Sees(), [ViewAugmentation(Policy())], loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["input_spec"] == Policy().input_spec


def test_a_probe_reads_the_labels_beside_the_views():
    class Features(Sees):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "features": batch[0][0].mean((2, 3))}

        def validation_step(self, batch, batch_idx):
            return {"features": batch[0].mean((2, 3))}

    probe = OnlineLinearProbe(3, bank="train")  # the module has no `forward` that encodes a bank
    trainer = run_fit(Features(), [ViewAugmentation(Policy()), probe], loader(), loader())
    assert "linear_probe/top1" in trainer.callback_metrics


def with_value(value, dtype=torch.float32):
    images = FLOATS.clone().to(dtype)
    images[0, 0, 0, 0] = value
    return images


@pytest.mark.parametrize("stage", ["training", "validation"])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (with_value(float("nan")), ValueError, r"`images` must be finite, got 'NaN'"),
        (with_value(float("inf")), ValueError, r"`images` must lie in 0..1 where they are float, got \(0.0.*inf\)"),
        (with_value(-0.2), ValueError, r"`images` must lie in 0..1 .*Remove Normalize"),
        (FLOATS * 255, ValueError, r"`images` must lie in 0..1 .*Divide by 255, or leave them as uint8"),
        (IMAGES.int(), TypeError, r"`images` must be uint8 in 0..255 or float in 0..1, got 'torch.int32'"),
        (IMAGES > 9, TypeError, r"got 'torch.bool'"),
        (FLOATS[0], ValueError, r"`images` must have the shape \(B, C, H, W\), got \(3, 8, 8\)"),
    ],
    ids=["nan", "inf", "negative", "255", "int32", "bool", "3-D"],
)
def test_images_with_wrong_values_are_named_in_any_batch(images, error, message, stage):
    bad = DataLoader([(IMAGES, LABELS), (images, LABELS)], batch_size=None)  # not the first batch
    data = (bad, None) if stage == "training" else (loader(), bad)
    with pytest.raises(error, match=message) as caught:
        run_fit(Sees(), [ViewAugmentation(Policy())], *data, num_sanity_val_steps=0)
    if "0..1" in message and error is ValueError:
        assert ("evaluate=False" in str(caught.value)) == (stage == "validation")


def test_rounding_beyond_one_is_no_error():
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], loader(images=with_value(1.0 + 1e-5)))
    assert module.seen["train"]


class Scaled(Policy):
    """View i is (i + 1) times the images, plus a draw of its own below 0.01."""

    def __init__(self, views):
        super().__init__()
        self.views = views

    def forward(self, images):
        return [images * (i + 1) + torch.rand(()) / 100 for i in range(self.views)]


@pytest.mark.parametrize("made", [1, 2])
def test_given_views_are_augmented_each_by_its_own_draw(made):
    frames = [FLOATS, FLOATS.flip(0)]
    data = DataLoader([(frames, LABELS)], batch_size=None)
    module = Sees()
    run_fit(module, [ViewAugmentation(Scaled(made))], data, data)
    ((first, second), labels) = module.seen["train"][0]
    noise = first - frames[0], second - frames[1] * made  # view i of two, the only view of one
    assert all(part.min() >= 0 and part.max() < 0.0101 for part in noise)
    assert all(part.max() - part.min() < bound(ROUNDED) for part in noise)  # one draw per view
    assert noise[0].mean() != noise[1].mean()
    assert labels is LABELS or torch.equal(labels, LABELS)
    evaluated = module.seen["val"][-1][0]
    assert [torch.equal(view, frame / 2) for view, frame in zip(evaluated, frames, strict=True)] == [True, True]


def test_given_views_and_another_number_of_views_are_refused():
    data = DataLoader([([FLOATS, FLOATS], LABELS)], batch_size=None)
    with pytest.raises(ValueError, match="`policy` must create 2 views or one, got 3"):
        run_fit(Sees(), [ViewAugmentation(Scaled(3))], data)


@pytest.mark.parametrize("bare", [True, False])
def test_the_only_view_of_a_policy_is_a_tensor(bare):
    class One(Policy):
        def forward(self, images):
            return images * 2 if bare else [images * 2]

    module = Sees()
    run_fit(module, [ViewAugmentation(One())], DataLoader([(FLOATS, LABELS)], batch_size=None))
    assert torch.equal(module.seen["train"][0][0], FLOATS * 2)


@pytest.mark.parametrize("shape", [(8, 3, 5, 4, 4), (8, 3, 16), (8, 7)])
def test_clips_series_and_tables_reach_the_policy(shape):
    signal = torch.randn(shape) * 300  # no pixels
    module = Sees()
    data = DataLoader([(signal, LABELS)], batch_size=None)
    run_fit(module, [ViewAugmentation(Scaled(2))], data, data)
    assert [view.shape for view in module.seen["train"][0][0]] == [shape, shape]
    assert torch.equal(module.seen["val"][-1][0], signal / 2)


@pytest.mark.parametrize("source", ["pixels", lambda batch: batch["pixels"]])
def test_images_under_another_key(source):
    batch = {"pixels": IMAGES, "depth": IMAGES // 2, "label": LABELS}
    data = DataLoader([batch], batch_size=None)
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy(), images=source)], data, data)
    seen = module.seen["train"][0]
    assert seen.keys() == batch.keys()
    assert [view.shape for view in seen["pixels"]] == [IMAGES.shape] * 2
    assert torch.equal(seen["depth"], IMAGES // 2)
    assert torch.equal(module.seen["val"][-1]["pixels"], IMAGES.float() / 510)


def test_a_dict_of_views_alone_is_one_batch():
    data = DataLoader([{"pixels": [FLOATS, FLOATS]}], batch_size=None)
    module = Sees()
    run_fit(module, [ViewAugmentation(Policy())], data, data)
    assert len(module.seen["train"][0]["pixels"]) == len(module.seen["val"][-1]["pixels"]) == 2


@pytest.mark.parametrize("images", [1.5, True, ["a"]])
def test_a_place_of_the_images_is_checked(images):
    with pytest.raises(TypeError, match="`images` must be None, a str, an int or a callable"):
        ViewAugmentation(Policy(), images=images)


def test_a_batch_without_images_is_named():
    data = DataLoader([{"pixels": IMAGES, "depth": IMAGES, "label": LABELS}], batch_size=None)
    with pytest.raises(TypeError, match=r"have the key 'image', or one 4-D tensor .* give `images=`"):
        run_fit(Sees(), [ViewAugmentation(Policy())], data)


def test_dataloader_iter_is_refused():
    class Iterates(Sees):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(TypeError, match=r"`training_step` must take a batch, .*got '`dataloader_iter`'"):
        run_fit(Iterates(), [ViewAugmentation(Policy())], loader())


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda x: {"view": x}, TypeError, r"`policy\(images\)` must be a list of views, got 'dict'"),
        (lambda x: [x.float(), x.float()[:3]], ValueError, r"hold 8 images in each view, got \[8, 3\]"),
    ],
)
def test_what_a_policy_returns_is_checked(made, error, message):
    class Wrong(Policy):
        def forward(self, images):
            return made(images)

    with pytest.raises(error, match=message):
        run_fit(Sees(), [ViewAugmentation(Wrong())], loader())


def test_arguments_are_checked_when_they_are_given():
    with pytest.raises(TypeError, match="`policy` must be callable"):
        ViewAugmentation("simclr")
    with pytest.raises(TypeError, match="`policy` must have a method `eval_transform`, got 'function'"):
        ViewAugmentation(lambda images: [images])
    with pytest.raises(ValueError, match="`seed` must be >= 0"):
        ViewAugmentation(Policy(), seed=-1)
    assert ViewAugmentation(lambda images: [images], evaluate=False).evaluate is False


def test_a_pytorch_lightning_trainer_takes_it():
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.views = nn.Linear(1, 1), []

        def training_step(self, batch, batch_idx):
            self.views.append(batch[0])
            return self.layer.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Module()
    run_fit(module, [], loader(), trainer=pl.Trainer(callbacks=[ViewAugmentation(Policy())], max_epochs=1, **QUIET))
    assert all(len(views) == 2 for views in module.views)
