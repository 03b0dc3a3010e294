"""Hold GGUF files written by fewbits against llama.cpp: does it run them, and compute what transformers computes?

    python tools/interop_gguf.py MODEL… [--types q8_0,q4_0,q4_1,bf16] [--text TEXT] [--json FILE]

Needs llama-cpp-python beside fewbits. Each MODEL is written in each type; llama.cpp runs the file, and transformers the
numbers that stand in it, in float32. Printed per file: whether both cut the text into the same tokens, how often both
have the same most likely next token, and the Kullback-Leibler divergence of llama.cpp's predictions from transformers'
(nats per token; llama.cpp rounds activations to 8 bits for block types, and its cache to 16, so it is not 0).

Exit code 1 if tokens differ, or the mean divergence is above 0.02 nats for a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from fewbits.models.layouts import gguf
from fewbits.models.source import Source, open_source

TEXT = "The capital of France is Paris. In 1789 its people stormed the Bastille, and 12345 other things followed."
LIMIT = 0.02  # nats per token


@dataclass(frozen=True)
class Agreement:
    """How a file does; `kl` and `kl_max` in nats per token, `top1` a share of positions."""

    model: str
    type: str
    nbytes: int
    tokens: int
    same_tokens: bool
    top1: float
    kl: float
    kl_max: float


def main() -> int:
    """Write, run and compare; 1 if a file does badly."""
    arguments = _arguments()
    found = []
    for model in arguments.models:
        source = open_source(model)
        for kind in arguments.types.split(","):
            with tempfile.TemporaryDirectory() as folder:
                found.append(compare(source, kind, Path(folder) / f"{source.path.stem}.{kind}.gguf", arguments.text))
            row = found[-1]
            tokens = "same" if row.same_tokens else "DIFFER"
            print(
                f"{row.model:40} {row.type:5} {row.nbytes / 1e6:8.1f} MB  tokens {tokens}"
                f"  top-1 {row.top1:6.1%}  KL {row.kl:.2e}, at most {row.kl_max:.2e}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    return int(any(not row.same_tokens or not row.kl <= LIMIT for row in found))


def compare(source: Source, kind: str, path: Path, text: str) -> Agreement:
    """Write one file, and run it in llama.cpp and in transformers."""
    gguf.write(path, source, gguf.plan(source, kind))
    ids = list(source.tokenizer()(text).input_ids)
    theirs, their_ids = llama_cpp_logits(path, text, ids)
    ours = transformers_logits(path, ids)
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    return Agreement(
        source.path.name,
        kind,
        path.stat().st_size,
        len(ids),
        ids == their_ids,
        (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        divergence.mean().item(),
        divergence.max().item(),
    )


def llama_cpp_logits(path: Path, text: str, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """llama.cpp's logits for the tokens, float64 `[tokens, vocabulary]`, and the tokens it makes of the text itself."""
    from llama_cpp import Llama

    llama = Llama(
        str(path), logits_all=True, n_ctx=max(64, len(ids)), n_batch=max(64, len(ids)), n_threads=1, verbose=False
    )
    llama.eval(ids)
    logits = torch.from_numpy(np.array(llama.scores[: len(ids)], np.float64))
    # add_bos asks for one only where the file says that texts begin with it
    own = llama.tokenize(text.encode(), add_bos=True, special=True)
    llama.close()
    return logits, own


def transformers_logits(path: Path, ids: list[int]) -> torch.Tensor:
    """Transformers' logits of the numbers in the file, float64 `[tokens, vocabulary]`."""
    source = open_source(path)
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32, attn_implementation="eager")
    weights = {name: source.read(name).float() for name in source.tensors}
    missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    assert missing <= set(model.all_tied_weights_keys), missing
    model.tie_weights()
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids])).logits[0].double()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="Hub id, folder or .gguf file")
    parser.add_argument("--types", default="q8_0,q4_0,q4_1,bf16", help="types of file, with commas")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
