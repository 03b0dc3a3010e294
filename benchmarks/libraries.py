"""What `bench_generate.py` runs: a loader for each library, each over its own way of calling a model.

What a library reads is made from the bf16 folder first, once, under build/speed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[list[int], int, int], tuple[float, float]]
"""Takes a prompt, a number of tokens to write and a number of equal texts; gives the seconds of reading and writing."""

THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1


def made(model: Path, name: str, make: Callable[[Path], None]) -> Path:
    """What a library runs, made once."""
    path = Path("build/speed") / f"{model.name}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(path)
    return path


def torch_step(model: Any) -> Step:
    """Time a transformers model: its own forward with its own cache."""
    import torch

    from fewbits.measure.speed import time_once

    torch.set_num_threads(THREADS)

    def step(prompt: list[int], new: int, batch: int) -> tuple[float, float]:
        return time_once(model, torch.tensor([prompt] * batch), new, {"logits_to_keep": 1})

    return step


def fewbits_model(precision: str, kv_cache: str | None = None, fused: bool = True) -> Callable[[Path], Step]:
    """A model as fewbits loads it; or with its decoder layers as modules, not in one call each."""

    def load(model: Path) -> Step:
        import fewbits
        from fewbits.models.fused import unfuse

        loaded = fewbits.AutoModelForCausalLM.from_pretrained(model, precision=precision, kv_cache=kv_cache)
        if not fused:
            unfuse(loaded)
        return torch_step(loaded)

    return load


def llama_cpp(type_name: str) -> Callable[[Path], Step]:
    """A GGUF file that fewbits wrote, run by llama.cpp."""

    def load(model: Path) -> Step:
        from llama_cpp import Llama

        import fewbits

        def make(path: Path) -> None:
            fewbits.convert(model, path, to=type_name, layout="gguf")

        file = made(model, f"{type_name}.gguf", make)
        llama = Llama(
            str(file), n_ctx=4608, n_batch=512, n_ubatch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False
        )

        def step(prompt: list[int], new: int, batch: int) -> tuple[float, float]:
            assert batch == 1
            llama.reset()
            started = time.perf_counter()
            llama.eval(prompt)
            read = time.perf_counter()
            for token in range(new):
                llama.eval([5 + token])
            return read - started, time.perf_counter() - read

        return step

    return load


def ctranslate2_int8(model: Path) -> Step:
    """CTranslate2's int8, which quantizes activations too."""
    import ctranslate2

    def make(path: Path) -> None:
        converter = ctranslate2.converters.TransformersConverter(str(model))
        converter.convert(str(path), quantization="int8")

    generator = ctranslate2.Generator(
        str(made(model, "ctranslate2", make)), device="cpu", compute_type="int8", inter_threads=1, intra_threads=THREADS
    )
    words = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    by_id = {index: word for word, index in words.items()}

    def timed(tokens: list[str], new: int) -> float:
        started = time.perf_counter()
        generator.generate_batch(
            [tokens], max_length=new, min_length=new, include_prompt_in_result=False, end_token=[], sampling_topk=1
        )
        return time.perf_counter() - started

    def step(prompt: list[int], new: int, batch: int) -> tuple[float, float]:
        assert batch == 1
        tokens = [by_id[index] for index in prompt]
        read = timed(tokens, 1)
        return read, timed(tokens, 1 + new) - read

    return step


def torchao_compiled(model: Path) -> Step:
    """The W8A8 of torchao with dynamic scales, compiled."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    quantize_(loaded, Int8DynamicActivationInt8WeightConfig())
    loaded.forward = torch.compile(loaded.forward, dynamic=True)
    step = torch_step(loaded)
    step(list(range(3, 515)), 2, 1)  # compiles for this length too
    return step


def bitsandbytes_int8(model: Path) -> Step:
    """LLM.int8() on transformers."""
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    return torch_step(
        AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        ).eval()
    )


def transformers_bf16(model: Path) -> Step:
    """The checkpoint as most people run it."""
    import torch
    from transformers import AutoModelForCausalLM

    return torch_step(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval())


LOADERS: dict[str, Callable[[Path], Step]] = {
    "fewbits int8": fewbits_model("int8"),
    "fewbits int8, int8 cache": fewbits_model("int8", "int8"),
    "fewbits int8, as modules": fewbits_model("int8", fused=False),
    "fewbits int4": fewbits_model("int4"),
    "fewbits int4, as modules": fewbits_model("int4", fused=False),
    "llama.cpp Q8_0": llama_cpp("q8_0"),
    "llama.cpp Q4_0": llama_cpp("q4_0"),
    "CTranslate2 int8": ctranslate2_int8,
    "torchao W8A8 compiled": torchao_compiled,
    "bitsandbytes int8": bitsandbytes_int8,
    "transformers bf16": transformers_bf16,
}
