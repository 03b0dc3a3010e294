"""How far one distribution over tokens is from another."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats.

    A token of probability 0 under p adds nothing, whatever q says; one of probability 0 under q alone makes the row
    infinite. NaN in either gives NaN.

    Args:
        log_p: Natural log-probabilities ``[R, V]`` of R positions over V tokens.
        log_q: The same of the other distribution.

    Returns:
        float64 ``[R]``.
    """
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -math.inf, 0.0).sum(-1, dtype=torch.float64)
