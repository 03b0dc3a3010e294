"""Every Triton kernel compiled for GPUs that are not here, down to their machine code.

`test_triton` runs this file in a process of its own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbits.kernels.cuda import decode, matmul, rescale, rotation, tokens

MOST_SHARED = 99 << 10  # bytes a block may have on the GPUs with the least, compute capability 8.6 and 8.9
GPUS = [80, 90]  # compute capabilities


def compiled(kernel: Any, capability: int, tensors: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """One kernel as for a launch with aligned tensors and sizes."""
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    signature = {name: "constexpr" if name in constants else tensors.get(name, "i32") for name in places}
    values = {(places[name],): value for name, value in constants.items()}
    aligned = {(places[name],): [["tt.divisibility", 16]] for name in places if signature[name][0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


MATMULS = [
    ("int8", 1, "int8", torch.bfloat16, 1), ("int8", 1, "int8", torch.bfloat16, 2),
    ("int8", 32, None, torch.float32, 1), ("int4", 32, "int8", torch.bfloat16, 1),
    ("int4", 128, "int8", torch.float16, 1), ("nf4", 64, None, torch.bfloat16, 1),
    ("e4m3fn", 1, "e4m3fn", torch.bfloat16, 1),
]  # fmt: skip


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("format_name", "G", "activations", "dtype", "digits"), MATMULS, ids=str)
def test_the_matmul_compiles(
    capability: int, few: bool, format_name: str, G: int, activations: str | None, dtype: torch.dtype, digits: int
) -> None:
    most = 64 if activations is None else 4096  # cuBLAS multiplies more floats
    plan = matmul.plan(1 if few else most, 4096, G, format_name, activations, dtype, digits)
    floats = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    x = "*i8" if activations else floats[dtype]
    tensors = {
        "x": x, "codes": "*i8", "scales": "*bf16", "token_scales": "*fp32", "values": "*fp32", "bias": "*fp32",
        "out": floats[dtype],
    }  # fmt: skip
    constants = plan.constants | {"BIAS": True, "DIGITS": digits} | ({"G": 1} if G == 1 else {})
    binary = compiled(matmul._matmul, capability, tensors, constants, **plan.options)
    assert "mma" in binary.asm["ptx"] or dtype == torch.float32, "tensor cores multiply"
    assert "cp.async" in binary.asm["ptx"], "the next codes are fetched while these are multiplied"
    assert binary.metadata.shared <= MOST_SHARED


@pytest.mark.parametrize("capability", [80, 90])
def test_the_other_kernels_compile_and_round_as_they_say(capability: int) -> None:
    quantizer = {"x": "*bf16", "codes": "*i8", "scales": "*fp32"}
    each = {"HALVES": False, "BLOCK": 4096}
    digits = compiled(
        tokens._quantize_tokens, capability, quantizer, each | {"DIVISOR": 127.0, "E4M3": False, "DIGITS": 2},
        enable_fp_fusion=False,
    )  # fmt: skip
    fp8 = compiled(
        tokens._quantize_tokens, capability, quantizer, each | {"DIVISOR": 448.0, "E4M3": True, "DIGITS": 1},
        enable_fp_fusion=False,
    )  # fmt: skip
    tensors = {"sums": "*i32", "token_scales": "*fp32", "channel_scales": "*bf16", "bias": "*fp32", "out": "*bf16"}
    constants = {"BIAS": True, "DIGITS": 2, "BLOCK": 1024}
    scaled = compiled(rescale._rescale, capability, tensors, constants, enable_fp_fusion=False)
    for binary in (digits, fp8, scaled):
        assert "fma." not in binary.asm["ptx"], "a product and a sum would be rounded once"
    for binary in (digits, fp8):
        assert "div.rn" in binary.asm["ptx"]
        assert "div.full" not in binary.asm["ptx"], "a division that is not correctly rounded"
    tensors = {"codes": "*i8", "scales": "*bf16", "values": "*fp32", "out": "*bf16"}
    for kind in range(4):
        compiled(decode._dequantize, capability, tensors, {"KIND": kind, "BLOCK": 1024})
    for block in (16, 512):
        constants = {"ROWS": 2048 // block, "BLOCK": block, "STAGES": block.bit_length() - 1}
        compiled(rotation._rotate, capability, {"x": "*fp32", "out": "*fp32", "factor": "fp32"}, constants)
