"""What the page is made of: its data equals the catalog, and its modules are put together without losing any."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fewbits.formats import Format, names
from fewbits.formats.dialects import DIALECTS
from fewbits.report import one_file
from fewbits.report.explore import GROUPS, MODELS, Shape, page_data
from fewbits.report.explore_page import page_html, write_page
from fewbits.report.one_file import bundle

REPORT = Path(one_file.__file__).parent


def test_the_formats_are_those_of_the_catalog() -> None:
    rows = json.loads(json.dumps(page_data()))["formats"]
    assert [row["name"] for row in rows] == list(names())
    for row in rows:
        fmt = Format.named(row["name"])
        for field in ("exponent_bits", "mantissa_bits", "bias", "signed", "has_subnormals", "narrow", "storage_bits"):
            assert row[field] == getattr(fmt, field), (fmt.name, field)
        assert (row["kind"], row["specials"]) == (fmt.kind, fmt.specials)
        assert (tuple(row["codebook"]), tuple(row["aliases"])) == (fmt.codebook, fmt.aliases)
        assert (row["block"] is None) == (fmt.block is None)
        if fmt.block is not None:
            assert row["block"] == asdict(fmt.block)


def test_the_dialects_give_their_rules() -> None:
    rows = page_data()["dialects"]
    assert [row["name"] for row in rows] == [dialect.name for dialect in DIALECTS]
    for row, dialect in zip(rows, DIALECTS, strict=True):
        for name in names():
            assert row["formats"].get(name, row["overflow"]) == dialect.rule(name)


def test_the_scale_rules_are_those_that_a_format_allows() -> None:
    rules = page_data()["scale_rules"]
    assert set(rules) == {name for name in names() if Format.named(name).block is not None}
    for name, allowed in rules.items():
        assert [Format.named(name).scale_rule(rule) for rule in allowed] == allowed
        assert allowed[0] == Format.named(name).scale_rule(None)


_LARGEST = pytest.param(MODELS[-1], marks=pytest.mark.slow, id=MODELS[-1].name)


@pytest.mark.parametrize("shape", [*MODELS[:-1], _LARGEST], ids=lambda shape: shape.name)
def test_what_fits_has_the_numbers_of_the_plan(shape: Shape, tmp_path: Path) -> None:
    from fewbits.measure.plan import plan

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied, "max_position_embeddings": 1 << 20,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    planned = plan(tmp_path, memory="1TiB", context=1000, train=True, bandwidth=False)
    model = next(each for each in page_data()["models"] if each["name"] == shape.name)
    assert model["parameters"] == planned.parameters
    assert list(model["weights"]) == [row.precision for row in planned.rows]
    for row in planned.rows:
        name = row.precision
        assert model["weights"][name] == pytest.approx(row.weights, abs=1024), name  # rotary frequencies are beside
        assert (model["bits"][name], 1000 * model["cache"][name]) == (row.bits_per_weight, row.cache)
        assert 1000 * model["cache_int8"] == row.cache_int8
    trainings = page_data()["trainings"]
    assert [training["name"] for training in trainings] == [row.name for row in planned.trainings]
    for training, row in zip(trainings, planned.trainings, strict=True):
        assert sum(size for _, size in training["parts"]) == pytest.approx(row.bytes_per_parameter, rel=0.01)


def test_integer_groups_divide_as_tensors_quantized_does() -> None:
    from fewbits.tensors import quantized

    for group in GROUPS:
        assert group.divisor == quantized._DIVISOR[group.name]
        assert group.lowest == quantized._CODE_RANGE[group.name][0]


def test_parameters_follow_from_the_shape() -> None:
    known = {"SmolLM2-135M": 134_515_008, "Llama-3.2-1B": 1_235_814_400, "Llama-3.1-8B": 8_030_261_248}
    found = {model.name: model.size.parameters for model in MODELS}
    assert {name: found[name] for name in known} == known
    measured = [16, 16, 16, 16, 14, 10, 6.03]  # benchmarks/bench_train.py
    sums = [sum(size for _, size in training["parts"]) for training in page_data()["trainings"]]
    assert sums == pytest.approx(measured, abs=0.005)


@pytest.mark.parametrize("folder", ["page", "comparison_page"])
def test_every_module_is_in_the_page_once(folder: str) -> None:
    script = bundle(folder, "main")
    modules = {f"{path.parent.name}_{path.stem}" for path in (REPORT / folder).glob("*.js")} | {"page_base_dom"}
    assert {name for name in modules if f"const module_{name} = " in script} == modules
    assert all(script.count(f"const module_{name} = ") == 1 for name in modules)


def test_the_page_refers_to_nothing() -> None:
    html = page_html(page_data())
    assert "src=" not in html.replace("default-src", "")
    assert '<link rel="stylesheet"' not in html
    assert "default-src 'none'" in html


def test_a_form_that_cannot_be_put_together_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page").mkdir()
    monkeypatch.setattr(one_file, "files", lambda _: tmp_path)
    for name, text in (("main", "export default 3;\n"), ("a", 'import { b } from "./b.js";\n')):
        (tmp_path / f"page/{name}.js").write_text(text)
    (tmp_path / "page/b.js").write_text('import { a } from "./a.js";\n')
    with pytest.raises(AssertionError, match="export default"):
        bundle("page", "main")
    with pytest.raises(AssertionError, match="page/a > page/b > page/a"):
        bundle("page", "a")


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write_page(path, "first")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
