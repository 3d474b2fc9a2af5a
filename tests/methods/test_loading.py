"""A module that `load_from_checkpoint` returns was built with the arguments of the run, or loading is refused."""

import functools
import inspect

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from tests.methods.cases import CASES, make


def halves(step):
    return 0.5


VALUES = {
    "optimizer": functools.partial(torch.optim.SGD, momentum=0.9),
    "temperature": halves,
    "projector": nn.Linear(8, 8),
    "patch_projector": nn.Linear(16, 8),
    "predictor": nn.Linear(8, 8),
    "decoder": nn.Linear(8, 8),
    "mask": lc.nn.random_masks,
    "masks": [lc.nn.tubelet_masks],
}
"""A value that no checkpoint holds, for each argument whose type allows one."""


def _arguments_that_may_be_left_out():
    """Return pairs of a method and an optional argument whose type names a module, or something that is called."""
    found = []
    for name in CASES:
        maker = CASES[name].make
        if not isinstance(maker, type) or maker.__name__ != name:
            continue
        for parameter in inspect.signature(maker.__init__).parameters.values():
            words = str(parameter.annotation)
            if parameter.name not in ("backbone", "encoder_a") and ("Module" in words or "Callable" in words):
                found.append((name, parameter.name))
    return found


def _saved(module, tmp_path):
    path = tmp_path / "one.ckpt"
    saved = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(saved | {"pytorch-lightning_version": "2.5.0"}, path)
    return path


@pytest.mark.parametrize(("name", "argument"), _arguments_that_may_be_left_out())
@pytest.mark.slow
def test_an_argument_that_a_checkpoint_cannot_hold_has_to_be_given(name, argument, tmp_path):
    if argument == "projector" and name in ("DINO", "DINOv2", "IBOT"):
        value = make(name).projector
    elif argument == "predictor" and name == "IJEPA":
        value = make(name).predictor
    elif argument == "encoder_b":
        value = make(name).backbone
    else:
        value = VALUES[argument]
    module = make(name, **{argument: value})
    path = _saved(module, tmp_path)
    network = "encoder_a" if name == "PairContrast" else "backbone"
    given = {network: module.backbone, "weights_only": True}
    load = functools.partial(type(module).load_from_checkpoint, path, **given)
    with pytest.raises(ValueError, match="`load_from_checkpoint`") as error:
        load()
    assert f"'{argument}': " in str(error.value)
    again = load(**{argument: value})
    assert getattr(again, argument, value) is value


@pytest.mark.parametrize("name", [name for name in CASES if isinstance(CASES[name].make, type)])
@pytest.mark.slow
def test_a_backbone_that_is_a_module_has_to_be_given(name, tmp_path):
    module = make(name)
    match = r"pass `backbone` to `load_from_checkpoint`|`load_from_checkpoint` must get the arguments"
    with pytest.raises(ValueError, match=match):
        type(module).load_from_checkpoint(_saved(module, tmp_path), weights_only=True)


def test_arguments_that_hold_a_class_or_a_function_count(tmp_path):
    module = lc.SimCLR("resnet10t", backbone_kwargs={"act_layer": nn.SiLU})
    path = _saved(module, tmp_path)
    with pytest.raises(ValueError, match=r"got \{'backbone_kwargs': 'dict'\}"):
        lc.SimCLR.load_from_checkpoint(path, weights_only=True)


class Own(lc.SimCLR):
    def __init__(self, backbone="small_convnet", **kwargs):
        super().__init__(backbone, **({"temperature": halves} | kwargs))


class Translated(lc.SimCLR):
    def __init__(self, temperature=0.5):
        super().__init__("small_convnet", temperature=lambda step: temperature)


def test_what_a_subclass_gives_by_itself_need_not_be_given(tmp_path):
    assert Own.load_from_checkpoint(_saved(Own(), tmp_path), weights_only=True).temperature is halves
    with pytest.raises(ValueError, match=r"temperature=\.\.\."):
        Own.load_from_checkpoint(_saved(Own(temperature=lambda step: 0.1), tmp_path), weights_only=True)
    again = Translated.load_from_checkpoint(_saved(Translated(0.25), tmp_path), weights_only=True)
    assert again.temperature(0) == 0.25
