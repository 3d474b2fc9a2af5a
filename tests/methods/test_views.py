"""``Method.views`` is the policy of the method's ImageNet recipe."""

from pathlib import Path

import pytest
import torch
import yaml

import lightning_contrast as lc

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
RECIPES = {path.stem.removesuffix("_imagenet"): path for path in sorted(CONFIGS.glob("*_imagenet.yaml"))}
STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def recipe(name):
    """Return the method of a recipe, the policy that it names, and the policy's arguments."""
    config = yaml.safe_load(RECIPES[name].read_text())
    callbacks = {entry["class_path"]: entry.get("init_args") for entry in config["trainer"]["callbacks"]}
    policy = callbacks["ViewAugmentation"]["policy"]
    arguments = dict(policy["init_args"])
    if "specs" in arguments:
        arguments["specs"] = [
            lc.augment.ViewSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in view.items()})
            for view in arguments["specs"]
        ]
    method = getattr(lc, config["model"]["class_path"])
    return method, getattr(lc.augment, policy["class_path"].rsplit(".", 1)[-1]), arguments


def drawn(policy, seed):
    torch.manual_seed(seed)
    return policy(torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(1)))


WITHOUT_RECIPE = {lc.TemporalContrast, lc.VJEPA, lc.PairContrast, lc.BindModalities}
"""Their batches are not the images of one public dataset: see test_temporal_contrast, test_vjepa, examples of pairs."""
WITHOUT_RECIPE |= {lc.TemporalCPC, lc.GLoRIA, lc.CLIP, lc.SigLIP}


def test_every_method_has_a_recipe():
    found = {recipe(name)[0] for name in RECIPES}
    methods = {getattr(lc.methods, name) for name in lc.methods.__all__} - {lc.methods.SelfSupervisedModule}
    assert found == methods - WITHOUT_RECIPE


@pytest.mark.parametrize("name", RECIPES)
def test_views_are_those_of_the_recipe(name):
    method, make, arguments = recipe(name)
    size = 224 if "specs" in arguments else 32  # smaller views draw the same numbers
    if "size" in arguments:
        assert arguments["size"] == (260 if name == "cpc" else 224)  # CPC v2's; `views` has v1's 256
        arguments["size"] = size
    published = {key: arguments.get(key) for key in ("mean", "std")}
    expected, found = make(**arguments), method.views(size, **published)
    assert found.input_spec == expected.input_spec
    for seed in range(3):
        ours, theirs = drawn(found, seed), drawn(expected, seed)
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], drawn(found, 7)[0])


@pytest.mark.parametrize("name", RECIPES)
def test_views_take_statistics_and_options(name):
    method, _, _ = recipe(name)
    policy = method.views(32, **STATISTICS, color=False)
    resampling = {"interpolation": "bicubic"} if policy.interpolation == "bicubic" else {}
    assert policy.input_spec == {"size": 32} | STATISTICS | resampling
    assert all(view.shape[:2] == (6, 3) for view in drawn(policy, 0))
    with pytest.raises(TypeError, match="colour"):
        method.views(32, colour=False)


@pytest.mark.parametrize("name", ["swav", "dino", "ibot", "dinov2", "msn"])
def test_local_views_are_an_option(name):
    method, _, _ = recipe(name)
    views = drawn(method.views(32, local_views=3, local_size=12), 0)
    assert [view.shape[-1] for view in views] == [32, 32, 12, 12, 12]
