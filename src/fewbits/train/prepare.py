"""The model of a run, ready to train: all its weights in float32, or adapters on a frozen base in few bits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.models.filling import Progress
from fewbits.models.generate import context_length
from fewbits.models.load import AutoModelForCausalLM
from fewbits.models.source import Source
from fewbits.train.settings import Settings

WEIGHT_DECAY = 0.01  # of matrices; vectors (norms, biases) are left alone, as is usual
ADAPTER_SCALE = 2  # lora_alpha / rank


def check_length(source: Source, length: int) -> None:
    """See that a window fits into the model's context.

    Raises:
        FewbitsError: If not.
    """
    context = context_length(source.config)
    if context is not None and length > context:
        raise FewbitsError(
            f"--length is {length}, but the context of {source.path} has {context} tokens; give at most that"
        )


def prepared_model(settings: Settings, progress: Progress | None = None) -> nn.Module:
    """Load the model in training mode; new adapters come from torch's random state.

    Raises:
        FewbitsError: As ``from_pretrained``; or PEFT is needed and not installed.
    """
    if settings.lora is None:
        whole: nn.Module = AutoModelForCausalLM.from_pretrained(settings.model, precision="fp32", progress=progress)
        return whole.train()
    peft = _peft()
    base = AutoModelForCausalLM.from_pretrained(settings.model, precision=settings.base_precision, progress=progress)
    config = peft.LoraConfig(
        r=settings.lora, lora_alpha=ADAPTER_SCALE * settings.lora, target_modules="all-linear", lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():  # peft asks transformers for a name that it has given up
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted: nn.Module = peft.get_peft_model(base, config)
    return adapted.train()


def prepared_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW over what is trained; vectors without weight decay."""
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in trained if param.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [param for param in trained if param.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise FewbitsError("--lora: adapters are those of PEFT, which is not installed; pip install peft") from None
    return peft
