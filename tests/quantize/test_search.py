"""A contract on loss: the model that is written meets it, or none is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.errors import FewbitsError
from fewbits.measure.memory import bits_per_weight
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.quantize.found import Found
from fewbits.quantize.probe import Probe
from fewbits.quantize.search_cache import cache_folder

load = fewbits.AutoModelForCausalLM.from_pretrained
TEXT = "\n".join(f"hello {n} hell {n * n} 漢 don't he'll {n % 7}" for n in range(400))
GROUPS = [
    [f"model.layers.{layer}.{each}_proj" for each in group]
    for layer in range(2)
    for group in (
        ("self_attn.q", "self_attn.k", "self_attn.v"), ("self_attn.o",), ("mlp.gate", "mlp.up"), ("mlp.down",),
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def search(tiny: Path, tmp_path: Path, text: Path) -> Callable[..., tuple[Path, Found]]:
    def run(**options: Any) -> tuple[Path, Found]:
        found: list[Found] = []
        options = {"method": "absmax", "calibrate": text, "on_found": lambda _, each: found.append(each)} | options
        done = fewbits.convert(options.pop("source", tiny), tmp_path / "out", **options)
        return done.path, found[0]

    return run


@pytest.mark.parametrize("method", ["absmax", "gptq"])
def test_the_loss_is_kept_and_layers_given_the_same_stay_together(search: Callable, method: str) -> None:
    folder, found = search(max_kl=0.04, to="int8,int4", method=method)
    assert found.trial.kl <= 0.04
    assert found.trial in found.tried
    became = {each.module: each.precision for each in found.assignment}
    assert sorted(became) == sorted(layer for group in GROUPS for layer in group)
    assert all(len({became[layer] for layer in group}) == 1 for group in GROUPS)
    assert set(became.values()) == {"int8", "int4"}
    layers = {name: each for name, each in load(folder).named_modules() if type(each) is QuantLinear}
    assert {name: layer.format for name, layer in layers.items()} == became
    counts = [layer.quantized_bits() for layer in layers.values()]
    assert found.trial.bits == pytest.approx(sum(bits for bits, _ in counts) / sum(count for _, count in counts))
    assert {path.name for path in folder.parent.iterdir()} == {"out"}


def test_a_smaller_loss_takes_more_bytes_and_nothing_is_measured_twice(search: Callable) -> None:
    _, loose = search(max_kl=0.05, to="int8,int4")
    assert loose.measured == 2 + 2 * len(GROUPS)
    _, tight = search(max_kl=0.03, to="int8,int4", overwrite=True)
    assert tight.measured == 0
    assert tight.trial.nbytes > loose.trial.nbytes
    assert tight.trial.kl <= 0.03 < loose.trial.kl


def test_a_size_is_kept_with_less_loss_than_the_smallest_model(search: Callable) -> None:
    folder, found = search(max_size="120KB", to="int8,int4")
    assert (folder / "model.safetensors").stat().st_size <= 120_000
    _, smaller = search(max_size="112KB", to="int8,int4", overwrite=True)
    assert smaller.trial.nbytes < found.trial.nbytes
    assert smaller.trial.predicted > found.trial.predicted


def test_the_caller_measures_what_counts(search: Callable) -> None:
    seen: list[float] = []

    def evaluate(folder: Path) -> float:
        assert isinstance(load(folder).lm_head, QuantHead)
        seen.append(0.06 if not seen else 0.04)  # the first one misses on the caller's text
        return seen[-1]

    _, found = search(max_kl=0.05, to="int8,int4", rotate=True, evaluate=evaluate)
    assert seen == [0.06, 0.04]
    assert found.trial.evaluated == 0.04
    assert found.trial.kl < next(each.kl for each in found.tried if each.evaluated == 0.06)


@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize("method", ["absmax", "gptq"])
def test_an_interrupted_search_goes_on(search: Callable, tmp_path: Path, at: int, method: str) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("sensitivity", at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(max_kl=0.05, to="int8,int4", method=method, on_search=stop)
    assert list(tmp_path.iterdir()) == []
    steps: list[str] = []
    _, found = search(max_kl=0.05, to="int8,int4", method=method, on_search=lambda what, *_: steps.append(what))
    assert found.measured == 2 * (len(GROUPS) - at)
    assert "gptq" not in steps


def test_a_cut_off_cache_is_measured_again(search: Callable) -> None:
    search(max_kl=0.05, to="int8,int4")
    (file,) = cache_folder().glob("*/sensitivity.json")
    file.write_text(file.read_text()[:50])
    _, found = search(max_kl=0.05, to="int8,int4", overwrite=True)
    assert found.measured == 2 + 2 * len(GROUPS)


def test_the_layers_of_one_model_are_kept_and_of_a_search_that_goes_on(
    search: Callable, save_tiny: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    save_tiny(other)
    counts: list[int] = []

    def another(what: str, done: int, total: int) -> None:
        if (what, done) == ("sensitivity", 1) and not counts:
            counts.append(0)
            fewbits.convert(other, other / "out", "int8,int4", max_kl=0.05, method="gptq")
            counts[0] = len([*cache_folder().glob("*/block-*")])

    search(max_kl=0.05, to="int8,int4", method="gptq", on_search=another)
    assert counts == [2 * 4]  # two blocks in two precisions, of both models
    search(max_kl=0.04, to="int8,int4", method="gptq", overwrite=True)
    assert len([*cache_folder().glob("*/block-*")]) == 4


def test_what_is_kept_is_not_searched(search: Callable) -> None:
    folder, found = search(max_kl=0.05, to="int8,int4", keep=["*.down_proj"])
    assert not any("down_proj" in each.module for each in found.assignment)
    assert type(load(folder).model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_the_card_has_the_numbers_and_the_original_s_card_is_kept(
    search: Callable, tiny: Path, tmp_path: Path, save_tiny: Callable
) -> None:
    save_tiny(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\ntags: [chat]\n---\n# Its name\nIts words.\n")
    folder, found = search(source=tmp_path / "source", max_kl=0.05, to="int8,int4")
    card = (folder / "README.md").read_text()
    front, body = card.split("---\n")[1], card.split("---\n", 2)[2]
    assert "license: mit" in front
    assert "chat" not in front
    assert "base_model: source" in front
    assert "library_name: transformers" in front
    assert f"{found.trial.bits:.2f} bits per weight" in body
    assert f"{found.trial.kl:.4f}" in body
    assert "fewbits convert source OUT --to int8,int4 --method absmax --max-kl 0.05 --calibrate text.txt" in body
    assert body.index("It speaks of source, not of this model.") < body.index("Its words.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 1e-7}, r"no choice of .* meets max_kl 1e-07: the best loses .* nats per token .* bits per weight"),
        ({"max_size": "50KB"}, "max_size is 50,000 bytes, and the least that int8, int4 allow is .* are not quantized"),
        ({"max_kl": 0.001, "max_size": "112KB"}, "meets max_kl 0.001 and max_size 112,000 bytes: the best within"),
        ({"max_kl": -1.0}, "max_kl is -1.0: a positive number"),
        ({"max_size": "3 gigs"}, "max_size '3 gigs' is no size"),
        ({"max_kl": 0.1, "layout": "gguf"}, "max_kl, max_size: the layout gguf has one precision for all layers"),
        ({"max_size": "1GB", "layout": "bitsandbytes"}, "the layout bitsandbytes has one precision for all layers"),
        ({"max_kl": 0.1, "to": {"*": "int4"}}, "to: a contract searches the precisions of layers itself"),
        ({"max_kl": 0.1, "to": "mxfp4,fp8", "rotate": True}, "rotate: mxfp4, fp8 gains nothing by it"),
    ],
)
def test_what_cannot_be_had_writes_nothing(search: Callable, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        search(**{"to": "int8,int4"} | options)
    assert list(tmp_path.iterdir()) == []


def test_a_text_of_one_window(search: Callable, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hello " * 10)
    with pytest.raises(FewbitsError, match=r"a contract needs two windows of 128 tokens, one to calibrate on and one"):
        search(max_kl=0.05, calibrate=tmp_path / "short.txt")


def test_a_model_without_a_tokenizer(search: Callable, tiny: Path, tmp_path: Path) -> None:
    load(tiny, precision="bf16").save_pretrained(tmp_path / "bare")
    with pytest.raises(FewbitsError, match="has no tokenizer to read text with, so its loss cannot be measured"):
        search(source=tmp_path / "bare", max_kl=0.05)


def test_a_quantized_model(search: Callable, tiny_int8: Path) -> None:
    with pytest.raises(FewbitsError, match="is int8 already; search from the model it was made from"):
        search(source=tiny_int8, max_kl=0.05)


def test_a_model_that_does_not_fit(search: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fewbits.models import loading

    monkeypatch.setattr(loading, "_refuse_what_does_not_fit", _refused)
    with pytest.raises(FewbitsError, match="so much memory is not free"):
        search(max_kl=0.05)
    assert list(tmp_path.iterdir()) == []


def _refused(*_: object) -> None:
    raise FewbitsError("so much memory is not free")


def test_a_model_that_is_broken(search: Callable, tiny: Path, tmp_path: Path) -> None:
    broken = load(tiny, precision="fp32")
    broken.model.norm.weight.data[:] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    fewbits.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "broken")
    with pytest.raises(FewbitsError, match="the model in fp32 predicts NaN or Inf; it cannot be searched"):
        search(source=tmp_path / "broken", max_kl=0.05)


def test_a_layer_alone_is_what_a_model_with_it_alone_predicts(tiny: Path, tmp_path: Path) -> None:
    from fewbits.models.precision import PRECISIONS
    from fewbits.models.source import open_source
    from fewbits.quantize.prepared import Prepared
    from fewbits.tensors.divergence import kl_divergence
    from fewbits.tensors.quantized import quantize_weight

    layer, windows = "model.layers.1.mlp.down_proj", torch.arange(3, 131).view(2, 64)
    probe = Probe(Prepared.of(open_source(tiny), torch.bfloat16), windows)
    assert probe.groups() == GROUPS
    found = probe.kl(
        [layer], PRECISIONS["fp8"], lambda _, weight, __: quantize_weight(weight, "e4m3fn", scale_dtype=torch.bfloat16)
    )
    alone = load(fewbits.convert(tiny, tmp_path / "out", {layer: "fp8"}).path)
    exact = load(tiny, precision="fp32")
    alone.lm_head = exact.lm_head
    with torch.no_grad():
        p, q = (model(windows).logits[:, 1::2].log_softmax(-1).flatten(0, 1) for model in (exact, alone))
    assert found == pytest.approx(kl_divergence(p, q).mean().item(), rel=0.02)
    assert bits_per_weight(alone) == pytest.approx(8 + 16 / 96)


@pytest.mark.slow
def test_the_command_writes_a_report_too(run_cli: Callable, tiny: Path, tmp_path: Path, text: Path) -> None:
    arguments = [tiny, tmp_path / "out", "--calibrate", text, "--method", "absmax", "--to", "int8,int4"]
    ran = run_cli("convert", *arguments, "--max-kl", "0.5", "--json", tmp_path / "out.json")
    assert ran.code == 0, ran.err
    assert "bits per weight, KL" in ran.out
    search = json.loads((tmp_path / "out.json").read_text())["search"]
    assert (search["target"], search["met"]) == ("max_kl 0.5", True)
    assert len(search["assignment"]) == 14
    assert "<!doctype html>" in (tmp_path / "out" / "report.html").read_text()[:200].lower()
    failed = run_cli("convert", tiny, tmp_path / "none", *arguments[2:], "--max-kl", "1e-8")
    assert failed.code == 2
    assert "meets max_kl 1e-08: the best loses" in failed.err
    assert not (tmp_path / "none").exists()
