"""Prefill and decode on a CUDA GPU: fewbits beside transformers' bf16 and bitsandbytes, in one run.

    python benchmarks/bench_gpu.py BF16_FOLDER [--json FILE] [--only NAME …]

The folder holds a causal model in bf16. One model is on the GPU at a time; each reads 4096 tokens in one forward pass
(prefill) and writes 128 after 512 with `generate` and a static cache, batch 1 (decode). transformers compiles that
step into CUDA graphs for every model whose kernels allow it, which is not ours to choose here. The best of the rounds
counts. Without a GPU it ends with code 2; a peer that is not installed is left out, and told.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

TARGETS = (
    ("decode", "transformers bf16", 1.5),
    ("decode", "bitsandbytes int8", 3.0),
    ("prefill", "transformers bf16", 1.3),
)
"""What fewbits' int8 is to reach: its tokens a second over a peer's."""

WRITTEN_AFTER = 512  # tokens of context before decode


def main() -> None:
    """Parse, measure one model after the other, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal model in bf16")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prefill")
    parser.add_argument("--new", type=int, default=128, help="tokens written in the decode")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"bench_gpu: torch {torch.__version__} finds no CUDA GPU on this machine; run it on one that has",
            file=sys.stderr,
        )
        sys.exit(2)
    figures: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    for name in options.only:
        try:
            model = MODELS[name](options.model).eval()
        except ImportError as error:
            skipped[name] = str(error)
            continue
        figures[name] = measure(model, options.prompt, options.new, options.rounds)
        print(f"  {name:20} {line(figures[name])}", flush=True)
        del model
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": options.model.name, "prompt": options.prompt,
        "new": options.new, "rounds": options.rounds, "gpu": torch.cuda.get_device_name(), "figures": figures,
        "ratios": ratios(figures), "skipped": skipped,
    }  # fmt: skip
    show(report)
    if options.json:
        from fewbits.measure.machine import this_machine

        options.json.write_text(json.dumps(report | {"machine": this_machine().to_json()}, indent=1) + "\n")


def measure(model: Any, prompt: int, new: int, rounds: int) -> dict[str, float]:
    """Tokens a second of prefill and decode, the best of the rounds; and bytes on the GPU."""
    tokens = torch.arange(prompt, device="cuda")[None] * 7 % (model.config.vocab_size - 10) + 3
    context = tokens[:, :WRITTEN_AFTER]
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # Triton and torch compile here
        prefill(model, tokens)
        write(model, context, new)
    read = min(prefill(model, tokens) for _ in range(rounds))
    # What the context and the first token take is taken off: the rest is decode alone.
    one, all_ = (min(write(model, context, count) for _ in range(rounds)) for count in (1, new))
    return {
        "prefill": prompt / read,
        "decode": (new - 1) / (all_ - one),
        "weight_bytes": weights,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def timed(run: Callable[[], object]) -> float:
    """Seconds until the GPU has done it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.no_grad():
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def prefill(model: Any, tokens: torch.Tensor) -> float:
    """Seconds of one forward pass over a prompt."""
    return timed(lambda: model(tokens, use_cache=False, logits_to_keep=1))


def write(model: Any, context: torch.Tensor, new: int) -> float:
    """Seconds of a prompt and so many tokens after it."""
    mask = torch.ones_like(context)
    return timed(
        lambda: model.generate(
            context, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            cache_implementation="static", pad_token_id=0,
        )
    )  # fmt: skip


def fewbits_model(precision: str) -> Callable[[Path], Any]:
    """A model as fewbits loads it, bf16 between its layers like the others."""

    def load(model: Path) -> Any:
        import fewbits

        return fewbits.AutoModelForCausalLM.from_pretrained(
            model, precision=precision, dtype=torch.bfloat16, device_map="cuda"
        )

    return load


def transformers_bf16(model: Path) -> Any:
    """The checkpoint as most people run it."""
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map="cuda")


def bitsandbytes_model(**settings: Any) -> Callable[[Path], Any]:
    """A model as bitsandbytes quantizes it, on transformers."""

    def load(model: Path) -> Any:
        import bitsandbytes  # noqa: F401 - transformers' own message for its absence is a long one

        config = transformers.BitsAndBytesConfig(**settings)
        return transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, quantization_config=config, device_map="cuda"
        )

    return load


MODELS: dict[str, Callable[[Path], Any]] = {
    "transformers bf16": transformers_bf16,
    "bitsandbytes int8": bitsandbytes_model(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes_model(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "fewbits int8": fewbits_model("int8"),
    "fewbits fp8": fewbits_model("fp8"),
    "fewbits int4": fewbits_model("int4"),
    "fewbits nf4": fewbits_model("nf4"),
}


def line(one: dict[str, float]) -> str:
    """A model's figures."""
    return (
        f"prefill {one['prefill']:9.0f} tok/s   decode {one['decode']:7.1f} tok/s   "
        f"weights {one['weight_bytes'] / 1e9:5.2f} GB   peak {one['peak_bytes'] / 1e9:5.2f} GB"
    )


def ratios(figures: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Every model of fewbits over every peer; where there is a target, with it."""
    wanted = {(what, peer): target for what, peer, target in TARGETS}
    return [
        {
            "ours": ours, "what": what, "peer": peer, "ratio": figures[ours][what] / figures[peer][what],
            "target": wanted.get((what, peer)) if ours == "fewbits int8" else None,
        }
        for ours in figures if ours.startswith("fewbits")
        for peer in figures if not peer.startswith("fewbits")
        for what in ("prefill", "decode")
    ]  # fmt: skip


def show(report: dict[str, Any]) -> None:
    """Print the ratios, and whether the targets are reached."""
    print(f"{report['model']} on {report['gpu']}, {report['date']}, torch {torch.__version__}: "
          f"prefill of {report['prompt']}, decode of {report['new']} after {WRITTEN_AFTER}")  # fmt: skip
    for one in report["ratios"]:
        verdict = ""
        if one["target"] is not None:
            verdict = f"   target {one['target']}: {'reached' if one['ratio'] >= one['target'] else 'MISSED'}"
        print(f"  {one['ours']:14} {one['what']:8} / {one['peer']:20} {one['ratio']:6.2f}{verdict}")
    for name, reason in report["skipped"].items():
        print(f"  {name} left out: {reason}")


if __name__ == "__main__":
    main()
