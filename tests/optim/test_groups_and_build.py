"""Parameter groups and optimizers by name."""

import pytest
import torch
from torch import nn

from lightning_contrast.optim import LARS, build_optimizer, parameter_groups


class Network(nn.Module):
    """One of every kind of parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.wide_norm = nn.LayerNorm((4, 5))
        self.scale = nn.Parameter(torch.ones(1))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied_too = self.tied


NORMS = {"norm.weight", "wide_norm.weight", "scale"}
BIASES = {"conv.bias", "norm.bias", "wide_norm.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
WEIGHTS = {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "token", "tied.weight"}


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [(("norm", "bias"), NORMS | BIASES), (("norm",), NORMS), (("bias",), BIASES), ((), set())],
)
def test_every_trainable_parameter_is_in_one_group(exclude, expected):
    network = Network()
    names = {id(p): n for n, p in network.named_parameters()}
    decayed, others = parameter_groups(network, 0.1, exclude=exclude)
    assert (decayed["weight_decay"], others["weight_decay"], others["adapt"]) == (0.1, 0.0, False)
    listed = [names[id(p)] for group in (decayed, others) for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == NORMS | BIASES | WEIGHTS
    assert {names[id(p)] for p in others["params"]} == expected


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_both_exclusions_are_the_rule_of_one_dimension(name):
    import timm

    network = timm.create_model(name, num_classes=0)
    decayed, others = parameter_groups(network, 0.1)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(network.parameters()))


def test_bad_group_arguments():
    with pytest.raises(ValueError, match="`exclude` must be one of 'norm', 'bias', 'declared', got 'biases'"):
        parameter_groups(nn.Linear(2, 2), 0.1, exclude=("biases",))
    with pytest.raises(ValueError, match="`weight_decay` must be >= 0, got -1"):
        parameter_groups(nn.Linear(2, 2), -1)


@pytest.mark.parametrize(("name", "cls"), [("sgd", "SGD"), ("adamw", "AdamW"), ("lars", "LARS"), ("lamb", "Lamb")])
def test_optimizers_by_name_train(name, cls):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = build_optimizer(name, parameter_groups(network, 1e-3), lr=0.02)
    assert type(optimizer).__name__ == cls
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0.0]
    x = torch.randn(32, 3)
    target = x.sum(1, keepdim=True)
    losses = []
    for _ in range(30):
        loss = (network(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_options_reach_the_optimizer():
    groups = parameter_groups(nn.Linear(2, 2), 0.1)
    assert build_optimizer("sgd", groups, 0.1).defaults["momentum"] == 0.9
    assert build_optimizer("sgd", groups, 0.1, sgd_momentum=0.5).defaults["momentum"] == 0.5
    assert build_optimizer("adamw", groups, 0.1, betas=(0.9, 0.95)).defaults["betas"] == (0.9, 0.95)
    assert build_optimizer("lars", groups, 0.1, trust_form="B").defaults["trust_form"] == "B"


def test_callables():
    groups = parameter_groups(nn.Linear(2, 2), 0.1)
    assert build_optimizer(torch.optim.Adam, groups, 0.3).defaults["lr"] == 0.3
    own_rate = build_optimizer(lambda params: torch.optim.SGD(params, lr=0.7), groups, 0.3)
    assert own_rate.param_groups[1]["lr"] == 0.7
    assert isinstance(build_optimizer(LARS, groups, 0.3), LARS)
    assert all("lr" not in group for group in groups)  # the caller's groups stay as they were


def test_bad_optimizers_are_named():
    groups = parameter_groups(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match=r"`optimizer` must be one of 'sgd'.* got 'adam'. Did you mean 'adamw'"):
        build_optimizer("adam", groups, 0.1)
    with pytest.raises(TypeError, match="`optimizer` must be a name or a callable, got 'int'"):
        build_optimizer(3, groups, 0.1)
    with pytest.raises(TypeError, match="`optimizer` must return an optimizer, got 'NoneType'"):
        build_optimizer(lambda params: None, groups, 0.1)
    with pytest.raises(ValueError, match="`lr` must be >= 0"):
        build_optimizer("sgd", groups, -0.1)
