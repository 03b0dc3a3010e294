"""Comparisons as `Comparison.to_json()` gives them, with figures drawn at random: what a page is tried with."""

import math
import random
from typing import Any

WORDS = [
    "The",
    " import",
    " statement",
    " of",
    " the",
    "\n",
    "    ",
    " module",
    "s",
    ".",
    " is",
    " executed",
    ",",
    " class",
]
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")  # fmt: skip
CANDIDATES = {
    "tiny-int8": ("int8", 8.02, 0.007, 40), "tiny-fp8": ("fp8", 8.02, 0.02, 32), "tiny-int4": ("int4", 4.25, 0.19, 18),
    "tiny-nf4": ("nf4", 4.5, 0.26, 20), "tiny-mxfp4": ("mxfp4", 4.25, 0.4, 16),
    "tiny-int8-weight": ("int8-weight", 8.13, 0.001, 46),
}  # fmt: skip


def comparison(
    windows: int = 2, length: int = 48, candidates: int = 3, layers: int = 4, **changes: Any
) -> dict[str, Any]:
    """A reference in fp32 and bf16, and candidates; `changes` replace parts of it."""
    draw = random.Random(0)
    tokens = [[draw.choice(WORDS) for _ in range(length)] for _ in range(windows)]
    hard = [[draw.expovariate(0.4) for _ in range(length)] for _ in range(windows)]
    rows = [_row(draw, "tiny.gguf", ("fp32", 32.0, 0.0, None), hard, layers),
            _row(draw, "tiny.gguf", ("bf16", 16.0, 0.0012, 55), hard, layers)]  # fmt: skip
    rows += [_row(draw, name, figures, hard, layers) for name, figures in list(CANDIDATES.items())[:candidates]]
    versions = {"python": "3.11.7", "fewbits": "0.1.0", "torch": "2.13.0+cpu"}
    machine = {"versions": versions, "system": "Linux 6.1 x86_64", "cpu": "AMD EPYC", "cores": 2, "threads": 2,
               "memory_bytes": 16 << 30, "available_bytes": 8 << 30, "gpus": [], "isa": "avx512",
               "isa_reason": ""}  # fmt: skip
    data = {
        "reference": "tiny.gguf", "reference_bytes": 98_000_000, "text": "Python 3.11.7 help topics",
        "windows": windows, "window_tokens": length, "prompt_tokens": length, "new_tokens": 32, "speed_repeats": 3,
        "date": "2026-11-24T14:24:46+00:00", "machine": machine, "notes": [], "tokens": tokens, "rows": rows,
    }  # fmt: skip
    return data | changes


def _row(
    draw: random.Random, name: str, figures: tuple[str, float, float, int | None], hard: list[list[float]], layers: int
) -> dict[str, Any]:
    precision, bits, kl, sqnr = figures
    kls = [[kl * draw.expovariate(1) for _ in window] for window in hard]
    losses = [[max(0.0, loss + draw.gauss(kl / 4, math.sqrt(kl) / 3)) for loss in window] for window in hard]
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS] + ["lm_head"]
    worst = sorted(((value, w, t) for w, window in enumerate(kls) for t, value in enumerate(window)), reverse=True)[:6]
    found = [
        {"window": w, "position": t, "kl": value, "context": " of the module", "following": " import",
         "reference": [[" import", 0.61], [" class", 0.2], [",", 0.03]],
         "candidate": [[" class", 0.44], [" import", 0.31], ["\n", 0.02]]} for value, w, t in worst
    ]  # fmt: skip
    return {
        "name": name, "precision": precision, "disk_bytes": int(16e6 * bits), "memory_bytes": int(17e6 * bits),
        "peak_bytes": int(17e6 * bits) + 90_000_000, "bits_per_weight": bits, "kl": kl, "kl_stderr": kl / 40,
        "top1": 1 - kl / 2, "top1_stderr": 0.002, "perplexity": 16.2 * math.exp(kl), "perplexity_stderr": 0.41,
        "prefill_tps": 20_000 / bits, "decode_tps": 900 / bits,
        "layers": [{"module": module, "format": precision, "bits": bits,
                    "sqnr_db": None if sqnr is None else sqnr + draw.uniform(-6, 6)} for module in names],
        "losses": [[None, *window[1:]] for window in losses], "kls": kls,
        "worst": found if kl else [],
    }  # fmt: skip
