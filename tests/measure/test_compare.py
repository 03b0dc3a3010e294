import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.errors import FewbitsError
from fewbits.measure.compare import compare
from fewbits.measure.comparison import Comparison
from fewbits.measure.quality import compare_models
from fewbits.measure.text import token_windows
from fewbits.quantize.convert import convert

TinyLlama = Callable[..., Any]
SMALL = {"windows": 2, "window_tokens": 32, "new_tokens": 2}


@pytest.fixture(scope="module")
def of_a_folder(tiny_folder: Path, tiny_llama: TinyLlama) -> tuple[Comparison, list[tuple[str, int, int]]]:
    """A folder beside a live model with other weights."""
    seen: list[tuple[str, int, int]] = []
    return compare(tiny_folder, [tiny_llama(1)], progress=lambda *step: seen.append(step), **SMALL), seen


def test_rows_are_the_reference_in_fp32_and_bf16_then_the_candidates(of_a_folder: tuple[Comparison, Any]) -> None:
    comparison, _ = of_a_folder
    assert [(row.name, row.precision, row.bits_per_weight) for row in comparison.rows] == [
        ("tiny", "fp32", 32),
        ("tiny", "bf16", 16),
        ("LlamaForCausalLM", "fp32", 32),
    ]
    fp32, bf16, other = comparison.rows
    assert (fp32.kl, fp32.kl_stderr, fp32.top1) == (0.0, 0.0, 1.0)
    assert 0 < bf16.kl < 0.01 < other.kl
    assert all(row.prefill_tps and row.decode_tps for row in comparison.rows)


def test_quality_is_that_of_the_models_run_directly(
    of_a_folder: tuple[Comparison, Any], tiny_llama: TinyLlama, byte_tokenizer: Any
) -> None:
    windows = token_windows(byte_tokenizer, windows=2, window_tokens=32)
    reference, other = compare_models(tiny_llama(0), tiny_llama(1), windows)
    fp32, _, candidate = of_a_folder[0].rows
    assert fp32.perplexity == pytest.approx(reference.perplexity, rel=1e-6)
    assert candidate.kl == pytest.approx(other.kl, rel=1e-6)
    assert candidate.top1 == other.top1


def test_bytes_of_casts_are_those_of_a_checkpoint_in_that_precision(
    of_a_folder: tuple[Comparison, Any], tiny_folder: Path, tiny_llama: TinyLlama
) -> None:
    comparison, _ = of_a_folder
    parameters = sum(parameter.numel() for parameter in tiny_llama().parameters())
    fp32, bf16, live = comparison.rows
    assert fp32.disk_bytes == 4 * parameters
    assert bf16.disk_bytes == 2 * parameters
    assert live.disk_bytes is None
    assert comparison.reference_bytes == (tiny_folder / "model.safetensors").stat().st_size
    assert 0 <= bf16.memory_bytes - 2 * parameters < 1024  # and the frequencies of the rotary embedding


def test_progress_names_each_step(of_a_folder: tuple[Comparison, Any]) -> None:
    _, seen = of_a_folder
    assert ("fp32: text", 2, 2) in seen
    assert ("bf16: speed", 3, 3) in seen
    assert any(what == "bf16: loading" for what, _, _ in seen)
    assert all(done <= total for _, done, total in seen)


def test_says_what_it_was_measured_on(of_a_folder: tuple[Comparison, Any]) -> None:
    comparison, _ = of_a_folder
    assert comparison.reference == "tiny"
    assert comparison.text.startswith("Python 3.")
    assert (comparison.windows, comparison.window_tokens) == (2, 32)
    assert (comparison.prompt_tokens, comparison.new_tokens, comparison.speed_repeats) == (32, 2, 3)
    assert comparison.machine.threads == torch.get_num_threads()


def test_json_is_plain_and_has_no_nan(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    broken = tiny_llama(1)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    comparison = compare(tiny_llama(0), [broken], tokenizer=byte_tokenizer, with_speed=False, **SMALL)
    assert math.isnan(comparison.rows[-1].kl)
    plain = comparison.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == json.loads(json.dumps(plain))
    assert plain["rows"][-1]["kl"] is None
    assert plain["rows"][0]["perplexity"] == comparison.rows[0].perplexity
    assert plain["machine"]["cpu"] == comparison.machine.cpu


def test_speed_can_be_left_out(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    comparison = compare(tiny_llama(), [], tokenizer=byte_tokenizer, with_speed=False, **SMALL)
    assert comparison.rows[0].prefill_tps is None
    assert comparison.prompt_tokens is None
    assert comparison.speed_repeats is None


def test_a_users_text_is_measured_on(tiny_llama: TinyLlama, byte_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("To be, or not to be, that is the question. " * 2)
    comparison = compare(tiny_llama(), [], file, tokenizer=byte_tokenizer, with_speed=False, **SMALL)
    assert comparison.text == "mine.txt"


def test_a_live_reference_is_left_as_it_was(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    model = tiny_llama().bfloat16()
    before = copy.deepcopy(model.state_dict())
    comparison = compare(model, [model], tokenizer=byte_tokenizer, with_speed=False, **SMALL)
    fp32, bf16, itself = comparison.rows
    assert (fp32.precision, bf16.precision, itself.precision) == ("fp32", "bf16", "bf16")
    assert fp32.memory_bytes > 1.9 * bf16.memory_bytes
    assert bf16.kl == itself.kl > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_cast_keeps_the_frequencies_of_the_rotary_embedding(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    """In bf16 they would turn late positions by whole radians; a loaded bf16 model has them in fp32."""
    model = tiny_llama()
    comparison = compare(model, [], tokenizer=byte_tokenizer, with_speed=False, **SMALL)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert comparison.rows[1].memory_bytes == 2 * parameters + buffers


def test_a_converted_folder_is_a_candidate(tiny_folder: Path, tmp_path: Path) -> None:
    convert(tiny_folder, tmp_path / "tiny-int8", to="int8")
    comparison = compare(tiny_folder, [tmp_path / "tiny-int8"], **SMALL)
    row = comparison.rows[-1]
    assert (row.name, row.precision) == ("tiny-int8", "int8")
    assert 8 < row.bits_per_weight < 9
    assert row.disk_bytes < comparison.rows[0].disk_bytes


def test_a_wrong_candidate_is_found_before_any_work(tiny_folder: Path) -> None:
    seen: list[Any] = []
    with pytest.raises(FewbitsError, match="no such file or folder: "):
        compare(tiny_folder, [tiny_folder / "absent"], progress=lambda *step: seen.append(step))
    assert not seen


def test_another_vocabulary_is_refused(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    with pytest.raises(
        FewbitsError, match="the vocabularies differ: 300 tokens in LlamaForCausalLM, 256 in the reference"
    ):
        compare(tiny_llama(), [tiny_llama(vocab_size=300)], tokenizer=byte_tokenizer, with_speed=False, **SMALL)


def test_a_live_reference_needs_a_tokenizer(tiny_llama: TinyLlama) -> None:
    with pytest.raises(FewbitsError, match="LlamaForCausalLM is a live model and carries no tokenizer: give compare a"):
        compare(tiny_llama(), [])


def test_a_model_in_training_mode_is_refused(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    with pytest.raises(FewbitsError, match=r"^LlamaForCausalLM is in training mode, .* call its eval\(\) first"):
        compare(tiny_llama().train(), [], tokenizer=byte_tokenizer)


def test_a_quantized_reference_is_measured_as_it_is(tiny_folder: Path, tmp_path: Path, byte_tokenizer: Any) -> None:
    folder = convert(tiny_folder, tmp_path / "tiny-int8", to="int8").path
    live = fewbits.AutoModelForCausalLM.from_pretrained(folder)
    for reference, tokenizer in ((folder, None), (live, byte_tokenizer)):
        comparison = compare(reference, [tiny_folder], tokenizer=tokenizer, with_speed=False, **SMALL)
        itself, candidate = comparison.rows
        assert (itself.kl, candidate.precision) == (0.0, "fp32")
        assert 0 < candidate.kl < 0.1
        assert itself.precision == ("int8" if reference is folder else f"{itself.bits_per_weight:.1f} bits")


def test_a_quantized_model_is_not_quantized_again(tiny_int8: Path) -> None:
    with pytest.raises(FewbitsError, match=r"^tiny-int8 is quantized \(int8\) and cannot be had in int4: "):
        compare(tiny_int8, precisions=["int4"])
