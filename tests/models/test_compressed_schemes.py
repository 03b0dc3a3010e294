"""What a compressed-tensors configuration says: which precision of fewbits a layer has, and what is refused."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fewbits.errors import FewbitsError
from fewbits.models.layouts.compressed_schemes import schemes_of
from fewbits.models.layouts.compressed_tensors import WRITES, quantization_config
from fewbits.models.precision import PRECISIONS, Precision
from fewbits.models.quantized_source import as_weights

CONFIG = quantization_config(PRECISIONS["int8"], ["lm_head"])
WEIGHTS = "config_groups.group_0.weights"
INPUTS = "config_groups.group_0.input_activations"
LAYER = "model.layers.0.mlp.up_proj"


def changed(changes: dict[str, Any], config: dict[str, Any] = CONFIG) -> dict[str, Any]:
    """A copy in which the values at these dotted keys are others; ... takes a key out."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *keys, last = path.split(".")
        inner = config
        for key in keys:
            inner = inner[key]
        inner[last] = value
        if value is ...:
            del inner[last]
    return config


def precision_of(config: dict[str, Any], module: str = LAYER) -> Precision | None:
    return schemes_of(config, "x").of(module).precision


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_what_is_written_is_read(name: str, group_size: int | None) -> None:
    precision = PRECISIONS[name]
    if precision.group_size is not None and name != "mxfp4":  # its blocks have one size
        precision = replace(precision, group_size=group_size)
    assert precision_of(quantization_config(precision, [])) == precision


@pytest.mark.parametrize(
    "path",
    [f"{WEIGHTS}.group_size", f"{WEIGHTS}.symmetric", f"{WEIGHTS}.dynamic", f"{WEIGHTS}.type", f"{WEIGHTS}.num_bits",
     "config_groups.group_0.output_activations", "kv_cache_scheme", "global_compression_ratio", "version", "ignore"],
)  # fmt: skip
def test_a_key_may_be_left_out(path: str) -> None:
    assert precision_of(changed({path: ...})) is PRECISIONS["int8"]


INT4 = replace(PRECISIONS["int4"], group_size=None)
GROUPS = {f"{WEIGHTS}.strategy": "group", f"{WEIGHTS}.group_size": 32}
READ: dict[str, tuple[dict[str, Any], Precision | None]] = {
    "no activations": ({INPUTS: None}, replace(PRECISIONS["int8-weight"], group_size=None)),
    "a scale for all": ({f"{WEIGHTS}.strategy": "tensor"}, PRECISIONS["int8"]),
    "no strategy": ({f"{WEIGHTS}.strategy": None}, PRECISIONS["int8"]),
    "groups without a strategy": (
        {INPUTS: None, f"{WEIGHTS}.strategy": None, f"{WEIGHTS}.group_size": 64},
        replace(PRECISIONS["int8-weight"], group_size=64),
    ),
    "4 bits": ({INPUTS: None, f"{WEIGHTS}.num_bits": 4}, INT4),
    "4 bits, 8-bit activations": ({f"{WEIGHTS}.num_bits": 4, f"{INPUTS}.num_bits": 8}, INT4),
    "4 bits, actorder": ({INPUTS: None, f"{WEIGHTS}.num_bits": 4, f"{WEIGHTS}.actorder": "weight"}, INT4),
    "groups, 8-bit activations": (GROUPS, replace(PRECISIONS["int8-weight"], group_size=32)),
    "activations asymmetric": ({f"{INPUTS}.symmetric": False}, replace(PRECISIONS["int8-weight"], group_size=None)),
    "asymmetric": ({f"{WEIGHTS}.symmetric": False}, None),
    "blocks": ({f"{WEIGHTS}.strategy": "block", f"{WEIGHTS}.block_structure": [128, 128]}, None),
    "fp8": ({f"{WEIGHTS}.type": "float", f"{INPUTS}.type": "float", "format": "float-quantized"}, PRECISIONS["fp8"]),
    "fp8, a scale for all": (
        {f"{WEIGHTS}.type": "float", f"{INPUTS}.type": "float", f"{WEIGHTS}.strategy": "tensor"},
        PRECISIONS["fp8"],
    ),
    "fp8 weights only": ({f"{WEIGHTS}.type": "float", INPUTS: None}, None),
    "two equal groups": (
        {"config_groups.group_1": CONFIG["config_groups"]["group_0"] | {"targets": ["re:.*up_proj"]}},
        PRECISIONS["int8"],
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_the_precision_of_a_scheme(kind: str) -> None:
    changes, expected = READ[kind]
    assert precision_of(changed(changes)) == expected


def test_targets_choose_the_scheme() -> None:
    weight_only = {**CONFIG["config_groups"]["group_0"], "input_activations": None}
    config = changed(
        {
            "config_groups.by_name": {**weight_only, "targets": ["model.layers.1.mlp.up_proj"]},
            "config_groups.by_regex": {**weight_only, "targets": ["re:.*self_attn.*", "re:("]},
        }
    )
    names = {name: precision_of(config, name) for name in (LAYER, "model.layers.1.mlp.up_proj", "a.self_attn.q_proj")}
    assert [precision.name if precision else None for precision in names.values()] == [
        "int8", "int8-weight", "int8-weight",
    ]  # fmt: skip


def test_a_layer_that_no_target_is_for() -> None:
    other = {**CONFIG["config_groups"]["group_0"], "input_activations": None, "targets": ["re:.*q_proj"]}
    config = changed({"config_groups.group_0.targets": ["re:.*k_proj"], "config_groups.group_1": other})
    with pytest.raises(FewbitsError, match=rf"x: no group of quantization_config is for {LAYER}; download config.json"):
        precision_of(config)


REFUSED: list[tuple[str, Any, str]] = [
    ("format", "nvfp4-pack-quantized", "of its formats, int-quantized, .* can"),
    ("format", ..., "of its formats"),
    ("config_groups", {}, "it has no config_groups"),
    ("config_groups", None, "it has no config_groups"),
    ("config_groups", [], "it has no config_groups"),
    ("config_groups.group_0", None, "group_0 has no weights"),
    (WEIGHTS, None, "group_0 has no weights"),
    (f"{WEIGHTS}.num_bits", 3, "group_0.weights: 3-bit int; int and float of 8 and 4 can"),
    (f"{WEIGHTS}.num_bits", None, "group_0.weights: None-bit int"),
    (f"{WEIGHTS}.type", "posit", "group_0.weights: 8-bit posit"),
    (f"{WEIGHTS}.strategy", "tensor_group", "strategy 'tensor_group'; channel, group, tensor, block can"),
    (f"{WEIGHTS}.strategy", "group", "group_size None is no number of input features"),
    (f"{WEIGHTS}.strategy", "block", "block_structure None is no size"),
    (f"{WEIGHTS}.dynamic", True, "strategy 'channel'"),
    (f"{WEIGHTS}.actorder", "group", "actorder 'group' reorders input features"),
    (f"{INPUTS}.dynamic", False, "group_0.input_activations: static scales of activations are not read, dynamic are"),
    (f"{INPUTS}.dynamic", "local", "static scales of activations"),
    ("config_groups.group_0.output_activations", {"num_bits": 8}, "group_0.output_activations: quantized outputs"),
    ("kv_cache_scheme", {"num_bits": 8, "type": "float"}, "kv_cache_scheme: a quantized cache is not read"),
    ("transform_config", {"config_groups": {"u": {"type": "hadamard"}}}, "transform_config: transformed weights"),
    ("sparsity_config", {"format": "sparse-24-bitmask"}, "its sparsity_config is not dense"),
]


@pytest.mark.parametrize(("path", "value", "why"), REFUSED, ids=str)
def test_another_scheme_is_refused_by_name(path: str, value: Any, why: str) -> None:
    config = changed({path: value})
    message = (
        rf"^x: this compressed-tensors scheme \({config.get('format')!r}\) cannot be read: .*{why}.*; load it with"
    )
    with pytest.raises(FewbitsError, match=message):
        schemes_of(config, "x")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", None])
def test_another_method_is_refused_by_name(method: str | None) -> None:
    source = SimpleNamespace(config=SimpleNamespace(quantization_config={"quant_method": method}), path="x")
    message = rf"x: quant_method {method!r} cannot be read; 'compressed-tensors', 'bitsandbytes' can"
    with pytest.raises(FewbitsError, match=message):
        as_weights(source)
