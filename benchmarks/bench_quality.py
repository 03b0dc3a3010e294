"""What the bits cost: KL divergence, top-1 agreement and perplexity of fewbits' precisions and of peers, in one run.

    PYTHONPATH=build/peers python benchmarks/bench_quality.py BF16_FOLDER [--json FILE] [--only NAME …]
        [--text topics docstrings FILE …] [--windows N]

The reference is the bf16 folder computed in fp32. One model is in memory at a time, and is measured on every text. A
peer that is not installed is skipped with its reason. Rows named by a method are folders that `fewbits convert` writes;
they are kept under build/quality, and taken from there the next time. The texts: Python's help topics (of which
calibration reads another part), the docstrings of its standard library, or a file.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fewbits.measure.machine import this_machine
from fewbits.measure.memory import is_quantized, weight_bytes
from fewbits.measure.quality import Quality, Reference
from fewbits.measure.text import text_name, token_windows
from fewbits.models.load import AutoModelForCausalLM, AutoTokenizer
from fewbits.quantize.convert import convert

Load = Callable[[Path], nn.Module]

_FOLDERS = Path("build/quality")
_PER_POSITION = ("kls", "losses", "worst")  # of a Quality: too much for a table


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model in bf16")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens that quality is measured on")
    parser.add_argument("--text", nargs="+", default=["topics"], help="topics, docstrings, or UTF-8 files")
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = dict(windows_of(text, tokenizer, options.windows) for text in options.text)
    results, skipped = measure(options.model, texts, options.only)
    for name, reason in skipped.items():
        print(f"{name} skipped: {reason}")
    if options.json:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": options.model.name,
            "texts": {name: f"{len(ids)} windows of {ids.shape[1]} tokens" for name, ids in texts.items()},
            "results": results, "skipped": skipped, "machine": this_machine().to_json(),
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def windows_of(text: str, tokenizer: Any, windows: int) -> tuple[str, torch.Tensor]:
    """The name of a text, and its windows of tokens."""
    if text == "topics":
        return text_name(), token_windows(tokenizer, windows=windows)
    if text != "docstrings":
        return text_name(Path(text)), token_windows(tokenizer, Path(text), windows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "docstrings.txt"
        file.write_text("\n\n".join(docstrings()), encoding="utf-8")
        return "docstrings of Python's standard library", token_windows(tokenizer, file, windows)


def docstrings() -> Iterator[str]:
    """What the modules of the standard library say of themselves: prose of several hundred authors."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if said and not path.name.startswith("_"):
            yield said


def measure(
    folder: Path, texts: dict[str, torch.Tensor], names: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Hold every model against the reference on every text, and print each as it comes."""
    results: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        original = transformers_model(torch.float32)(folder).eval()
        references = {text: stack.enter_context(Reference(original, ids)) for text, ids in texts.items()}
        del original
        print(f"{'':28} KL nats/token     top-1 %  perplexity   MiB  bits  text")
        for text, reference in references.items():
            show("fp32", reference.quality, None, None, text)
        for name in names:
            try:
                model = MODELS[name](folder).eval()
            except ImportError as error:
                skipped[name] = str(error)
                continue
            size, bits = bytes_of(model), bits_of(model)
            results[name] = {"bytes": size, "bits_per_weight": bits, "texts": {}}
            for text, reference in references.items():
                quality = reference.measure(model)
                results[name]["texts"][text] = figures(quality)
                show(name, quality, size, bits, text)
            del model
    return results, skipped


def figures(quality: Quality) -> dict[str, float]:
    """The means of a Quality and their errors."""
    return {field.name: getattr(quality, field.name) for field in fields(quality) if field.name not in _PER_POSITION}


def show(name: str, quality: Quality, size: int | None, bits: float | None, text: str) -> None:
    """A line of the table."""
    kl = f"{quality.kl:.4f} ±{quality.kl_stderr:.1g}"
    mib, wide = "" if size is None else f"{size / 2**20:.0f}", "" if bits is None else f"{bits:.2f}"
    top1 = 100 * quality.top1
    print(f"{name:28} {kl:17} {top1:7.1f} {quality.perplexity:11.3f} {mib:>5} {wide:>5}  {text}", flush=True)


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


def converted(to: str, **how: Any) -> Load:
    """A folder that `fewbits convert` writes, as fewbits loads it."""

    def load(folder: Path) -> nn.Module:
        name = "-".join([folder.name, to, *(f"{key}={value}" for key, value in how.items())])
        if not (_FOLDERS / name / "config.json").exists():
            _FOLDERS.mkdir(parents=True, exist_ok=True)
            convert(folder, _FOLDERS / name, to=to, overwrite=True, **how)
        return AutoModelForCausalLM.from_pretrained(_FOLDERS / name)

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
    "fewbits int8, outliers apart": fewbits_model("int8", llm_int8_threshold=6.0),
    "fewbits int8, int8 cache": fewbits_model("int8", kv_cache="int8"),
    "fewbits int8-weight": fewbits_model("int8-weight"),
    "fewbits fp8": fewbits_model("fp8"),
    "fewbits int4": fewbits_model("int4"),
    "fewbits nf4": fewbits_model("nf4"),
    "fewbits mxfp4": fewbits_model("mxfp4"),
    "int8, a folder": converted("int8"),
    "int8, gptq, rotated": converted("int8", method="gptq", rotate=True),
    "int8, quarot": converted("int8", method="quarot"),
    "int8, quarot, gptq": converted("int8", method="quarot+gptq"),
    "int8, smoothquant": converted("int8", method="smoothquant"),
    "int8-weight, gptq": converted("int8-weight", method="gptq"),
    "fp8, gptq": converted("fp8", method="gptq"),
    "int4, gptq": converted("int4", method="gptq"),
    "int4, gptq, rotated": converted("int4", method="gptq", rotate=True),
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


def bits_of(model: nn.Module) -> float | None:
    """Bits per weight of the quantized layers but the output head, scales included; None where they do not say."""
    head = model.get_output_embeddings()
    counts = [each.quantized_bits() for each in model.modules() if is_quantized(each) and each is not head]
    return sum(bits for bits, _ in counts) / sum(weights for _, weights in counts) if counts else None


if __name__ == "__main__":
    main()
