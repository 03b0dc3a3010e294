"""Which precision each operation takes, the same on every device, as a mode that is on during the forward pass.

| operations                                                                  | operands           | result    |
|-----------------------------------------------------------------------------|--------------------|-----------|
| linear layers                                                               | the recipe's       | `results` |
| other matmuls, convolutions, attention                                      | rounded to `results` | `results` |
| softmax, norms, sums, means, products, exp, log, pow, losses (`FP32`)       | widened to fp32    | fp32      |
| all else: additions, activations, embeddings                                | as they come       | PyTorch's |

Attention adds up, and takes its softmax, in fp32; its weights are rounded where the device's own kernel does so.
Linear layers named in the recipe's `keep` run in the format `kept`. A dtype given by the caller is respected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fewbits.train.causal_loss import causal_models, narrow_loss
from fewbits.train.cross_entropy import cross_entropy, takes
from fewbits.train.lint import warn_of_autocast
from fewbits.train.matmul import DTYPES, Observer, Operands, linear, runs_natively
from fewbits.train.recipe import Recipe
from fewbits.train.scaling import AmaxHistory


def _named(homes: tuple[Any, ...], names: str) -> frozenset[Any]:
    return frozenset(getattr(home, name) for home in homes for name in names.split() if hasattr(home, name))


MATMULS = _named(
    (torch, Tensor, functional),
    "matmul mm bmm mv addmm addmv baddbmm addbmm chain_matmul einsum __matmul__ __rmatmul__ bilinear conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention "
    "multi_head_attention_forward",
) | {torch.linalg.multi_dot, torch.linalg.vecdot}

FP32 = _named(
    (torch, Tensor, functional),
    "softmax log_softmax softmin gumbel_softmax logsumexp logcumsumexp layer_norm rms_norm group_norm batch_norm "
    "instance_norm local_response_norm normalize cosine_similarity norm sum nansum mean nanmean prod cumsum cumprod "
    "var std var_mean std_mean exp exp2 expm1 log log2 log10 log1p pow __pow__ __rpow__ rsqrt reciprocal softplus "
    "logsigmoid acos asin cosh sinh tan erfinv dist pdist cdist renorm cross_entropy nll_loss mse_loss l1_loss "
    "smooth_l1_loss huber_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits poisson_nll_loss "
    "gaussian_nll_loss hinge_embedding_loss cosine_embedding_loss margin_ranking_loss multi_margin_loss "
    "multilabel_margin_loss multilabel_soft_margin_loss soft_margin_loss triplet_margin_loss ctc_loss",
) | {torch.linalg.vector_norm, torch.linalg.matrix_norm, torch.linalg.norm}

_NARROW = (torch.float16, torch.bfloat16)


class Policy(TorchFunctionMode):
    """The table above, as a mode.

    Args:
        recipe: Formats of the matmuls.
        weights: The weights of linear layers by identity: their names, and whether they are kept.
    """

    def __init__(self, recipe: Recipe, weights: dict[int, tuple[str, bool]]) -> None:
        super().__init__()
        self.dtype = DTYPES[recipe.results.name]
        self.history = AmaxHistory(recipe.history)
        self.operands = Operands(recipe, self.history)
        kept = replace(
            recipe, weights=recipe.kept, activations=recipe.kept, gradients=recipe.kept, results=recipe.kept,
            scaling=None, master="fp32",
        )  # fmt: skip
        self.kept = Operands(kept, self.history)
        self._weights = weights
        self._observer: Observer | None = None
        self.active = False
        self._causal: list[nn.Module] = []

    def take_over_loss(self, model: nn.Module) -> None:
        """Let models of transformers hand over their logits in 16 bits; where nothing is narrow they are in float32."""
        self._causal = causal_models(model) if self.dtype in _NARROW else []

    def follow(self, model: nn.Module) -> None:
        """Know the weights of a model by ``fully_shard`` in the forward pass, when they are whole but other tensors.

        Their rounded copies are not held, which would be the whole model on each process.
        """
        self.operands.holds_weights = self.kept.holds_weights = False
        for module in model.modules():
            known = self._weights.get(id(module.weight)) if isinstance(module, nn.Linear) else None
            if known is not None:
                module.register_forward_pre_hook(partial(self._meet, known))

    def _meet(self, known: tuple[str, bool], module: nn.Linear, _: Any) -> None:
        self._weights[id(module.weight)] = known

    def observe(self, observer: Observer | None) -> None:
        """Show it every operand and result from now on; None ends that."""
        self._observer = self.operands.observer = self.kept.observer = observer

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be on in this context; no more so if it is on already."""
        if self.active:
            yield
            return
        warn_of_autocast()
        self.active = True
        try:
            with self, narrow_loss(self._causal):
                yield
        finally:
            self.active = False

    def forget_weights(self) -> None:
        """Let go of the rounded copies of weights that have changed; those of frozen ones stay."""
        self.operands.forget_weights()
        self.kept.forget_weights()

    def copy_bytes(self) -> int:
        """Bytes of all rounded weights that are held now."""
        return self.operands.copy_bytes() + self.kept.copy_bytes()

    def operands_of(self, weight: Tensor) -> Operands | None:
        """What rounds for a weight of a linear layer; None for other tensors."""
        known = self._weights.get(id(weight))
        return None if known is None else self.kept if known[1] else self.operands

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            args, kwargs = self._with_finite_mask(args, kwargs)
        if func in MATMULS:
            return self._matmul(func, args, kwargs)
        if func is functional.cross_entropy and len(args) == 2 and takes(*args, kwargs):
            result: Tensor = cross_entropy(*args, **kwargs)
            return result
        if func in FP32 and _has_narrow(args, kwargs):
            return func(*_cast(args, torch.float32, _NARROW), **_cast(kwargs, torch.float32, _NARROW))
        return func(*args, **kwargs)

    # `input` and `weight` are torch's names: callers may give them by keyword.
    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        operands, known = self.operands_of(weight), self._weights.get(id(weight))
        if operands is None or known is None:
            result: Tensor = self._matmul(functional.linear, (input, weight, bias), {})
            return result
        return linear(input, weight, bias, operands, known[0])

    def _with_finite_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A mask of the least float32 would be -Inf in fp16, and a row that is all masked NaN."""
        least = torch.finfo(self.dtype).min
        masks = [value for value in (*args[3:4], kwargs.get("attn_mask")) if isinstance(value, Tensor)]
        if not masks or not masks[0].is_floating_point():
            return args, kwargs
        mask = torch.where(masks[0].isinf(), masks[0], masks[0].clamp(min=least))
        if len(args) > 3:
            return (*args[:3], mask, *args[4:]), kwargs
        return args, {**kwargs, "attn_mask": mask}

    def _matmul(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        floats = (torch.float32, *_NARROW)
        args, kwargs = _cast(args, self.dtype, floats), _cast(kwargs, self.dtype, floats)
        device = next((arg.device.type for arg in _tensors(args, kwargs)), "cpu")
        if self.dtype == torch.float32 or runs_natively(device, self.dtype):
            result = func(*args, **kwargs)
        else:  # autograd rounds the gradients where it goes back through the two casts
            result = func(*_cast(args, torch.float32, _NARROW), **_cast(kwargs, torch.float32, _NARROW))
            result = _cast(result, self.dtype, (torch.float32,))
        if self._observer is not None:
            self._observer.matmul(func, args, result)
        return result


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The names and weights of a model's linear layers, tied ones once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, nn.Parameter) and id(weight) not in seen:
            seen.add(id(weight))
            found[name] = weight
    return found


def _cast(value: Any, dtype: torch.dtype, only: tuple[torch.dtype, ...]) -> Any:
    """The same arguments, tensors of some dtypes in another."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in only else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype, only) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype, only) for key, item in value.items()}
    return value


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    values = (*args, *kwargs.values())
    flat = [item for value in values for item in (value if isinstance(value, tuple | list) else (value,))]
    return [item for item in flat if isinstance(item, Tensor)]


def _has_narrow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(tensor.dtype in _NARROW for tensor in _tensors(args, kwargs))
