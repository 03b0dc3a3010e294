"""bitsandbytes and transformers without fewbits, in a process of their own; arguments: a folder with models.

In each, the model ``original`` is quantized and saved as ``theirs``, and ``ours`` is read. What is in both is left
beside them, as ``theirs.safetensors`` and ``ours.safetensors``: codes, SCB and values of every layer of bitsandbytes,
and logits. Then the original is saved in 4 bits, with the values of every layer beside it.
"""

import copy
import sys
from pathlib import Path

import bitsandbytes
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

IDS = torch.arange(3, 67).view(2, 32)


def describe(folder: Path, **options: object) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Load a model; return it and what is in it."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            codes, SCB = module.weight.data.clone(), module.weight.SCB.clone()
            found |= {f"{name}/codes": codes, f"{name}/SCB": SCB, f"{name}/values": int8_vectorwise_dequant(codes, SCB)}
    with torch.no_grad():
        found["logits"] = model(IDS).logits
    return model, found


def describe_4bit(folder: Path, **options: object) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """The same in 4 bits: the values of every layer."""
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", quantization_config=config)
    layers = {n: module for n, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    return model, {n: values_of(each.weight) for n, each in layers.items()}


def values_of(weight: bitsandbytes.nn.Params4bit) -> torch.Tensor:
    """Dequantize a weight, a block in each row: its CPU kernel mistakes scales where rows are not whole blocks."""
    state = copy.copy(weight.quant_state)
    shape, blocks = state.shape, state.shape.numel() // state.blocksize
    if shape.numel() == blocks * state.blocksize:
        state.shape = torch.Size((blocks, state.blocksize))
    return dequantize_4bit(weight.data, state).view(shape)


IN_4_BITS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nested": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
}

for parent in map(Path, sys.argv[1:]):
    model, found = describe(parent / "original", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(parent / "theirs")
    save_file(found, parent / "theirs.safetensors")
    save_file(describe(parent / "ours")[1], parent / "ours.safetensors")
    for name, options in IN_4_BITS.items():
        model, found = describe_4bit(parent / "original", **options)
        model.save_pretrained(parent / name)
        save_file(found, parent / f"{name}.safetensors")
