from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from gguf_roundtrip import convert, metadata, stored
from safetensors.torch import load_file, save_file
from tiny_folder import (
    TEMPLATE,
    TEXTS,
    byte_level_tokenizer,
    write_folder,
)
from transformers import AutoModelForCausalLM

from fewbits.errors import FewbitsError
from fewbits.models.layouts.gguf import GGUF_TYPES, gguf_type, plan, write
from fewbits.models.source import Source, open_source

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text"]
# Of the configuration, what a file does not hold: how weights were initialized, and names.
UNSAID = {"initializer_range", "_name_or_path", "_model_name_or_path", "architectures", "unk_token_id"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weights_read_back_are_those_that_gguf_would_round_to(tmp_path: Path, model_type: str, tied: bool) -> None:
    layers = 6 if model_type == "gemma3_text" else 2
    state = write_folder(tmp_path / "tiny", model_type, tie_word_embeddings=tied, num_hidden_layers=layers)
    if tied:
        del state["lm_head.weight"]
    _, file, rows = convert(tmp_path / "tiny")
    assert file.tensors.keys() == state.keys() == {row.tensor for row in rows}
    for name, tensor in state.items():
        x = tensor.float().numpy()
        if tensor.ndim == 2:
            expected = gguf.dequantize(gguf.quantize(x, T.Q8_0), T.Q8_0)
        else:
            offset = np.float32(model_type == "gemma3_text")  # norms are stored with it, and rounded so
            expected = (x + offset) - offset
        np.testing.assert_array_equal(file.read(name).numpy(), expected, err_msg=name)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_config_tokenizer_and_template_read_back_are_those_of_the_source(tmp_path: Path, model_type: str) -> None:
    layers = 6 if model_type == "gemma3_text" else 2
    write_folder(tmp_path / "tiny", model_type, num_hidden_layers=layers)
    source, file, _ = convert(tmp_path / "tiny")
    before, after = source.config.to_dict(), file.config.to_dict()
    skipped = UNSAID
    if model_type == "mistral":  # written as llama, whose configuration has more keys and no window
        assert (before["sliding_window"], after["model_type"]) == (4096, "llama")
        skipped = skipped | {"model_type", "sliding_window", "attention_bias", "mlp_bias", "pretraining_tp"}
    for key in {*before, *after} - skipped:
        approximate = isinstance(before.get(key), float)  # float32 in the file
        assert after.get(key) == (pytest.approx(before[key], rel=1e-7) if approximate else before.get(key)), key
    ours, theirs = file.tokenizer(), source.tokenizer()
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours(text).input_ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    generation = file.generation_config()
    assert generation is not None
    assert generation.eos_token_id == [2, 1]


@pytest.mark.parametrize("to", ["f32", "q8_0", "q4_1"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_the_loader_of_transformers_reads_the_same_numbers(tmp_path: Path, model_type: str, to: str) -> None:
    write_folder(tmp_path / "tiny", model_type)
    _, file, _ = convert(tmp_path / "tiny", to)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(file.read(name).float(), tensor), name


def test_rows_of_queries_and_keys_are_stored_in_pairs_and_other_rows_as_they_are(tmp_path: Path) -> None:
    state = write_folder(tmp_path / "tiny", attention_bias=True)
    convert(tmp_path / "tiny", "fp32")
    found = stored(tmp_path / "tiny.gguf")
    for name, heads in (("q", 4), ("k", 2)):
        for leaf in ("weight", "bias"):
            x = state[f"model.layers.1.self_attn.{name}_proj.{leaf}"].float().numpy()
            pairs = x.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(x.shape)
            np.testing.assert_array_equal(found[f"blk.1.attn_{name}.{leaf}"].data, pairs)
    value = state["model.layers.1.self_attn.v_proj.weight"].float().numpy()
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"].data, value)


@pytest.mark.parametrize(
    ("to", "matrices", "ends", "number"),
    [
        ("fp32", T.F32, T.F32, 0),
        ("fp16", T.F16, T.F16, 1),
        ("bf16", T.BF16, T.BF16, 32),
        ("int8", T.Q8_0, T.Q8_0, 7),
        ("int8-weight", T.Q8_0, T.Q8_0, 7),
        ("int4", T.Q4_0, T.Q8_0, 2),
        ("q4_1", T.Q4_1, T.Q8_0, 3),
    ],
)
def test_every_type_is_stored_as_its_rows_say(tmp_path: Path, to: str, matrices: T, ends: T, number: int) -> None:
    write_folder(tmp_path / "tiny")
    _, _, rows = convert(tmp_path / "tiny", to)
    found = stored(tmp_path / "tiny.gguf")
    assert [*found] == [row.name for row in rows]
    for row in rows:
        kind = (
            T.F32 if len(row.shape) == 1 else ends if row.name in ("token_embd.weight", "output.weight") else matrices
        )
        tensor = found[row.name]
        assert (row.type, row.nbytes) == (tensor.tensor_type, tensor.n_bytes) == (kind, tensor.data.nbytes), row
        assert tuple(reversed(tensor.shape)) == row.shape
        assert (row.reason is None) == (kind is matrices), row
    assert metadata(tmp_path / "tiny.gguf", "general.file_type") == number
    assert metadata(tmp_path / "tiny.gguf", "general.quantization_version") == (2 if number in (2, 3, 7) else None)


def test_precisions_name_the_types_and_an_unknown_one_is_refused() -> None:
    assert {name: gguf_type(name).name for name in ("fp32", "fp16", "bf16", "int8", "int8-weight", "int4")} == {
        "fp32": "f32",
        "fp16": "f16",
        "bf16": "bf16",
        "int8": "q8_0",
        "int8-weight": "q8_0",
        "int4": "q4_0",
    }
    assert all(gguf_type(name) is known for name, known in GGUF_TYPES.items())
    with pytest.raises(FewbitsError, match=r"precision 'nf4' is not written as GGUF; known: fp32, f32, .*, q4_1$"):
        gguf_type("nf4")


def test_rows_that_are_no_whole_blocks_are_kept_in_half_precision_and_say_so(tmp_path: Path) -> None:
    state = write_folder(tmp_path / "tiny", intermediate_size=80)
    _, file, rows = convert(tmp_path / "tiny", "int4")
    row = next(row for row in rows if row.name == "blk.0.ffn_down.weight")
    assert (row.type, row.nbytes) == (T.F16, 64 * 80 * 2)
    assert row.reason == "its rows of 80 elements are not whole blocks of 32"
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(file.read(name), state[name].half())
    embedding = next(row for row in rows if row.name == "token_embd.weight")
    assert embedding.reason == "embedding or output head: more exact than Q4_0"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_scaling_reads_back(tmp_path: Path, rope: dict[str, Any]) -> None:
    write_folder(tmp_path / "tiny", rope_parameters=rope)
    _, file, rows = convert(tmp_path / "tiny")
    assert file.config.rope_parameters == rope
    factors = [row for row in rows if row.tensor is None]
    assert [row.name for row in factors] == (["rope_freqs.weight"] if rope["rope_type"] == "llama3" else [])
    assert file.tensors.keys() == {row.tensor for row in rows} - {None}


def test_a_window_that_llama_cpp_lacks_bounds_the_context(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", "mistral", sliding_window=100)
    assert convert(tmp_path / "tiny")[1].config.max_position_embeddings == 100


def test_a_stored_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", tie_word_embeddings=True)
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "tiny" / "model.safetensors")
    _, file, _ = convert(tmp_path / "tiny")
    assert "output.weight" not in stored(tmp_path / "tiny.gguf")
    assert file.config.tie_word_embeddings


def test_a_gguf_file_is_rewritten_in_another_type(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny")
    _, eight, _ = convert(tmp_path / "tiny", "q8_0")
    write(tmp_path / "four.gguf", eight, plan(eight, "q4_0"))
    four = open_source(tmp_path / "four.gguf")
    name = "model.layers.1.self_attn.k_proj.weight"
    expected = gguf.dequantize(gguf.quantize(eight.read(name).numpy(), T.Q4_0), T.Q4_0)
    np.testing.assert_array_equal(four.read(name).numpy(), expected)
    assert four.config.to_dict() == eight.config.to_dict()
    assert four.tokenizer().get_vocab() == eight.tokenizer().get_vocab()


def test_tensors_are_read_a_few_rows_at_a_time_whatever_that_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "tiny")
    source, _, rows = convert(tmp_path / "tiny")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    monkeypatch.setattr("fewbits.models.layouts.gguf_tensors._AT_ONCE", 16 * 64)
    sizes, read_rows = [], source.read_rows

    def spy(name: str, start: int, stop: int) -> torch.Tensor:
        sizes.append(stop - start)
        return read_rows(name, start, stop)

    monkeypatch.setattr(source, "read_rows", spy)
    monkeypatch.setattr(source, "read", lambda name: pytest.fail(f"{name} was read whole"))
    reported: list[tuple[int, int]] = []
    write(tmp_path / "again.gguf", source, rows, progress=lambda done, total: reported.append((done, total)))
    assert (tmp_path / "again.gguf").read_bytes() == whole
    assert max(sizes) <= 64  # a vector's elements; of a matrix, 16 rows: a head
    total = sum(row.nbytes for row in rows)
    assert len(reported) == len(rows)
    assert reported[-1] == (total, total)


def test_the_file_is_the_one_that_gguf_s_own_writer_makes(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", "qwen2")
    source, _, rows = convert(tmp_path / "tiny")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "qwen2")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for row in rows:
        assert row.tensor is not None
        x = source.read(row.tensor).float().numpy()
        writer.add_tensor(row.name, x if row.type is T.F32 else gguf.quantize(x, row.type), raw_dtype=row.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "theirs.gguf").read_bytes() == (tmp_path / "tiny.gguf").read_bytes()


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {}, r"models of type 'gpt2' are not written as GGUF \(llama, mistral, .* are\); use --layout compre"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act is 'gelu', and readers of GGUF take 'silu' for granted; use"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True, and readers of GGUF take False for granted"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, and readers of GGUF take False for granted"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"rotary scaling 'dynamic' of llama is not written \(linear, yarn, llama3 are\)",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16.0}},
            "the parameter beta_fast=16.0 of rotary scaling 'yarn' is not written",
        ),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 2.0}
                | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            },
            "low_freq_factor of Llama 3's rotary scaling is 2.0, not 1.0",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "only 0.5 of each head is rotated, which is not written",
        ),
        (
            "phi3",
            {
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8}
                | {"long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
            },
            r"rotary scaling 'longrope' of phi3 is not written \(none is\)",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7, and readers take 32 for granted"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "its layers do not follow Gemma 3's pattern of five with a sliding window and one without",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused_before_any_work(
    tmp_path: Path, model_type: str, changes: dict[str, Any], message: str
) -> None:
    write_folder(tmp_path / "tiny", model_type, byte_level_tokenizer(), **changes)
    with pytest.raises(FewbitsError, match=rf"tiny: .*{message}"):
        plan(open_source(tmp_path / "tiny"), "q8_0")


@pytest.fixture
def changed(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights of a tiny model, to be changed and put back."""
    write_folder(tmp_path / "tiny")
    return load_file(tmp_path / "tiny" / "model.safetensors")


def put(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Source:
    save_file(weights, tmp_path / "tiny" / "model.safetensors")
    return open_source(tmp_path / "tiny")


def test_a_missing_or_misshapen_or_unknown_tensor_is_refused(tmp_path: Path, changed: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for weights, message in (
        (
            {key: value for key, value in changed.items() if key != name},
            f"1 tensors of the model are not in the checkpoint, such as {name}",
        ),
        (
            changed | {name: torch.zeros(95, 64)},
            rf"{name} has shape \[95, 64\], the configuration wants \[96, 64\]",
        ),
        (changed | {"model.extra.weight": torch.zeros(2)}, "tensor 'model.extra.weight' has no name in GGUF"),
        (
            changed | {name: torch.zeros(96, 64, dtype=torch.int8)},
            f"{name} is stored as I8, codes that are not read here",
        ),
    ):
        with pytest.raises(FewbitsError, match=message):
            plan(put(tmp_path, weights), "q8_0")


@pytest.mark.parametrize("to", ["q8_0", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name_and_row_and_leave_nothing(
    tmp_path: Path, changed: dict[str, torch.Tensor], name: str, value: float, to: str
) -> None:
    changed[name][37] = value
    source = put(tmp_path, changed)
    with pytest.raises(FewbitsError, match=f"tiny: {name}: row 37 holds NaN or Inf; mend the weights"):
        write(tmp_path / "tiny.gguf", source, plan(source, to))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_weights_beyond_the_type_are_refused_by_name(tmp_path: Path, changed: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    changed[name][37, 5] = 1e7
    source = put(tmp_path, changed)
    with pytest.raises(FewbitsError, match=f"{name}: row 37 holds 1.00.*e.07, for which the scale of a Q8_0 block is"):
        write(tmp_path / "tiny.gguf", source, plan(source, "q8_0"))
    with pytest.raises(FewbitsError, match=f"{name}: .* is beyond fp16"):
        write(tmp_path / "tiny.gguf", source, plan(source, "fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_existing_file_is_replaced_only_if_asked_and_kept_if_writing_fails(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny")
    source = open_source(tmp_path / "tiny")
    rows = plan(source, "q8_0")
    target = tmp_path / "sub" / "model.gguf"
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(FewbitsError, match=r"model.gguf exists; give another name, or --overwrite to replace it"):
        write(target, source, rows)
    with pytest.raises(FewbitsError, match=r"sub exists; give another name$"):
        write(target.parent, source, rows, overwrite=True)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(target, source, rows, overwrite=True, progress=stop)
    assert target.read_text() == "mine"
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    write(target, source, rows, overwrite=True)
    assert open_source(target).tensors
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]


def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "tiny")
    source = open_source(tmp_path / "tiny")

    def full(self: gguf.GGUFWriter, tensor: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path / "new" / "tiny.gguf", source, plan(source, "q8_0"))
    assert caught.value.filename == str(tmp_path / "new" / "tiny.gguf")
    assert not (tmp_path / "new").exists()
