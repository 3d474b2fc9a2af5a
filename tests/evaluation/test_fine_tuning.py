"""Fine-tuning with few labels: draws, recipes, a plain loop, and a network that is left as it was."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_contrast import evaluation as ev
from lightning_contrast.augment.policy import make_policy
from lightning_contrast.augment.view_spec import ViewSpec
from lightning_contrast.evaluation.protocols.fine_tuning import FINE_TUNE_RECIPES, FineTuneRecipe
from lightning_contrast.optim import LARS
from lightning_contrast.seeding import derived_seed, isolated
from tests.tolerances import TRAINING, assert_same_bits, f32, near64


def pictures(count=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 8, 8), dtype=torch.uint8, generator=g)
    for image, label in zip(images, labels, strict=True):
        image[label] += 80
    return images, labels


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))


TRAIN, TEST, HELD = pictures(), pictures(30, seed=1), pictures(12, seed=2)
BOTH = (*TRAIN, *TEST)


def halve(images):
    return (images - 0.5) / 0.25


def test_rows_are_a_share_of_each_class():
    labels = torch.tensor([0] * 300 + [1] * 40 + [2] * 3 + [3] + [-1] * 50)
    rows, held = ev.fine_tune_rows(labels, share=0.01)
    assert torch.bincount(labels[rows]).tolist() == [3, 1, 1, 1]
    assert torch.bincount(labels[held], minlength=4).tolist() == [30, 4, 1, 0]
    assert not set(rows.tolist()) & set(held.tolist())
    ten, _ = ev.fine_tune_rows(labels, share=0.1)
    assert torch.bincount(labels[ten]).tolist() == [30, 4, 1, 1]
    assert_same_bits(ten, ev.fine_tune_rows(labels, share=0.1)[0])
    assert not torch.equal(ten, ev.fine_tune_rows(labels, share=0.1, seed=1)[0])


def test_the_published_recipes():
    simclr, ten = FINE_TUNE_RECIPES["simclr"]
    assert (simclr.rates, simclr.scaling, simclr.batch_size) == (((0.05, 0.05),), "linear", 4096)
    assert (simclr.epochs, ten.epochs, simclr.nesterov) == ((60,), (30,), True)
    byol = FINE_TUNE_RECIPES["byol"][0]
    assert {rate for rate, _ in byol.rates} == {0.005, 0.01, 0.02, 0.05, 0.1}
    assert (byol.epochs, byol.batch_size, byol.scaling) == ((30, 50), 1024, "none")
    assert [FINE_TUNE_RECIPES["swav"][i].rates[0] for i in (0, 1)] == [(0.02, 5.0), (0.01, 0.2)]
    assert FINE_TUNE_RECIPES["simclr_v2"][0].optimizer == "lars"


RECIPES = {
    "cosine": FineTuneRecipe(((0.02, 0.1),), (4,), 10, nesterov=True),
    "steps": FineTuneRecipe(((0.02, 0.1),), (5,), 10, "linear", steps=(0.6, 0.8)),
    "lars": FineTuneRecipe(((0.05, 0.05),), (4,), 10, "sqrt", "lars", init=0.0),
}


def by_hand(recipe, seed):
    """Fine-tune in a plain loop."""
    model, (images, labels) = network(), TRAIN
    policy = make_policy([ViewSpec(8, recipe.crop, jitter_p=0.0, gray_p=0.0, flip=0.5)])
    factor = {"none": 1, "linear": 10 / 256, "sqrt": math.sqrt(10)}[recipe.scaling]
    with isolated(0):
        torch.manual_seed(derived_seed(seed, 14))
        head = nn.Linear(5, 3)
        with torch.no_grad():
            head.weight.normal_(0, recipe.init) if recipe.init else head.weight.zero_()
            head.bias.zero_()
        parameters = [
            (p, rate) for part, rate in zip((model, head), recipe.rates[0], strict=True) for p in part.parameters()
        ]
        if recipe.optimizer == "lars":
            optimizer = LARS([{"params": [p], "adapt": p.ndim > 1} for p, _ in parameters], lr=0.0)
        else:
            optimizer = torch.optim.SGD([{"params": [p]} for p, _ in parameters], 0.0, 0.9, nesterov=recipe.nesterov)
        total = recipe.epochs[0] * 2  # two whole batches of 10 in 24 images
        for step in range(total):
            if step % 2 == 0:
                order = torch.randperm(24)
            chosen = order[step % 2 * 10 :][:10]
            share = 0.5 * (1 + math.cos(math.pi * step / total))
            if recipe.steps:
                share = 0.2 ** sum(step >= round(place * total) for place in recipe.steps)
            for group, (_, rate) in zip(optimizer.param_groups, parameters, strict=True):
                group["lr"] = rate * factor * share
            optimizer.zero_grad()
            F.cross_entropy(head(model.train()(halve(policy(images[chosen])[0]))), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        return head(model.eval()(halve(TEST[0] / 255)))


@pytest.mark.parametrize("name", RECIPES)
def test_fine_tuning_is_a_plain_loop(name):
    found = ev.fine_tune(network(), *BOTH, recipe=RECIPES[name], preprocess=halve, seed=5)
    expected = by_hand(RECIPES[name], 5)
    torch.testing.assert_close(found.logits, expected, **f32(TRAINING, size=float(expected.abs().max())))
    assert found.top1 == near64((expected.argmax(1) == TEST[1]).double().mean().item())


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_and_the_random_state_are_left_as_they_were(fails):
    model = network()
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="`recipe` must train without NaN"):
            ev.fine_tune(model, *BOTH, recipe=FineTuneRecipe(((1e30, 1e30),), (5,), 10))
    else:
        ev.fine_tune(model, *BOTH, validation=HELD, recipe="small")
    assert_same_bits(dict(model.state_dict()), dict(before))
    assert modes == [module.training for module in model.modules()]
    assert_same_bits(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert model[4].weight.grad.eq(1).all()
    assert model[0].weight.grad is None


def test_frozen_parameters_stay_frozen_unless_all_are():
    model = network()
    recipe = FineTuneRecipe(((0.1, 0.0),), (2,), 10)
    all_free = ev.fine_tune(model, *BOTH, recipe=recipe).logits
    all_frozen = ev.fine_tune(network().requires_grad_(False), *BOTH, recipe=recipe).logits
    assert_same_bits(all_frozen, all_free)
    model[0].requires_grad_(False)
    assert not torch.equal(ev.fine_tune(model, *BOTH, recipe=recipe).logits, all_free)


@pytest.mark.slow
def test_settings_are_chosen_on_the_validation_images():
    recipe = FineTuneRecipe(((0.0, 0.0), (0.02, 0.2)), (1, 12), 8, init=0.0)
    found = ev.fine_tune(network(), *BOTH, validation=HELD, recipe=recipe)
    tried = found.settings["validation"]
    assert len(tried) == 4
    assert tried["lr 0, head 0, 1 epochs"] == near64(1 / 3)  # zeros: class 0
    assert tried[found.settings["setting"]] == max(tried.values())
    alone = ev.fine_tune(network(), *BOTH, recipe=FineTuneRecipe(((0.02, 0.2),), (12,), 8, init=0.0))
    if found.settings["setting"].endswith("0.2, 12 epochs"):
        assert_same_bits(found.logits, alone.logits)
    assert found.top1 > 0.5
    other = ev.fine_tune(network(), *TRAIN, TEST[0], TEST[1].flip(0), validation=HELD, recipe=recipe)
    assert_same_bits(other.logits, found.logits)
    wrong = ev.fine_tune(network(), *BOTH, validation=(HELD[0], HELD[1] * 0), recipe=recipe)
    assert wrong.settings["setting"] == "lr 0, head 0, 1 epochs"  # the first of equal ones
    assert_same_bits(wrong.logits, torch.zeros(30, 3))
    without = ev.fine_tune(network(), *BOTH, recipe=recipe)
    assert without.settings["images"] == 24 - 3 * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ev.fine_tune(network(), *BOTH, recipe="simclear"), "`recipe` must be one of .* Did you mean 'simclr'"),
        (lambda: ev.fine_tune(network(), TRAIN[0], TRAIN[1] * 0, *TEST), "`train_labels` must hold two classes"),
        (lambda: ev.fine_tune(network(), TRAIN[0], TRAIN[1] - 1, *TEST), "`train_labels` must be >= 0"),
        (lambda: ev.fine_tune(network(), TRAIN[0], TRAIN[1][:3], *TEST), r"`train_labels` must be integers of shape"),
        (lambda: ev.fine_tune(nn.Identity(), *BOTH), r"`model` must return features \(B, F\)"),
        (lambda: ev.fine_tune(network(), TRAIN[0].float(), TRAIN[1], *TEST), "`images` must lie in 0..1"),
        (lambda: ev.fine_tune_rows(TRAIN[1], share=1.0), r"`share` must lie in \(0, 1\)"),
        (lambda: ev.fine_tune_rows(TRAIN[1] * 0 - 1), "`labels` must have labeled rows"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
