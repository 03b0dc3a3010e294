"""What a comparison holds beyond the means: every token, the worst places, notes; and what it refuses early."""

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
from fewbits.measure import text as texts
from fewbits.measure.compare import compare
from fewbits.measure.comparison import Comparison
from fewbits.models.source import open_source

TinyLlama = Callable[..., Any]
SMALL = {"windows": 2, "window_tokens": 32}
QUICK = SMALL | {"with_speed": False}
PLAIN = {
    "reference", "reference_bytes", "text", "windows", "window_tokens", "prompt_tokens", "new_tokens", "speed_repeats",
    "date", "machine", "notes", "tokens", "rows",
}  # fmt: skip
ROW = {
    "name", "precision", "disk_bytes", "memory_bytes", "peak_bytes", "bits_per_weight", "kl", "kl_stderr", "top1",
    "top1_stderr", "perplexity", "perplexity_stderr", "prefill_tps", "decode_tps", "layers", "losses", "kls", "worst",
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(tiny: Path, tiny_int8: Path) -> Comparison:
    """A folder, the same in int8, and quantized to int4 while it is loaded."""
    return compare(tiny, [tiny_int8], precisions=["int4"], new_tokens=2, **SMALL)


def test_json_has_these_fields_and_no_others(compared: Comparison) -> None:
    plain = json.loads(json.dumps(compared.to_json(), allow_nan=False))
    assert set(plain) == PLAIN
    assert [row["precision"] for row in plain["rows"]] == ["fp32", "bf16", "int4", "int8"]
    for row in plain["rows"]:
        assert set(row) == ROW
        assert {frozenset(layer) for layer in row["layers"]} == {frozenset(("module", "format", "bits", "sqnr_db"))}
        assert [len(window) for window in row["losses"]] == [len(window) for window in row["kls"]] == [32, 32]
        assert all(window[0] is None and None not in window[1:] for window in row["losses"])
    fp32, _, int4, _ = plain["rows"]
    assert fp32["worst"] == []
    assert set(fp32["kls"][0]) == {0.0}
    assert len(int4["worst"]) == 10
    assert set(int4["worst"][0]) == {"window", "position", "kl", "context", "following", "reference", "candidate"}
    assert all(len(choice) == 2 for choice in int4["worst"][0]["reference"])


def test_means_are_those_of_the_positions(compared: Comparison) -> None:
    for row in compared.rows:
        kls, losses = torch.tensor(row.kls), torch.tensor([window[1:] for window in row.losses])
        assert kls.mean().item() == pytest.approx(row.kl, rel=1e-5)
        assert losses.mean().exp().item() == pytest.approx(row.perplexity, rel=1e-5)
    written = compared.to_json()["rows"][2]
    assert written["kls"][1][5] == round(compared.rows[2].kls[1][5], 6)
    assert written["losses"][1][5] == round(compared.rows[2].losses[1][5], 4)


def test_tokens_joined_are_the_text(compared: Comparison, tiny: Path) -> None:
    windows = texts.token_windows(open_source(tiny).tokenizer(), windows=2, window_tokens=32)
    assert [len(window) for window in compared.tokens] == [32, 32]
    decoded = fewbits.AutoTokenizer.from_pretrained(tiny).decode(windows[1].tolist())
    assert "".join(compared.tokens[1]) == decoded


def test_the_worst_places_are_where_kl_is_greatest_and_come_with_their_text(compared: Comparison, tiny: Path) -> None:
    row = compared.rows[2]
    worst = row.worst[0]
    assert worst.kl == max(max(window) for window in row.kls) == row.kls[worst.window][worst.position]
    pieces = compared.tokens[worst.window]
    assert "".join(pieces[: worst.position + 1]).endswith(worst.context)
    assert worst.context
    assert worst.following == (pieces[worst.position + 1] if worst.position < 31 else "")
    tokenizer = fewbits.AutoTokenizer.from_pretrained(tiny)
    model = fewbits.AutoModelForCausalLM.from_pretrained(tiny, precision="fp32")
    ids = texts.token_windows(tokenizer, windows=2, window_tokens=32)
    said = model(input_ids=ids[worst.window][None]).logits[0, worst.position].softmax(-1).topk(3)
    assert [probability for _, probability in worst.reference] == pytest.approx(said.values.tolist(), rel=1e-4)


def test_a_precision_is_quantized_while_it_is_loaded(compared: Comparison) -> None:
    _, _, int4, int8 = compared.rows
    assert (int4.name, int4.disk_bytes) == ("tiny", None)
    assert int8.name == "tiny-int8"
    assert 4 < int4.bits_per_weight < 6
    assert {layer.format for layer in int4.layers} == {"int4", "int8"}


def test_memory_is_measured_while_it_runs(compared: Comparison, tiny: Path, tiny_llama: TinyLlama) -> None:
    assert all(row.peak_bytes is None or row.peak_bytes >= 0 for row in compared.rows)
    timed = compare(tiny, [], new_tokens=1, **SMALL)
    assert all((row.peak_bytes is not None) == Path("/proc/self/clear_refs").exists() for row in timed.rows)
    assert all(row.peak_bytes is None for row in compare(tiny, [], **QUICK).rows)


def test_two_live_models(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    comparison = compare(tiny_llama(0), [tiny_llama(1)], tokenizer=byte_tokenizer, new_tokens=1, **SMALL)
    row = comparison.rows[-1]
    assert row.kl > 0.01
    assert row.peak_bytes is None
    assert len(row.layers) == 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "to"), [("gguf", "int8-weight"), ("bitsandbytes", "int8"), ("compressed-tensors", "fp8")]
)
def test_a_model_of_every_layout_is_reference_and_candidate(tiny: Path, tmp_path: Path, layout: str, to: str) -> None:
    out = tmp_path / ("model.gguf" if layout == "gguf" else "model")
    converted = fewbits.convert(tiny, out, to=to, layout=layout).path
    comparison = compare(tiny, [converted], **QUICK)
    assert 0 < comparison.rows[-1].kl < 1
    again = compare(converted, [tiny], **QUICK)
    assert again.rows[0].kl == 0
    assert 0 < again.rows[-1].kl < 1
    # Types of GGUF in blocks are values to be loaded as one likes; the others are run as they are.
    assert [row.precision for row in again.rows[:-1]] == (["fp32", "bf16"] if layout == "gguf" else [to])


def test_a_reference_that_makes_no_sense_is_noted(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    (note,) = compare(tiny_llama(), [], tokenizer=byte_tokenizer, **QUICK).notes
    assert note.startswith("The reference makes no sense of this text: its perplexity is ")
    assert "one that knows nothing has that of its vocabulary, 256" in note


def test_a_reference_that_gives_nan_is_noted(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    broken = tiny_llama()
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    comparison = compare(broken, [], tokenizer=byte_tokenizer, **QUICK)
    assert "its perplexity is nan" in comparison.notes[0]
    assert comparison.to_json()["rows"][0]["perplexity"] is None


def test_a_candidate_that_gives_nan_is_named_with_the_place(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    broken = copy.deepcopy(tiny_llama(1))
    plain = broken.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits[:, 20:] = math.nan
        return output

    broken.forward = forward
    comparison = compare(tiny_llama(), [broken], tokenizer=byte_tokenizer, **QUICK)
    note = comparison.notes[-1]
    assert note.startswith("LlamaForCausalLM: its divergence is NaN at 24 of 64 positions, first in window 0 after")
    assert "token 20" in note
    row = comparison.rows[-1]
    assert all(worst.position < 20 and math.isfinite(worst.kl) for worst in row.worst)
    assert comparison.to_json()["rows"][-1]["kls"][0][19:21] == [round(row.kls[0][19], 6), None]


def test_a_tokenizer_that_cannot_decode(tiny_llama: TinyLlama) -> None:
    def letters(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    comparison = compare(tiny_llama(), [tiny_llama(1)], tokenizer=letters, **QUICK)
    assert comparison.tokens == ()
    worst = comparison.rows[-1].worst[0]
    assert (worst.context, worst.following) == ("", "")
    assert all(token.startswith("#") for token, _ in worst.reference)


def changed(folder: Path, out: Path, **settings: Any) -> Path:
    """The folder with other settings in its configuration; its weights then fit no more."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | settings))
    return out


def test_another_vocabulary_of_the_same_size_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = changed(tiny, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        FewbitsError,
        match=r"^the vocabularies differ: the tokens of '[et].*' in the reference are those of '[et].*' in other;",
    ):
        compare(tiny, [other], **QUICK)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (
            {"vocab_size": 300},
            {},
            r"^the vocabularies differ: 300 tokens in other, 261 in the reference; compare models",
        ),
        (
            {"max_position_embeddings": 16},
            {},
            r"^windows of 32 tokens are longer than the context of other, 16 tokens;",
        ),
        ({"model_type": "bert"}, {}, r"a model of type 'bert' fills gaps in a text \(an encoder\)"),
        ({}, {"precisions": ["int9"]}, r"^precision 'int9' is unknown; did you mean int8\?"),
        ({}, {"device": "tpu"}, r"^device 'tpu' is none that models are compared on; give cpu or cuda$"),
        (
            {},
            {"new_tokens": 128, "with_speed": True},
            r"^new_tokens is 128, and a context of 128 tokens leaves",
        ),
    ],
    ids=["vocabulary", "context", "encoder", "precision", "device", "new tokens"],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    tiny: Path, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    other = changed(tiny, tmp_path / "other", **settings)
    seen: list[Any] = []
    with pytest.raises(FewbitsError, match=message):
        compare(tiny, [other], progress=lambda *step: seen.append(step), **QUICK | options)
    assert not seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tiny: Path) -> None:
    with pytest.raises(FewbitsError, match="device cuda: PyTorch finds no CUDA GPU here"):
        compare(tiny, device="cuda", **QUICK)


def test_a_text_shorter_than_a_window(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with pytest.raises(FewbitsError, match=r"^short.txt is too short: 9 tokens, and one window ends at token 32; give"):
        compare(tiny, [], file, **QUICK)


def test_live_models_are_cast_but_not_quantized(tiny_llama: TinyLlama, byte_tokenizer: Any) -> None:
    rows = compare(tiny_llama(), precisions=["fp16"], tokenizer=byte_tokenizer, **QUICK).rows
    assert [row.precision for row in rows] == ["fp32", "bf16", "fp16"]
    with pytest.raises(FewbitsError, match=r"^LlamaForCausalLM is a live model and cannot be quantized to int8 here"):
        compare(tiny_llama(), precisions=["int8"], tokenizer=byte_tokenizer, **QUICK)


def test_the_prompt_leaves_room_for_what_is_written(tiny: Path) -> None:
    comparison = compare(tiny, [], windows=1, window_tokens=128, new_tokens=8)
    assert (comparison.window_tokens, comparison.prompt_tokens) == (128, 120)
