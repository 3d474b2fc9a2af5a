"""Features of networks whose output is a map, tokens or an object of the Transformers library."""

from typing import Any, Literal, NoReturn, TypeAlias

from torch import Tensor, nn

from lightning_contrast._checks import check_choice, fail

TokenPooling: TypeAlias = Literal["mean", "cls"] | None
_HEADS = ("fc", "classifier", "head", "heads", "last_linear")


class FeatureOutput:
    """Forward hook of a backbone: pools its output to features ``(B, F)``, or raises if it is something else.

    - Features ``(B, F)`` are returned unchanged.
    - A map ``(B, F, ...)``, or ``(B, ..., F)`` as some transformers have it, is averaged over its positions.
    - Tokens ``(B, N, F)`` are pooled as ``tokens`` says.
    - Of an output of the Transformers library, ``pooler_output`` is taken, or ``last_hidden_state`` if there is none or
      ``tokens`` is given.

    Args:
        feature_dim: F.
        tokens: "mean" over the tokens without the first ``num_prefix_tokens`` of the network; "cls" for the first
            token; None raises for tokens.
        is_teacher: Errors name the argument `teacher` instead of `backbone`.
    """

    def __init__(self, feature_dim: int, tokens: TokenPooling = None, is_teacher: bool = False) -> None:
        check_choice("tokens", tokens, (None, "mean", "cls"))
        self.feature_dim, self.tokens, self.is_teacher = feature_dim, tokens, is_teacher

    @classmethod
    def attach(cls, module: nn.Module, feature_dim: int, tokens: TokenPooling, is_teacher: bool = False) -> None:
        """Register the hook on a module, in place of an earlier one, whose pooling stays unless another is given."""
        for key, other in list(module._forward_hooks.items()):
            if isinstance(other, cls):
                module._forward_hooks[key] = cls(feature_dim, tokens or other.tokens, is_teacher)
                return
        module.register_forward_hook(cls(feature_dim, tokens, is_teacher))

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        """Return the features ``(B, F)`` of an output of the module."""
        if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] == self.feature_dim:
            return output
        found = output
        if not isinstance(found, Tensor) and hasattr(output, "last_hidden_state"):
            pooled = getattr(output, "pooler_output", None)
            found = pooled if pooled is not None and self.tokens is None else output.last_hidden_state
        features = self._pooled(module, found) if isinstance(found, Tensor) else None
        if features is None:
            self._refuse(module, found)
        return features

    def _pooled(self, module: nn.Module, output: Tensor) -> Tensor | None:
        if output.ndim == 2:
            return output if output.shape[1] == self.feature_dim else None
        if output.ndim == 3 and output.shape[2] == self.feature_dim:
            if self.tokens is None:
                return None
            prefix = getattr(module, "num_prefix_tokens", 0)
            return output[:, 0] if self.tokens == "cls" else output[:, prefix:].mean(1)
        if output.ndim >= 3 and output.shape[1] == self.feature_dim:
            return output.flatten(2).mean(2)
        if output.ndim >= 4 and output.shape[-1] == self.feature_dim:
            return output.flatten(1, -2).mean(1)
        return None

    def _refuse(self, module: nn.Module, output: Any) -> NoReturn:
        name, width = type(module).__name__, self.feature_dim
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        head = next((name for name in _HEADS if isinstance(getattr(module, name, None), nn.Linear)), None)
        argument, option = ("teacher", "teacher_dim") if self.is_teacher else ("backbone", "feature_dim")
        if not isinstance(output, Tensor):
            hint = "Wrap it in a module that returns one tensor"
        elif output.ndim == 3 and output.shape[2] == width and self.is_teacher:
            hint = "Pool its tokens in a wrapper"
        elif output.ndim == 3 and output.shape[2] == width:
            hint = 'Set `tokens="mean"` or `tokens="cls"` next to `backbone` to pool its tokens'
        elif head is not None:
            hint = f"It has its classifier `{head}`: set `{argument}.{head} = nn.Identity()`"
        elif output.ndim == 2:
            hint = f"Set `{option}={output.shape[1]}`, or `global_pool` to one pooling"
        else:
            hint = f"Set `{option}` to the width of its output, or pool it in a wrapper"
        fail(argument, f"return features (B, {width})", f"{got} from {name}", hint)
