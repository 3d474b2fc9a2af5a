"""Projection and prediction heads, each with the layers of its authors' program.

Not lightly's named heads, which differ from the authors' in biases and normalisation. Every builder takes ``norm``:
``"batch"`` (the papers'), ``"layer"``, or None, which also gives back the biases that a following normalisation makes
useless. Input and output are ``(B, in_dim)`` and ``(B, out_dim)``; nothing is L2-normalised here.
"""

import math

from torch import nn

from lightning_contrast._checks import check_at_least
from lightning_contrast.nn.mlp import LastNorm, Norm, mlp_head


def _linears(head: nn.Module) -> list[nn.Linear]:
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


def _hidden(in_dim: int, hidden_dim: int | None, layers: int) -> list[int]:
    """Return the widths of all layers but the last; ``hidden_dim`` None is the width of the input."""
    check_at_least("layers", layers, 1)
    return [in_dim, *[in_dim if hidden_dim is None else hidden_dim] * (layers - 1)]


def simclr_head(
    in_dim: int, hidden_dim: int | None = None, out_dim: int = 128, *, layers: int = 2, norm: Norm = "batch"
) -> nn.Module:
    """Return SimCLR's projector: 2 layers in v1, 3 in v2; normalised output with a scale and no offset.

    Source: https://github.com/google-research/simclr; weights start as N(0, 0.01).

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layers; None for that of the features.
        out_dim: Width of the projection.
        layers: Number of linear layers.
        norm: See the module.
    """
    head = mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm, last_norm="scale", last_bias=False)
    for linear in _linears(head):
        nn.init.normal_(linear.weight, std=0.01)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return head


def moco_head(
    in_dim: int, hidden_dim: int | None = None, out_dim: int = 128, *, layers: int = 2, norm: Norm = None
) -> nn.Module:
    """Return MoCo's head: one linear layer in v1 (``layers=1``), an MLP in v2; biases, no normalisation.

    Source: https://github.com/facebookresearch/moco; NPID's head is ``layers=1``.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layer; None for that of the features.
        out_dim: Width of the projection.
        layers: 1 for v1, 2 for v2.
        norm: See the module.
    """
    return mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm)


def moco_v3_projector(
    in_dim: int, hidden_dim: int = 4096, out_dim: int = 256, *, layers: int = 2, norm: Norm = "batch"
) -> nn.Module:
    """Return MoCo v3's projector: 2 layers for a ResNet, 3 for a ViT; no bias, output normalised without affine.

    Source: https://github.com/facebookresearch/moco-v3.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layers.
        out_dim: Width of the projection.
        layers: 2 for a ResNet, 3 for a ViT.
        norm: See the module.
    """
    return mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm, last_norm="plain", last_bias=False)


def moco_v3_predictor(
    in_dim: int = 256, hidden_dim: int = 4096, out_dim: int = 256, *, last_norm: bool = False, norm: Norm = "batch"
) -> nn.Module:
    """Return MoCo v3's predictor: 2 layers without bias; its output is normalised for a ViT only.

    Source: https://github.com/facebookresearch/moco-v3.

    Args:
        in_dim: Width of the projection.
        hidden_dim: Width of the hidden layer.
        out_dim: Width of the prediction.
        last_norm: True for a ViT, False for a ResNet.
        norm: See the module.
    """
    kind: LastNorm = "plain" if last_norm else None
    return mlp_head([in_dim, hidden_dim, out_dim], norm=norm, last_norm=kind, last_bias=False)


def byol_mlp(in_dim: int, hidden_dim: int = 4096, out_dim: int = 256, *, norm: Norm = "batch") -> nn.Module:
    """Return BYOL's projector or predictor: hidden layer with bias, output without.

    Source: https://github.com/google-deepmind/deepmind-research/tree/master/byol; weights start as Haiku's, normal with
    deviation 1 / sqrt(fan in) cut at two deviations.

    Args:
        in_dim: Width of the features, or of the projection.
        hidden_dim: Width of the hidden layer.
        out_dim: Width of the projection or prediction.
        norm: See the module.
    """
    head = mlp_head([in_dim, hidden_dim, out_dim], norm=norm, hidden_bias=True, last_bias=False)
    for linear in _linears(head):
        std = 1 / math.sqrt(linear.in_features)
        nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return head


def simsiam_projector(
    in_dim: int, hidden_dim: int | None = None, out_dim: int = 2048, *, layers: int = 3, norm: Norm = "batch"
) -> nn.Module:
    """Return SimSiam's projector: output layer with a frozen bias and normalisation without affine.

    Source: https://github.com/facebookresearch/simsiam; the paper's CIFAR-10 runs have 2 layers. Without ``norm`` the
    bias is trained.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layers; None for that of the features.
        out_dim: Width of the projection.
        layers: Number of linear layers.
        norm: See the module.
    """
    head = mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm, last_norm="plain")
    _linears(head)[-1].bias.requires_grad_(norm is None)
    return head


def simsiam_predictor(dim: int = 2048, hidden_dim: int = 512, *, norm: Norm = "batch") -> nn.Module:
    """Return SimSiam's predictor: a bottleneck whose output layer has a bias and no normalisation.

    Source: https://github.com/facebookresearch/simsiam.

    Args:
        dim: Width of the projection and of the prediction.
        hidden_dim: Width of the bottleneck.
        norm: See the module.
    """
    return mlp_head([dim, hidden_dim, dim], norm=norm)


def barlow_projector(
    in_dim: int, hidden_dim: int = 8192, out_dim: int = 8192, *, layers: int = 3, norm: Norm = "batch"
) -> nn.Module:
    """Return Barlow Twins' projector: no bias anywhere, plain output (the loss normalises it).

    Source: https://github.com/facebookresearch/barlowtwins.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layers.
        out_dim: Width of the projection.
        layers: Number of linear layers.
        norm: See the module.
    """
    return mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm, last_bias=False)


def vicreg_expander(
    in_dim: int, hidden_dim: int = 8192, out_dim: int = 8192, *, layers: int = 3, norm: Norm = "batch"
) -> nn.Module:
    """Return VICReg's expander: hidden layers with bias, output without.

    Source: https://github.com/facebookresearch/vicreg.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layers.
        out_dim: Width of the projection.
        layers: Number of linear layers.
        norm: See the module.
    """
    return mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm, hidden_bias=True, last_bias=False)


def supcon_head(
    in_dim: int, hidden_dim: int | None = None, out_dim: int = 128, *, layers: int = 2, norm: Norm = None
) -> nn.Module:
    """Return SupCon's head: an MLP with biases and without normalisation.

    Source: https://github.com/HobbitLong/SupContrast.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layer; None for that of the features.
        out_dim: Width of the projection.
        layers: Number of linear layers.
        norm: See the module.
    """
    return mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm)


def spectral_head(
    in_dim: int, hidden_dim: int = 2048, out_dim: int = 1000, *, layers: int = 2, norm: Norm = "batch"
) -> nn.Module:
    """Return the head of the spectral contrastive loss: every layer normalised with scale and offset.

    Source: https://github.com/jhaochenz/spectral_contrastive_learning; the ImageNet runs have 3 layers of width 8192.
    Differs from it: no bias where a normalisation with offset follows, which changes nothing.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layers.
        out_dim: Width of the projection.
        layers: Number of linear layers.
        norm: See the module.
    """
    return mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm, last_norm="full", last_bias=False)


def nnclr_projector(
    in_dim: int, hidden_dim: int = 2048, out_dim: int = 256, *, layers: int = 3, norm: Norm = "batch"
) -> nn.Module:
    """Return NNCLR's projector: every layer normalised with scale and offset.

    Source: the paper (https://arxiv.org/abs/2104.14548); there is no public program.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layers.
        out_dim: Width of the projection.
        layers: Number of linear layers.
        norm: See the module.
    """
    return mlp_head([*_hidden(in_dim, hidden_dim, layers), out_dim], norm=norm, last_norm="full", last_bias=False)


def nnclr_predictor(
    in_dim: int = 256, hidden_dim: int = 4096, out_dim: int = 256, *, norm: Norm = "batch"
) -> nn.Module:
    """Return NNCLR's predictor: plain output layer with a bias.

    Source: the paper (https://arxiv.org/abs/2104.14548); there is no public program.

    Args:
        in_dim: Width of the projection.
        hidden_dim: Width of the hidden layer.
        out_dim: Width of the prediction.
        norm: See the module.
    """
    return mlp_head([in_dim, hidden_dim, out_dim], norm=norm)


def debiased_head(in_dim: int, hidden_dim: int = 512, out_dim: int = 128, *, norm: Norm = "batch") -> nn.Module:
    """Return the head of the debiased and of the hard-negative loss: plain output layer with a bias.

    Source: https://github.com/chingyaoc/DCL and https://github.com/joshr17/HCL.

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layer.
        out_dim: Width of the projection.
        norm: See the module.
    """
    return mlp_head([in_dim, hidden_dim, out_dim], norm=norm)
