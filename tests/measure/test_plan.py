"""The plan against the models themselves: bytes of weights and cache, what fits, the longest context, bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

import fewbits
from fewbits.errors import FewbitsError
from fewbits.formats.precisions import STORED_PRECISIONS
from fewbits.measure import plan_memory
from fewbits.measure.machine import Gpu, this_machine
from fewbits.measure.memory import weight_bytes
from fewbits.measure.plan import plan
from fewbits.measure.plan_accuracy import ACCURACY, NEGLIGIBLE, SLIGHT, Accuracy
from fewbits.measure.plan_data import Plan
from fewbits.measure.plan_memory import Memory, memories_of, parse_memory, read_bandwidth
from fewbits.measure.plan_training import TRAININGS
from fewbits.models.precision import PRECISIONS

ROOT = Path(__file__).parents[2]
CHATGLM3 = ROOT.parent / "shared/chatglm3"
TOKENS = 40

_SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
_LLAMA = _SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("llama", _LLAMA | {"tie_word_embeddings": False}),
    "tied, with biases": ("qwen2", _LLAMA | {"tie_word_embeddings": True}),
    "windows": (
        "gemma3_text",
        _LLAMA | {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "fused projections": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320}),
    "one key head": (
        "falcon",
        _SIZES | {"multi_query": True, "new_decoder_architecture": False, "alibi": False, "bias": False},
    ),
    "experts": (
        "mixtral",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "latent attention": (
        "deepseek_v3",
        _SIZES
        | {
            "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4,
        },
    ),
    "encoder and decoder": (
        "t5",
        {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
         "vocab_size": 320, "decoder_start_token_id": 0},
    ),
    "encoder": ("bert", _SIZES | {"intermediate_size": 96}),
}  # fmt: skip


def write(name: str, folder: Path) -> transformers.PreTrainedModel:
    """A tiny model in bfloat16."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    classes = {"t5": transformers.AutoModelForSeq2SeqLM, "bert": transformers.AutoModel}
    model = classes.get(kind, transformers.AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model


def ours(model: transformers.PreTrainedModel) -> Any:
    kinds = {"t5": fewbits.AutoModelForSeq2SeqLM, "bert": fewbits.AutoModel}
    return kinds.get(model.config.model_type, fewbits.AutoModelForCausalLM)


def cache_of(model: Any) -> int:
    """Bytes of keys and values after as many tokens."""
    ids = torch.arange(3, 3 + TOKENS)[None]
    with torch.no_grad():
        given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        cache = model(input_ids=ids, use_cache=True, **given).past_key_values
    caches = [cache] if hasattr(cache, "layers") else [cache.self_attention_cache, cache.cross_attention_cache]
    return sum(layer.keys.nbytes + layer.values.nbytes for each in caches for layer in each.layers)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_cache_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    model = write(name, tmp_path)
    rows = plan(tmp_path, memory="1GiB", context=TOKENS, bandwidth=False).rows
    assert [row.precision for row in rows] == list(PRECISIONS)
    for row in rows:
        loaded = ours(model).from_pretrained(tmp_path, precision=row.precision)
        assert row.weights == pytest.approx(weight_bytes(loaded), abs=8), row.precision  # a scalar's dtype
        if name == "encoder":
            assert (row.cache, row.cache_int8, row.tokens_per_second) == (0, 0, None)
        elif row.precision in ("fp32", "bf16", "int8"):
            assert row.cache == cache_of(loaded), row.precision


def test_an_int8_cache_is_counted_with_its_scales(tmp_path: Path) -> None:
    write("grouped heads", tmp_path)
    row = plan(tmp_path, memory="1GiB", context=TOKENS, bandwidth=False).rows[0]
    model = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path, precision="int8", kv_cache="int8")
    with torch.no_grad():
        cache = model(input_ids=torch.arange(3, 3 + TOKENS)[None], use_cache=True).past_key_values
    held = [part for layer in cache.layers for part in (layer._keys, layer._values)]
    tokens = sum(each.buffer[:, :, : each.end].nbytes + each.scales[:, :, : each.end].nbytes for each in held)
    assert row.cache_int8 == tokens


def test_of_experts_a_token_reads_those_that_work_on_it(tmp_path: Path) -> None:
    from fewbits.measure.plan_bytes import read_bytes
    from fewbits.measure.plan_config import read_configuration
    from fewbits.measure.plan_model import Outline

    write("experts", tmp_path)
    outline = Outline.of(read_configuration(tmp_path))
    size, stored = outline.size(PRECISIONS["fp32"]), STORED_PRECISIONS[0]
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 96 + 4 * 64 + 2 * 64  # attention, 2 experts, router, norms
    assert read_bytes(size, stored) == 4 * (2 * layer + 64 + 320 * 64)


def test_a_checkpoint_that_is_quantized_has_one_row(tiny: Path, tiny_int8: Path) -> None:
    found = plan(tiny_int8, memory="1GiB", context=TOKENS, bandwidth=False)
    assert [row.precision for row in found.rows] == ["int8"]
    assert any("quantized already" in note for note in found.notes)
    rows = {row.precision: row for row in plan(tiny, memory="1GiB", context=TOKENS, bandwidth=False).rows}
    loaded = weight_bytes(fewbits.AutoModelForCausalLM.from_pretrained(tiny_int8))
    assert found.rows[0].weights == rows["int8"].weights == pytest.approx(loaded, abs=8)
    assert "generate" in found.rows[0].command
    assert plan(tiny_int8, memory="1GiB", train=True, bandwidth=False).trainings == ()


@pytest.mark.skipif(not CHATGLM3.is_dir(), reason=f"{CHATGLM3} is absent: the published configuration")
def test_chatglm3_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((CHATGLM3 / "config.json").read_bytes())
    found = plan(tmp_path, memory="12GiB", bandwidth=False)
    rows = {row.precision: row for row in found.rows}
    assert (found.architecture, found.parameters, found.context_limit) == ("GlmForCausalLM", 6_243_584_000, 8192)
    assert rows["fp16"].weights == pytest.approx(2 * 6_243_584_000, rel=1e-4)
    assert rows["int8"].weights == pytest.approx(6.52e9, rel=0.01)
    assert rows["int8"].cache == 2 * 28 * 2 * 128 * 4 * 4096  # layers, key heads, channels, float32, tokens
    assert not rows["fp16"].fits
    assert rows["int8"].fits == ("given",)


def test_the_longest_context_fits_and_one_more_token_does_not(tmp_path: Path) -> None:
    write("windows", tmp_path)
    room = 3 << 20
    longest = {row.precision: row.longest_context for row in plan(tmp_path, memory=room, bandwidth=False).rows}
    assert longest["fp32"] is not None
    for precision, tokens in longest.items():
        assert 0 < tokens < 131_072
        for context, fits in ((tokens, True), (tokens + 1, False)):
            rows = plan(tmp_path, memory=room, context=context, bandwidth=False).rows
            assert bool(next(row for row in rows if row.precision == precision).fits) is fits


def test_a_batch_multiplies_the_cache_and_not_the_weights(tmp_path: Path) -> None:
    write("grouped heads", tmp_path)
    one, four = (plan(tmp_path, memory="1GiB", context=64, batch=batch, bandwidth=False).rows for batch in (1, 4))
    for alone, together in zip(one, four, strict=True):
        assert (together.weights, together.cache) == (alone.weights, 4 * alone.cache)


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_keeps_what_is_planned(tied: bool, training: Any, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    rows = plan(tmp_path, memory="1GiB", context=16, train=True, bandwidth=False).trainings
    row = next(row for row in rows if row.name == training.name)
    recipe = replace(fewbits.Recipe.named(training.recipe), master=training.master, state=training.state)
    mp = fewbits.MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=1e-4), recipe)
    ids = torch.arange(32)[None]
    with mp.forward():
        loss = model(input_ids=ids, labels=ids).loss
    mp.backward(loss)
    gradients = sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
    copy = mp.policy.copy_bytes()
    mp.step()
    state = mp.state_dict()["masters"]
    low = sum(held["low"].nbytes for held in _states(state) if "low" in held)
    moments = sum(
        held[key].nbytes for held in _states(state) for key in ("m", "v", "m_scales", "v_scales") if key in held
    )
    weights = sum(each.nbytes for each in model.parameters()) + low
    assert (row.weights, row.low_precision_copy, row.gradients) == (weights, copy, gradients)
    assert row.state == pytest.approx(moments, rel=0.01)
    assert row.bytes_per_parameter == pytest.approx(
        (weights + copy + gradients + moments) / model.num_parameters(), rel=0.01
    )


def _states(state: Any) -> list[dict[str, torch.Tensor]]:
    """What a state dict holds of each parameter."""
    if not isinstance(state, dict):
        return []
    return [state] if "m" in state else [each for value in state.values() for each in _states(value)]


def test_the_best_that_fits_is_of_the_best_class_and_small(tiny: Path) -> None:
    found = plan(tiny, memory="1GiB", bandwidth=False)
    best = found.best
    assert best is not None
    assert best.accuracy == "negligible"
    assert best.weights == min(row.weights for row in found.rows if row.accuracy == "negligible")
    fourbit = min(row.total for row in found.rows)
    assert [row.precision for row in plan(tiny, memory=fourbit, bandwidth=False).rows if row.fits] == [
        row.precision for row in found.rows if row.total == fourbit
    ]


def test_every_command_parses(tiny: Path) -> None:
    import shlex

    from typer.main import get_command

    from fewbits.cli import app

    found = plan(tiny, memory="1GiB", train=True, bandwidth=False)
    commands = [row.command for row in (*found.rows, *found.trainings) if row.command.startswith("fewbits ")]
    assert len(commands) == len(found.rows) + 4
    for command in commands:
        name, *arguments = shlex.split(command)[1:]
        get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_json_holds_all(tiny: Path) -> None:
    found = plan(tiny, memory="1GiB", train=True)
    data = json.loads(json.dumps(found.to_json()))
    assert data["best"] == found.best.precision  # type: ignore[union-attr]
    assert [row["total"] for row in data["rows"]] == [row.total for row in found.rows]
    assert data["memories"] == [{"name": "given", "nbytes": 1 << 30, "device": "cpu"}]
    assert data["trainings"][0]["bytes_per_parameter"] == 16
    assert data["rows"][0]["tokens_per_second"] > 0


def test_the_accuracy_is_what_was_measured() -> None:
    results = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["results"]
    named = {"bf16": "transformers bf16"} | {name: f"fewbits {name}" for name in PRECISIONS if name != "bf16"}
    measured = {name: next(iter(results[row]["texts"].values())) for name, row in named.items() if row in results}
    assert set(measured) == {name for name, each in ACCURACY.items() if each.kl}  # fp32 is the reference
    for name, figures in measured.items():
        assert ACCURACY[name].kl == pytest.approx(figures["kl"], rel=0.05), name


def test_an_accuracy_has_a_class() -> None:
    assert {ACCURACY[name].name for name in ("fp32", "bf16", "fp16", "int8", "int8-weight")} == {"negligible"}
    assert (ACCURACY["fp8"].name, ACCURACY["nf4"].name) == ("slight", "visible")
    assert Accuracy(NEGLIGIBLE).name == "negligible"
    assert Accuracy(SLIGHT).name == "slight"


def test_every_precision_has_an_accuracy() -> None:
    assert [stored.name for stored in STORED_PRECISIONS] == list(PRECISIONS)
    assert set(ACCURACY) == set(PRECISIONS)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 << 30), ("24GB", 24 * 10**9), ("512MiB", 512 << 20), ("1.5 gib", 3 << 29), ("1TiB", 1 << 40),
     ("1000", 1000), (4096, 4096), (" 2kb ", 2000)],
)  # fmt: skip
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "24 GiBs", "-3GiB", "24G", "1e3GiB", "0x10", "NaN"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(FewbitsError, match="is no size; give a number and one of KiB"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["0", "0GiB", 0, -1, True, 1.5, "99999999999999TiB"])
def test_an_amount_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(FewbitsError, match="is no amount of memory; give a size above 0"):
        parse_memory(text)


def test_a_machine_with_gpus_is_planned_for_all_of_them(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    machine = replace(
        this_machine(), available_bytes=1 << 30, gpus=(Gpu("small", 1, "9.0"), Gpu("large", 8 << 30, "9.0"))
    )
    assert memories_of(machine) == (
        Memory("small", 1, "cuda:0"),
        Memory("large", 8 << 30, "cuda:1"),
        Memory("RAM", 1 << 30),
    )
    monkeypatch.setattr(plan_memory, "this_machine", lambda: machine)
    for row in plan(tiny, bandwidth=False).rows:
        assert row.fits == ("large", "RAM")


def test_a_machine_that_does_not_tell_needs_the_memory(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    silent = replace(this_machine(), available_bytes=0, memory_bytes=0, gpus=())
    monkeypatch.setattr(plan_memory, "this_machine", lambda: silent)
    with pytest.raises(FewbitsError, match="does not tell how much memory it has; give --memory"):
        plan(tiny)
    assert plan(tiny, memory="1GiB", bandwidth=False).best is not None


def test_no_room_for_the_probe_gives_no_speed(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setattr(plan_memory, "_available", lambda: 1 << 20)
    assert read_bandwidth() is None
    assert all(row.tokens_per_second is None for row in plan(tiny, memory="1GiB").rows)


def test_the_bandwidth_is_that_of_a_memory() -> None:
    assert psutil.virtual_memory().available > 2 << 30
    bandwidth = read_bandwidth()
    assert bandwidth is not None
    assert 1e8 < bandwidth < 1e13


@pytest.mark.parametrize(
    ("name", "value"), [("batch", 0), ("batch", -1), ("context", 0), ("batch", 1.5), ("context", True)]
)
def test_a_number_below_one_is_refused(tiny: Path, name: str, value: Any) -> None:
    with pytest.raises(FewbitsError, match=f"{name} is {value!r}; a plan needs a whole number of at least 1"):
        plan(tiny, memory="1GiB", **{name: value})


def test_a_context_beyond_the_limit_is_planned_and_said(tmp_path: Path) -> None:
    write("fused projections", tmp_path)
    assert plan(tmp_path, memory="1GiB", bandwidth=False).context == 64  # its limit
    found = plan(tmp_path, memory="1GiB", context=128, bandwidth=False)
    assert found.context == 128
    assert "a context of 128 is beyond the model's own limit of 64 tokens" in found.notes


def configured(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no model_type"),
        ('{"model_type": 3}', "has no model_type"),
        ('{"model_type": "llama", "architectures": "Llama"}', "architectures in config.json is 'Llama', no list"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot"),
        ('{"model_type": "llama", "num_attention_heads": 7, "hidden_size": 64}', "transformers cannot"),
        ('{"model_type": "gpt2", "quantization_config": {"quant_method": "exl9"}}', "quant_method 'exl9' is not read"),
        (
            '{"model_type": "newton", "architectures": ["NewtonForCausalLM"], "auto_map": {"AutoModel": "m.N"}}',
            r"does not know the architecture NewtonForCausalLM \(newton\): only its own code could build it.*-hf",
        ),
        ('{"model_type": "newton"}', "does not know the architecture 'newton': it may be newer; update transformers"),
    ],
)  # fmt: skip
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = configured(tmp_path / "model", text)
    with pytest.raises(FewbitsError, match=message) as refused:
        plan(folder, memory="1GiB")
    assert str(folder) in str(refused.value)


def test_a_configuration_without_architectures_is_taken_for_what_it_is(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("llama", **MODELS["grouped heads"][1]).to_dict()
    config.pop("architectures", None)
    found = plan(configured(tmp_path / "model", json.dumps(config)), memory="1GiB", bandwidth=False)
    assert "config.json names no architecture; taken as LlamaForCausalLM" in found.notes


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewbitsError, match="no such file or folder"):
        plan(tmp_path / "nowhere", memory="1GiB")
    with pytest.raises(FewbitsError, match=r"has no config\.json; copy it"):
        plan(tmp_path, memory="1GiB")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(FewbitsError, match=r"has no config.json; give the GGUF file itself: .*model.gguf"):
        plan(tmp_path, memory="1GiB")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FewbitsError, match="nobody/nothing is no file or folder here nor in the Hugging Face cache"):
        plan("nobody/nothing", memory="1GiB")


def test_of_a_hub_id_only_the_configuration_is_fetched(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, file: str, *, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(tiny / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = plan("owner/name", memory="1GiB", revision="v1", bandwidth=False)
    assert asked == [("owner/name", "config.json", "v1")]
    assert found.model == "owner/name"
    assert all("owner/name" in row.command for row in found.rows)


def test_a_hub_model_without_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    def download(*_: Any, **__: Any) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(FewbitsError, match=r"owner/ggufs has no config\.json on the Hub; name the model"):
        plan("owner/ggufs", memory="1GiB")


def test_a_gguf_file_is_planned_from_its_header(tmp_path: Path) -> None:
    from models.tiny_gguf import TinyGguf

    path = tmp_path / "tiny.gguf"
    TinyGguf().write(path)
    rows = {row.precision: row for row in plan(path, memory="1GiB", bandwidth=False).rows}
    model = fewbits.AutoModelForCausalLM.from_pretrained(path, precision="int8")
    assert rows["int8"].weights == pytest.approx(weight_bytes(model), abs=8)


def test_why_nothing_fits_names_the_smallest(tiny: Path) -> None:
    found: Plan = plan(tiny, memory="1KiB", bandwidth=False)
    smallest = min(found.rows, key=lambda row: row.total)
    assert not found.something_fits
    assert f"the smallest, {smallest.precision}, needs" in found.why_nothing_fits()
    assert "--context" in found.why_nothing_fits()
