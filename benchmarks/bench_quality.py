"""What the bits cost: KL divergence, top-1 agreement and perplexity of fewbits' precisions and of peers, in one run.

    PYTHONPATH=build/peers python benchmarks/bench_quality.py BF16_FOLDER [--json FILE] [--only NAME …]

The reference is the bf16 folder computed in fp32. One model is in memory at a time. A peer that is not installed is
skipped with its reason.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fewbits.measure.machine import this_machine
from fewbits.measure.memory import weight_bytes
from fewbits.measure.quality import Reference
from fewbits.measure.text import text_name, token_windows
from fewbits.models.load import AutoModelForCausalLM, AutoTokenizer

Load = Callable[[Path], nn.Module]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model in bf16")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens that quality is measured on")
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    options = parser.parse_args()
    windows = token_windows(AutoTokenizer.from_pretrained(options.model), windows=options.windows)
    results, skipped = measure(options.model, windows, options.only)
    for name, reason in skipped.items():
        print(f"{name} skipped: {reason}")
    if options.json:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": options.model.name,
            "text": f"{text_name()}, {windows.shape[0]} windows of {windows.shape[1]} tokens",
            "results": results, "skipped": skipped, "machine": this_machine().to_json(),
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(
    folder: Path, windows: torch.Tensor, names: list[str]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Hold every model against the reference, and print each as it comes."""
    reference = Reference(transformers_model(torch.float32)(folder).eval(), windows)
    results, skipped = {}, {}
    print(f"{'':28} KL nats/token     top-1 %  perplexity  MiB of weights")
    print(f"{'fp32':28} {0:<17} {100:7.1f} {reference.quality.perplexity:11.3f}")
    for name in names:
        try:
            model = MODELS[name](folder).eval()
        except ImportError as error:
            skipped[name] = str(error)
            continue
        quality, size = reference.measure(model), bytes_of(model)
        results[name] = asdict(quality) | {"bytes": size}
        kl = f"{quality.kl:.4f} ±{quality.kl_stderr:.1g}"
        print(
            f"{name:28} {kl:17} {100 * quality.top1:7.1f} {quality.perplexity:11.3f} {size / 2**20:15.1f}", flush=True
        )
        del model
    return results, skipped


def transformers_model(dtype: torch.dtype, **quantization: Any) -> Load:
    """The checkpoint as transformers loads it."""

    def load(folder: Path) -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantization)

    return load


def fewbits_model(precision: str, **options: Any) -> Load:
    """A precision of fewbits; the head is quantized too."""

    def load(folder: Path) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, precision=precision, **options)

    return load


def bitsandbytes(**how: bool | str) -> Load:
    """A precision of bitsandbytes, as transformers sets it up: the head stays in 16 bits."""

    def load(folder: Path) -> nn.Module:
        import bitsandbytes  # noqa: F401 - transformers' own message for its absence is a long one

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for every layer and token
        config = transformers.BitsAndBytesConfig(**how)
        return transformers_model(torch.bfloat16, quantization_config=config, device_map="cpu")(folder)

    return load


def torchao_w8a8(folder: Path) -> nn.Module:
    """W8A8 with dynamic scales per token; transformers leaves the head in 16 bits."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return transformers_model(torch.bfloat16, quantization_config=config, device_map="cpu")(folder)


MODELS: dict[str, Load] = {
    "transformers bf16": transformers_model(torch.bfloat16),
    "fewbits int8": fewbits_model("int8"),
    "fewbits int8, rotate=False": fewbits_model("int8", rotate=False),
    "fewbits int8, int8 cache": fewbits_model("int8", kv_cache="int8"),
    "fewbits int8-weight": fewbits_model("int8-weight"),
    "fewbits fp8": fewbits_model("fp8"),
    "fewbits int4": fewbits_model("int4"),
    "fewbits nf4": fewbits_model("nf4"),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao W8A8": torchao_w8a8,
}


def bytes_of(model: nn.Module) -> int:
    """Bytes of weights in memory, with the scales that bitsandbytes keeps outside of parameters and buffers."""
    outside = 0
    for module in model.modules():
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        if scales is None:  # the first forward pass moves them
            scales = getattr(getattr(module, "state", None), "SCB", None)
        outside += 0 if scales is None else scales.nbytes
    return weight_bytes(model) + outside


if __name__ == "__main__":
    main()
