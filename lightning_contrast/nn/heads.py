"""Projection and prediction heads: a table of the published ones, and the function that builds them.

Lightly's named heads are not used because two of them differ from the reference implementations in biases and
normalization. Input and output are ``(B, in_dim)`` and ``(B, out_dim)``; outputs are not L2-normalized.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, Unpack, cast

from torch import nn

from lightning_contrast._checks import check_at_least, check_choice, fail
from lightning_contrast.nn.distillation_heads import DistillationHead, PatchDistillationHead
from lightning_contrast.nn.mlp import Activation, LastNorm, Norm, mlp_head
from lightning_contrast.nn.weight_norm import WeightNormLinear


def _normal_001(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=0.01)


def _haiku(linear: nn.Linear) -> None:
    """Initialize as Haiku does: normal with deviation 1 / sqrt(fan in), truncated at two deviations."""
    std = 1 / math.sqrt(linear.in_features)
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)


def _normal_002(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)


@dataclass(frozen=True)
class Head:
    """Layers of an MLP head: per hidden layer linear, normalization, activation; then a linear output layer.

    Attributes:
        hidden_dim: Width of the hidden layers; None for that of the input.
        out_dim: Width of the output; None for that of the input.
        layers: Number of linear layers, >= 1.
        norm: Normalization of the hidden layers: "batch", "layer" or None. None also adds the biases that a
            normalization would make redundant, and removes ``last_norm``.
        last_norm: Normalization of the output: "full" with scale and offset, "scale", "plain" with neither, or None.
        hidden_bias: Give hidden layers a bias even before a normalization.
        last_bias: Give the output layer a bias; "frozen" keeps its initial value as long as there is a ``norm``.
        activation: "relu" or "gelu".
        init: Initializes the weight of each linear layer, with biases set to 0; None keeps PyTorch's initialization.
    """

    hidden_dim: int | None = None
    out_dim: int | None = 128
    layers: int = 2
    norm: Norm = "batch"
    last_norm: LastNorm = None
    hidden_bias: bool = False
    last_bias: bool | Literal["frozen"] = True
    activation: Activation = "relu"
    init: Callable[[nn.Linear], None] | None = None

    def build(self, in_dim: int) -> nn.Module:
        """Return the head for features ``(B, in_dim)``."""
        return self.mlp(in_dim, in_dim if self.out_dim is None else self.out_dim)

    def mlp(self, in_dim: int, out_dim: int) -> nn.Module:
        """Return an MLP with these layers that maps ``(B, in_dim)`` to ``(B, out_dim)``."""
        check_at_least("layers", self.layers, 1)
        hidden = [in_dim if self.hidden_dim is None else self.hidden_dim] * (self.layers - 1)
        head = mlp_head(
            [in_dim, *hidden, out_dim],
            norm=self.norm,
            last_norm=self.last_norm,
            hidden_bias=self.hidden_bias,
            last_bias=bool(self.last_bias),
            activation=self.activation,
        )
        linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
        for linear in linears if self.init is not None else []:
            self.init(linear)  # type: ignore[misc]  # not None here
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.last_bias == "frozen":
            linears[-1].bias.requires_grad_(self.norm is None)
        return head


@dataclass(frozen=True)
class PrototypeHead(Head):
    """An MLP to a bottleneck, L2 normalization, and a layer of weight-normalized prototypes.

    Attributes:
        bottleneck_dim: Width D of the bottleneck.
        num_prototypes: Number K of prototypes, >= 2.
        norm_last_layer: Freeze the length of the prototypes at 1, which is more stable; False trains it.
    """

    out_dim: int | None = field(default=None, init=False)  # it is ``num_prototypes``
    layers: int = 3
    norm: Norm = None
    hidden_bias: bool = True
    activation: Activation = "gelu"
    init: Callable[[nn.Linear], None] | None = _normal_002
    bottleneck_dim: int = 256
    num_prototypes: int = 65536
    norm_last_layer: bool = True

    def build(self, in_dim: int) -> nn.Module:
        """Return a `DistillationHead` for features ``(B, in_dim)``."""
        mlp = self.mlp(in_dim, self.bottleneck_dim)
        return DistillationHead(mlp, self.last_layer("num_prototypes", self.num_prototypes))

    def last_layer(self, name: str, count: int) -> WeightNormLinear:
        """Return a layer of ``count`` prototypes; ``name`` is the option that gives their number."""
        check_at_least(name, count, 2, "A distribution needs at least two; DINO has 65536, iBOT 8192")
        return WeightNormLinear(self.bottleneck_dim, count, train_scale=not self.norm_last_layer)


@dataclass(frozen=True)
class PatchPrototypeHead(PrototypeHead):
    """A `PrototypeHead` for class tokens and patches, which share the MLP.

    Attributes:
        shared: Use the same prototypes for class tokens and patches.
        patch_prototypes: Number K' of the patches' own prototypes, >= 2; None is ``num_prototypes``, the only choice
            if ``shared``.
    """

    shared: bool = True
    patch_prototypes: int | None = None

    def build(self, in_dim: int) -> nn.Module:
        """Return a `PatchDistillationHead` for tokens ``(B, in_dim)``."""
        mlp = self.mlp(in_dim, self.bottleneck_dim)
        last_layer = self.last_layer("num_prototypes", self.num_prototypes)
        if self.shared:
            check_choice("patch_prototypes", self.patch_prototypes, (None, self.num_prototypes))
            return PatchDistillationHead(mlp, last_layer)
        count = self.num_prototypes if self.patch_prototypes is None else self.patch_prototypes
        return PatchDistillationHead(mlp, last_layer, self.last_layer("patch_prototypes", count))


class HeadOptions(TypedDict, total=False):
    """Fields of a head that a caller of `build_head` may change; from ``bottleneck_dim`` on, of prototype heads."""

    hidden_dim: int | None
    out_dim: int | None
    layers: int
    norm: Norm
    last_norm: LastNorm
    bottleneck_dim: int
    num_prototypes: int
    norm_last_layer: bool
    shared: bool
    patch_prototypes: int | None


HEADS: dict[str, Head] = {
    "simclr": Head(last_norm="scale", last_bias=False, init=_normal_001),
    "moco": Head(norm=None),
    "supcon": Head(norm=None),
    "moco_v3_projector": Head(4096, 256, last_norm="plain", last_bias=False),
    "moco_v3_predictor": Head(4096, 256, last_bias=False),
    "byol": Head(4096, 256, hidden_bias=True, last_bias=False, init=_haiku),
    "simsiam_projector": Head(None, 2048, layers=3, last_norm="plain", last_bias="frozen"),
    "simsiam_predictor": Head(512, None),
    "barlow_twins": Head(8192, 8192, layers=3, last_bias=False),
    "vicreg": Head(8192, 8192, layers=3, hidden_bias=True, last_bias=False),
    "lejepa": Head(2048, 512, layers=3, hidden_bias=True),
    "visreg": Head(2048, 256, layers=3, hidden_bias=True, activation="gelu"),
    "tico": Head(4096, 256),
    "w_mse": Head(1024, 64, hidden_bias=True),
    "mmcr": Head(8192, 512, layers=3, last_bias=False),
    "vicregl_maps": Head(512, 512, layers=3, hidden_bias=True, last_bias=False),
    "spectral": Head(2048, 1000, last_norm="full", last_bias=False),
    "swav": Head(2048, 128, hidden_bias=True),
    "nnclr_projector": Head(2048, 256, layers=3, last_norm="full", last_bias=False),
    "nnclr_predictor": Head(4096, 256),
    "simreg": Head(None, None, hidden_bias=True),
    "tclr": Head(None, 128, last_norm="full", hidden_bias=True, last_bias=False),
    "cvrl": Head(2048, 128, layers=4),
    "dino": PrototypeHead(2048),
    "ibot": PatchPrototypeHead(2048, num_prototypes=8192),
    "data2vec": Head(None, None, layers=1, norm=None, init=_normal_002),
    "msn": Head(2048, 256, layers=3, hidden_bias=True, activation="gelu", init=_normal_002),
}
"""The published heads by name.

- ``"simclr"``: 2 layers in v1, 3 in v2. https://github.com/google-research/simclr
- ``"moco"``: an MLP in v2; ``layers=1`` is v1's and NPID's. https://github.com/facebookresearch/moco
- ``"supcon"``: https://github.com/HobbitLong/SupContrast
- ``"moco_v3_projector"``, ``"moco_v3_predictor"``: those of a ResNet; a ViT has 3 layers in the projector and
  ``last_norm="plain"`` in the predictor. https://github.com/facebookresearch/moco-v3
- ``"byol"``: projector and predictor. https://github.com/google-deepmind/deepmind-research/tree/master/byol
- ``"simsiam_projector"``, ``"simsiam_predictor"``: the paper's CIFAR-10 runs have a projector of 2 layers.
  https://github.com/facebookresearch/simsiam
- ``"barlow_twins"``: https://github.com/facebookresearch/barlowtwins
- ``"vicreg"``: the expander. https://github.com/facebookresearch/vicreg
- ``"lejepa"``: the output width is that of stable-pretraining, from 16 in small runs. https://github.com/rbalestr-lab/lejepa
- ``"visreg"``: https://github.com/HaiyuWu/visreg
- ``"tico"``: no reference implementation; that of https://github.com/sayannag/TiCo-pytorch.
- ``"w_mse"``: 128 wide on STL-10 and Tiny ImageNet. https://github.com/htdt/self-supervised
- ``"mmcr"``: that of Barlow Twins, narrower at the end; 512 and 128 on CIFAR-10. https://github.com/ThomasYerxa/mmcr
- ``"vicregl_maps"``: of the cells of maps. https://github.com/facebookresearch/VICRegL
- ``"spectral"``: the ImageNet runs have 3 layers of width 8192; no bias where a normalization with offset follows,
  which is equivalent. https://github.com/jhaochenz/spectral_contrastive_learning
- ``"swav"``: https://github.com/facebookresearch/swav
- ``"nnclr_projector"``, ``"nnclr_predictor"``: from the paper (https://arxiv.org/abs/2104.14548).
- ``"simreg"``: two of them make the predictor. https://github.com/UCDvision/simreg
- ``"tclr"``: https://github.com/DAVEISHAN/TCLR
- ``"cvrl"``: three hidden layers. https://github.com/tensorflow/models (``official/projects/video_ssl``)
- ``"dino"``: ``DINOHead`` of https://github.com/facebookresearch/dino; DINOv2 has ``norm_last_layer=False``.
- ``"ibot"``: ``iBOTHead`` of https://github.com/bytedance/ibot, shared as in the published runs of ViTs.
- ``"data2vec"``: one linear layer. https://github.com/facebookresearch/data2vec_vision
- ``"msn"``: ``init_model`` of https://github.com/facebookresearch/msn
"""


def build_head(name: str, in_dim: int, **options: Unpack[HeadOptions]) -> nn.Module:
    """Return a published head that maps features ``(B, in_dim)`` to projections ``(B, out_dim)``.

    Args:
        name: A key of `HEADS`.
        in_dim: Width of the features, >= 1.
        **options: Fields of the head to change, such as ``hidden_dim``, ``out_dim``, ``layers`` and ``norm``; see
            `Head`, and `PrototypeHead` for "dino" and "ibot".

    Raises:
        ValueError: If the name is unknown or a number is out of its range.
        TypeError: If the head has no such option, or a width is not a whole number.

    Example:
        >>> build_head("simclr", 512, out_dim=64)(torch.randn(2, 512)).shape
        torch.Size([2, 64])
    """
    check_choice("name", name, tuple(HEADS))
    head = HEADS[name]
    known = [f.name for f in fields(head) if f.init and f.name in HeadOptions.__annotations__]
    for option, value in options.items():
        if option not in known:
            rule = f"be one of {', '.join(map(repr, known))} for the head {name!r}"
            fail("options", rule, option, "Remove it", TypeError)
        if option.endswith("_dim") and value is not None:
            width = "projection_dim" if option == "out_dim" else option  # as the methods call it
            check_at_least(width, cast("int", value), 1, "Give a positive width")
    return replace(head, **cast("dict[str, Any]", options)).build(in_dim)
