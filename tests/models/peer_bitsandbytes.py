"""bitsandbytes and transformers without fewbits, in a process of their own; arguments: a folder with models.

In each, the model ``original`` is quantized and saved as ``theirs``, and ``ours`` is read. What is in both is left
beside them, as ``theirs.safetensors`` and ``ours.safetensors``: codes, SCB and values of every layer of bitsandbytes,
and logits.
"""

import sys
from pathlib import Path

import bitsandbytes
import torch
import transformers
from bitsandbytes.functional import int8_vectorwise_dequant
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


for parent in map(Path, sys.argv[1:]):
    model, found = describe(parent / "original", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(parent / "theirs")
    save_file(found, parent / "theirs.safetensors")
    save_file(describe(parent / "ours")[1], parent / "ours.safetensors")
