"""How a weight and its two moments are kept between steps: the plain meaning of every choice, exact to the bit.

    fp32         | float32 |                                         4 bytes
    split        | bfloat16, rounded | int16: what is left |         4 bytes, the same float32
    kahan        | bfloat16 | bfloat16: what rounding has lost |     4 bytes
    stochastic   | bfloat16 |                                        2 bytes

Moments are float32; or bfloat16, rounded stochastically, since to nearest a long average stops moving; or e4m3fn codes,
rounded stochastically too, of which 256 share a float32 scale. Of the second moment it is the root that is kept in 8
bits, and never as 0 if it is not: else a parameter whose gradients are small would take huge steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbits.formats import Format
from fewbits.kernels.adamw import StateCodes
from fewbits.tensors.cast import decode, encode, round_to
from fewbits.tensors.random import key_of

STATE_BLOCK = 256
CODES = Format.named("e4m3fn")
LARGEST = float(CODES.max)
LEAST = float(CODES.smallest_subnormal)
NO_SCALE_BELOW = 2.0**-100  # blocks this small are kept as zeros: the inverse of their scale would overflow
STATE_CODES = StateCodes(CODES, NO_SCALE_BELOW)
_SMALL = 4096  # parameters with fewer elements are kept in float32: nothing to gain


@dataclass
class Storage:
    """One parameter with what belongs to it.

    Attributes:
        index: Its place among the parameters: stochastic rounding draws other numbers for each.
        param: float32 [...], or bfloat16 if ``master`` is not fp32.
        master: fp32, split, kahan, stochastic.
        low: int16 (split) or bfloat16 (kahan), the shape of ``param``; else None.
        m: First moment: float32, bfloat16 or uint8 codes, the shape of ``param``.
        v: Second moment, alike.
        m_scales: float32 ``[ceil(numel / 256)]`` with codes; else None.
        v_scales: Alike.
        steps: How often it was updated.
    """

    index: int
    param: nn.Parameter
    master: str
    low: Tensor | None
    m: Tensor
    v: Tensor
    m_scales: Tensor | None
    v_scales: Tensor | None
    steps: int = 0

    @classmethod
    def of(cls, index: int, param: nn.Parameter, master: str, state: str, elements: int | None = None) -> Storage:
        """Zero moments beside a float32 parameter; its data become bfloat16 where the master is kept so.

        Args:
            index: Its place among the parameters.
            param: float32 [...].
            master: fp32, split, kahan, stochastic.
            state: fp32, bf16, 8bit.
            elements: Of the whole parameter, where ``param`` is a shard: all processes decide alike what is small.
        """
        if param.ndim < 2 or (param.numel() if elements is None else elements) < _SMALL:
            master = state = "fp32"
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[state]
        scales = None
        m, v = (torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format) for _ in "mv")
        if state == "8bit":
            scales = [torch.zeros(-(-param.numel() // STATE_BLOCK), device=param.device) for _ in "mv"]
        values = param.detach()
        low = None
        if master == "split":
            param.data, low = split(values)
        elif master != "fp32":
            param.data = values.bfloat16()
            low = torch.zeros_like(param.data) if master == "kahan" else None
        return cls(index, param, master, low, m, v, *(scales or (None, None)))

    def tensors(self) -> dict[str, Tensor]:
        """All that must survive a restart, besides the parameter and ``steps``."""
        named = {"low": self.low, "m": self.m, "v": self.v, "m_scales": self.m_scales, "v_scales": self.v_scales}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def nbytes(self) -> int:
        """Bytes of the parameter and all that belongs to it, without gradient."""
        return self.param.nbytes + sum(tensor.nbytes for tensor in self.tensors().values())

    def master_value(self) -> Tensor:
        """The weight in float32, as exactly as it is known."""
        if self.low is not None and self.master == "split":
            return join(self.param.detach(), self.low)
        return self.param.detach().float()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Both moments in float32."""
        if self.m_scales is None or self.v_scales is None:
            return self.m.float(), self.v.float()
        roots = from_codes(self.v, self.v_scales)
        return from_codes(self.m, self.m_scales), roots * roots

    def keep_moments(self, m: Tensor, v: Tensor, seed: int) -> None:
        """Store both moments; ``seed`` is of this step and parameter."""
        if self.m_scales is not None and self.v_scales is not None:
            to_codes(m, self.m, self.m_scales, seed + 1, never_zero=False)
            to_codes(root(v), self.v, self.v_scales, seed + 2, never_zero=True)
            return
        for kept, value, own in ((self.m, m, seed + 1), (self.v, v, seed + 2)):
            kept.copy_(value if kept.dtype == torch.float32 else _stochastic(value, own))

    def keep_master(self, value: Tensor, seed: int) -> None:
        """Store the weight of a master that is not kahan."""
        if self.low is not None:
            high, low = split(value)
            self.param.data.copy_(high)
            self.low.copy_(low)
        else:
            self.param.data.copy_(value if self.master == "fp32" else _stochastic(value, seed))

    def add_compensated(self, change: Tensor) -> None:
        """Add to a kahan master: ``u = lost + change; p' = p + u; lost = u + (p − p')``, p' rounded to bfloat16."""
        assert self.low is not None
        p = self.param.detach().float()
        u = self.low.float() + change
        rounded = (p + u).bfloat16()
        self.low.copy_((u + (p - rounded.float())).bfloat16())
        self.param.data.copy_(rounded)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Cut float32 into bfloat16, rounded to nearest with ties away from zero, and int16: the difference of the words.

    | high: upper half of (word + 2^15) |  low: word − high · 2^16, from −2^15 to 2^15 − 1 |

    The bfloat16 of a number within half a unit of its largest one is Inf; ``join`` is exact even then, and of NaN.
    """
    word = value.contiguous().view(torch.int32)
    high = (word + 0x8000) >> 16
    low = word - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that ``split`` has cut, bit by bit."""
    word = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return word.view(torch.float32)


def root(x: Tensor) -> Tensor:
    """Square roots of float32, rounded correctly: PyTorch's own may be off by an ulp, through float64 they cannot."""
    return x.double().sqrt().float()


def to_codes(value: Tensor, codes: Tensor, scales: Tensor, seed: int, never_zero: bool) -> None:
    """Round float32 to codes that share a scale by 256; fill ``codes`` and ``scales``."""
    flat = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)
    amax = flat.abs().amax(1)
    kept = amax >= NO_SCALE_BELOW
    inverse = torch.where(kept, LARGEST / amax, 0.0)
    scaled = (flat * inverse[:, None]).reshape(-1)[: value.numel()]
    if never_zero:
        scaled = torch.where(scaled > 0, scaled.clamp(min=LEAST), scaled)
    scales.copy_(torch.where(kept, amax / LARGEST, 0.0))
    encode(scaled.view(value.shape), CODES, "stochastic", "saturate", seed=seed, out=codes)


def from_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """What the codes mean, float32."""
    values = decode(codes, CODES)
    return values * scales.repeat_interleave(STATE_BLOCK)[: codes.numel()].view(codes.shape)


def seed_of(recipe_seed: int, steps: int, index: int) -> int:
    """Where a parameter's random numbers of a step begin: seeds s, s + 1, s + 2 are its weight's, m's and v's."""
    return (key_of((recipe_seed << 32) + steps) & ~3) ^ (4 * index)


def _stochastic(value: Tensor, seed: int) -> Tensor:
    return round_to(value, "bf16", "stochastic", seed=seed).bfloat16()
