"""The ratios of `bench_generate.py` beside what we want of them, and its print."""

from __future__ import annotations

import statistics
from typing import Any

SIZES = (0.5e9, 3e9, float("inf"))
"""Weights a token reads, of which each model is below: SmolLM2-135M, the 1.24B model, the 6.2B one."""
TARGETS: dict[str, tuple[float | None, float | None, float | None]] = {
    "int8 prefill / best peer": (1.2, 1.15, 1.15),
    "int8 decode / llama.cpp Q8_0": (1.0, 1.2, 1.2),
    "int8 decode / bandwidth limit": (None, None, 0.85),
    "int4 decode / llama.cpp Q4_0": (0.9, 1.1, 1.15),
    "int4 prefill / llama.cpp Q4_0": (2.0, 2.5, 2.5),
    "int8 batch decode / batch 1": (3.0, 3.0, 3.0),
    "int8 decode after the long context / after the prompt": (None, 0.7, None),
    "int8, int8 cache, decode after the long context / after the prompt": (None, 0.7, None),
}
MEMORY = "GB of peak above llama.cpp's"
MEMORY_TARGET = (None, 0.4, 0.4)


def ratios(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What could be held against something in this run: its name, the value, and what we want (None: no wish)."""
    figures, size = report["figures"], next(i for i, most in enumerate(SIZES) if report["weights"] < most)
    peers = {name: one for name, one in figures.items() if not name.startswith("fewbits")}
    int8, int4 = figures.get("fewbits int8", {}), figures.get("fewbits int4", {})
    small_cache = figures.get("fewbits int8, int8 cache", {})
    q8, q4 = peers.get("llama.cpp Q8_0", {}), peers.get("llama.cpp Q4_0", {})
    pairs = {
        "int8 prefill / best peer": (int8.get("prefill"), max((one["prefill"] for one in peers.values()), default=0)),
        "int8 decode / llama.cpp Q8_0": (int8.get("decode"), q8.get("decode")),
        "int8 decode / bandwidth limit": (of_bandwidth(report), 1.0),
        "int4 decode / llama.cpp Q4_0": (int4.get("decode"), q4.get("decode")),
        "int4 prefill / llama.cpp Q4_0": (int4.get("prefill"), q4.get("prefill")),
        "int8 batch decode / batch 1": (int8.get("batch_decode"), int8.get("decode")),
        "int8 decode after the long context / after the prompt": (int8.get("context_decode"), int8.get("decode")),
        "int8, int8 cache, decode after the long context / after the prompt": (
            small_cache.get("context_decode"),
            small_cache.get("decode"),
        ),
    }
    found = []
    for what, (ours, theirs) in pairs.items():
        if ours and theirs:
            value, wanted = ours / theirs, TARGETS[what][size]
            found.append({"what": what, "value": value, "target": wanted, "reached": value >= (wanted or 0)})
    for name, mine, other in (("int8", int8, q8), ("int4", int4, q4)):
        if mine and other:
            above, wanted = (mine["peak_bytes"] - other["peak_bytes"]) / 1e9, MEMORY_TARGET[size]
            reached = wanted is None or above <= wanted
            found.append({"what": f"{name}: {MEMORY}", "value": above, "target": wanted, "reached": reached})
    return found


def bandwidth_limit(report: dict[str, Any], limits: dict[str, float]) -> float:
    """Tokens per second that reading the weights in 8 bits allows."""
    return limits.get("read_bytes_per_s", 0.0) / report["weights"]


def of_bandwidth(report: dict[str, Any]) -> float:
    """Decode in int8 over its limit, the median of the rounds: the bandwidth of a shared machine moves in seconds."""
    rounds = [one for one in report["rounds_done"] if "fewbits int8" in one and "limits" in one]
    found = [one["fewbits int8"]["decode"] / bandwidth_limit(report, one["limits"]) for one in rounds]
    return statistics.median(found) if found else 0.0


def show(report: dict[str, Any]) -> None:
    """Print the figures, the limits and the ratios."""
    print(f"{report['model']}: {report['prompt']} tokens of prompt, then {report['new']}; {report['threads']} threads")
    for name, one in report["figures"].items():
        line = f"  {name:24} prefill {one['prefill']:8.1f} tok/s   decode {one['decode']:7.2f} tok/s"
        line += f"   peak {one['peak_bytes'] / 1e9:5.2f} GB"
        line += f"   batch {report['batch']}: {one['batch_decode']:.1f}" if "batch_decode" in one else ""
        line += f"   after {report['context']}: {one['context_decode']:.2f}" if "context_decode" in one else ""
        print(line)
    if report["limits"]:
        read, multiply = report["limits"]["read_bytes_per_s"], report["limits"]["int8_ops_per_s"]
        print(f"  limits: {read / 1e9:.1f} GB/s read, {multiply / 1e9:.0f} GOP/s in int8; for 8 bits a weight:")
        prefill, decode = multiply / (2 * report["weights"]), bandwidth_limit(report, report["limits"])
        print(f"          prefill {prefill:.0f} tok/s, decode {decode:.1f} tok/s")
    for one in report["ratios"]:
        wish = "" if one["target"] is None else f"   want {one['target']}: {'yes' if one['reached'] else 'NO'}"
        print(f"  {one['what']}: {one['value']:.2f}{wish}")
    for name, reason in report["skipped"].items():
        print(f"  {name} left out: {reason}")
