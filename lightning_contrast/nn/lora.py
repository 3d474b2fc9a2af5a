"""Low-rank adaptation (LoRA): a linear layer of our own, and by `peft` in any vision transformer."""

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_positive, check_probability, fail, require

_Module = TypeVar("_Module", bound=nn.Module)

ATTENTION = r".*attn\.(qkv|proj)"
"""Regular expression of the linear layers of timm's attention: queries, keys and values in one, and the output."""


class LoRALinear(nn.Linear):
    """Linear layer with frozen weights and a trained difference of low rank.

    Implements Eq. 3 of LoRA (https://arxiv.org/abs/2106.09685): ``y = x W' + bias + alpha / rank * drop(x) A' B'``.
    A is uniform as the weight of `nn.Linear` and B zero, so that the layer starts as the frozen one. In eval mode the
    product is added to the weight first, so a forward pass costs one matrix product of the full size.

    Differs from the reference implementation: eval mode leaves ``weight`` alone, where the reference adds the product
    in place and subtracts it in train mode, which drifts in 16-bit precision and saves merged weights. `merged` makes
    a plain layer.

    Args:
        in_features: Width of the input, >= 1.
        out_features: Width of the output, >= 1.
        rank: Rank r of the difference, >= 1.
        alpha: Its scale, > 0: it is multiplied by alpha / rank.
        dropout: Share of the inputs of the difference that are dropped in training, in [0, 1).
        bias: With a bias, which is frozen too.

    Attributes:
        weight: ``(out, in)``, frozen.
        bias: ``(out,)``, frozen, or None.
        lora_A: ``(rank, in)``, trained.
        lora_B: ``(out, rank)``, trained.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a number is out of range.

    Example:
        >>> layer = LoRALinear(4, 3, rank=2, alpha=4)
        >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        ['lora_A', 'lora_B']
    """

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, alpha: float, dropout: float = 0.0, bias: bool = True
    ) -> None:
        check_at_least("in_features", in_features, 1)
        check_at_least("out_features", out_features, 1)
        check_at_least("rank", rank, 1)
        check_positive("alpha", alpha, "Usual values lie between rank and 2 rank")
        check_probability("dropout", dropout)
        require(dropout < 1, "dropout", "be < 1", dropout, "Leave some inputs")
        super().__init__(in_features, out_features, bias=bias)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> "LoRALinear":
        """Return a layer that starts as a given one, with copies of its weights, on its device and in its dtype.

        Args:
            linear: The layer, ``(..., in)`` to ``(..., out)``.
            rank: As of the class.
            alpha: As of the class.
            dropout: As of the class.
        """
        sizes = linear.in_features, linear.out_features
        layer = cls(*sizes, rank=rank, alpha=alpha, dropout=dropout, bias=linear.bias is not None)
        layer.load_state_dict(linear.state_dict(), strict=False)
        return layer.to(linear.weight).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out)`` of ``(..., in)``."""
        if not self.training:
            return F.linear(x, self.merged_weight(), self.bias)
        low = F.linear(F.dropout(x, self.dropout), self.lora_A)
        return super().forward(x) + self.alpha / self.rank * F.linear(low, self.lora_B)

    def merged_weight(self) -> Tensor:
        """Return ``weight + alpha / rank B A``, ``(out, in)``; rounded once, whatever the dtype of the weights."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        product = self.lora_B.to(wide) @ self.lora_A.to(wide)
        return (self.weight + self.alpha / self.rank * product).to(self.weight.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer with the merged weight, ``(..., in)`` to ``(..., out)``."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None).to(self.weight)
        linear.weight.copy_(self.merged_weight())
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"


def add_lora(
    backbone: _Module, *, rank: int = 8, alpha: float = 16.0, layers: str = ATTENTION, dropout: float = 0.0
) -> _Module:
    """Add LoRA to layers of a vision transformer by `peft`, in place, and freeze all other parameters.

    Only the matrices of low rank are trained; set ``requires_grad`` of norms and heads that are to be trained in full.
    The network computes the same at first. timm has queries, keys and values in one layer, so they share the matrix A.
    `merge_lora` turns the result into a plain network. An EMA teacher is copied after this call.

    Args:
        backbone: The network, such as a timm ViT or a `MaskedViT`.
        rank: Rank of each difference, >= 1; 4 to 16 are usual.
        alpha: Scale, > 0; rank to 2 rank is usual.
        layers: Regular expression that matches the whole name of a linear layer.
        dropout: Share of inputs of the differences that are dropped in training, in [0, 1).

    Returns:
        The same network.

    Raises:
        ModuleNotFoundError: If `peft` is not installed; ``pip install 'lightning_contrast[lora]'``.
        ValueError: If a number is out of range, or no layer matches.
    """
    check_at_least("rank", rank, 1)
    check_positive("alpha", alpha, "Usual values lie between rank and 2 rank")
    check_probability("dropout", dropout)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        message = "add_lora needs peft, pip install 'lightning_contrast[lora]'"
        raise ModuleNotFoundError(message, name="peft") from error
    scale: Any = alpha  # peft declares an int, and divides it by the rank
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=layers, lora_dropout=dropout)
    try:
        inject_adapter_in_model(config, backbone)
    except ValueError as error:
        linear = [name for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)]
        hint = f"The linear layers are {', '.join(linear[:8])} ..." if linear else "The network has no linear layers"
        fail("layers", "match the name of a linear layer", layers, f"{hint} (peft: {error})")
    return backbone


@torch.no_grad()
def merge_lora(backbone: _Module) -> _Module:
    """Replace the layers of `add_lora` by plain ones with the merged weights, in place; all are trainable again.

    Args:
        backbone: A network with layers ``(..., in)`` to ``(..., out)`` that `add_lora` made.

    Returns:
        The same network, whose ``state_dict`` has the names that it had before `add_lora`.

    Raises:
        ValueError: If it has no such layers.
    """
    from peft.tuners.lora import LoraLayer

    found = [(name, layer) for name, layer in backbone.named_modules() if isinstance(layer, LoraLayer)]
    require(len(found) > 0, "backbone", "have layers with LoRA", type(backbone).__name__, "Call `add_lora` first")
    for name, layer in found:
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(parent), last, layer.get_base_layer())
    return backbone.requires_grad_(True)
