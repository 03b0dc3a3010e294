"""Bad input on the command line: one line on stderr that names the thing, an exit code, no traceback."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from models.tiny_gguf import TinyGguf

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to break."""
    return shutil.copytree(tiny, tmp_path / "model")


def assert_refused(ran: object, *parts: object, code: int = 2) -> None:
    assert (ran.code, ran.out) == (code, ""), ran
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.endswith("\n")
    for part in parts:
        assert str(part) in ran.err


USES = {
    "convert": lambda path: ("convert", path, path.parent / "out"),
    "compare": lambda path: ("compare", path, path),
    "generate": lambda path: ("generate", path, "hello"),
}
ALL_USES = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
LOADING = pytest.mark.parametrize("use", [USES["convert"], USES["generate"]], ids=["convert", "generate"])


@ALL_USES
def test_a_missing_path(run_cli: Callable, tmp_path: Path, use: Callable) -> None:
    path = tmp_path / "nowhere/model.gguf"
    assert_refused(run_cli(*use(path)), f"no such file or folder: {path}", "Hub id")


@ALL_USES
def test_a_folder_without_weights(run_cli: Callable, model: Path, use: Callable) -> None:
    (model / WEIGHTS).unlink()
    assert_refused(run_cli(*use(model)), model, "holds no weights")


@ALL_USES
def test_a_truncated_safetensors_file(run_cli: Callable, model: Path, use: Callable) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:-5])
    assert_refused(run_cli(*use(model)), model / WEIGHTS, f"byte {len(data) - 5}", "ends inside tensor")


@ALL_USES
@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x10" + bytes(7) + b"not json at all!", b""], ids=len)
def test_a_corrupt_safetensors_header(run_cli: Callable, model: Path, use: Callable, header: bytes) -> None:
    (model / WEIGHTS).write_bytes(header)
    assert_refused(run_cli(*use(model)), model / WEIGHTS, "byte ")


@ALL_USES
def test_a_truncated_gguf_file(run_cli: Callable, tmp_path: Path, use: Callable) -> None:
    path = tmp_path / "model.gguf"
    TinyGguf().write(path)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert_refused(run_cli(*use(path)), path, f"the file ends at byte {len(data) - 100}")


@ALL_USES
def test_a_corrupt_gguf_file(run_cli: Callable, tmp_path: Path, use: Callable) -> None:
    path = tmp_path / "model.gguf"
    TinyGguf().write(path)
    path.write_bytes(path.read_bytes()[:24] + b"\xff" * 100)
    assert_refused(run_cli(*use(path)), path, "byte 8: 21 tensors cannot fit")


@ALL_USES
def test_a_file_of_another_kind(run_cli: Callable, tmp_path: Path, use: Callable) -> None:
    path = tmp_path / "model.txt"
    path.write_text("hello")
    assert_refused(run_cli(*use(path)), path, "is not a GGUF file")


@LOADING
@pytest.mark.parametrize("config", ["", "{", "[]", '{"model_type": "surprise"}', "{}"])
def test_a_configuration_that_is_none(run_cli: Callable, model: Path, use: Callable, config: str) -> None:
    (model / "config.json").write_text(config)
    assert_refused(run_cli(*use(model)), model)


@LOADING
def test_a_model_that_writes_no_text(run_cli: Callable, model: Path, use: Callable) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert_refused(run_cli(*use(model)), model, "vit")


@LOADING
def test_weights_of_another_model(run_cli: Callable, model: Path, use: Callable) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    assert_refused(run_cli(*use(model)), model, "mlp.gate_proj.weight has shape [96, 64]", "wants [80, 64]")


@LOADING
def test_a_missing_tensor(run_cli: Callable, model: Path, use: Callable) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, model / WEIGHTS)
    assert_refused(run_cli(*use(model)), model, "model.norm.weight", "not in the checkpoint")


@LOADING
def test_another_quantization(run_cli: Callable, model: Path, use: Callable) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert_refused(run_cli(*use(model)), model, "'gptq'")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("int9", "int8"), ("bf61", "bf16"), ("FP16", "fp16"), ("wild", "known: fp32")],
)
def test_an_unknown_precision(run_cli: Callable, tiny: Path, tmp_path: Path, name: str, nearest: str) -> None:
    for arguments in (("convert", tiny, tmp_path / "out", "--to"), ("generate", tiny, "hello", "--precision")):
        assert_refused(run_cli(*arguments, name), f"precision '{name}' is unknown", nearest)


@pytest.mark.parametrize(("name", "nearest"), [("e4m3f", "e4m3fn"), ("bf61", "bf16"), ("int9", "int8")])
def test_an_unknown_format(run_cli: Callable, name: str, nearest: str) -> None:
    assert_refused(run_cli("formats", name), name, nearest)
    assert_refused(run_cli("show", "0.1", "--in", f"fp16,{name}"), name, nearest)


@pytest.mark.parametrize("number", ["one", "", "0x", "1/0", "--surprise"])
def test_a_number_that_is_none(run_cli: Callable, number: str) -> None:
    assert_refused(run_cli("show", number), number)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["converts"], ["converts"]),
        (["convert"], ["model"]),
        (["convert", "a"], ["out"]),
        (["convert", "a", "b", "c"], ["c"]),
        (["convert", "a", "b", "--too", "int8"], ["--too"]),
        (["convert", "a", "b", "--to"], ["--to"]),
        (["generate", "a", "b", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["generate", "a", "b", "--temperature", "warm"], ["--temperature"]),
        (["generate", "a", "b", "--temperature", "nan"], ["--temperature"]),
        (["generate", "a", "b", "--seed", "-1"], ["--seed"]),
        (["generate", "a", "b", "--seed", "99999999999999999999"], ["--seed"]),
        (["--surprise"], ["--surprise"]),
    ],
    ids=" ".join,
)
def test_usage(run_cli: Callable, arguments: list[str], parts: list[str]) -> None:
    assert_refused(run_cli(*arguments), *parts, "fewbits --help")


def test_an_unknown_layout(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    assert_refused(run_cli("convert", tiny, tmp_path / "out", "--layout", "gptq"), "'gptq'", "compressed-tensors")


def test_a_pattern_that_matches_nothing(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    assert_refused(run_cli("convert", tiny, tmp_path / "out", "--keep", "lm_heat"), "'lm_heat'", "q_proj")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "use",
    [
        lambda model, out: ("convert", model, out / "out", "--json"),
        lambda model, _: ("compare", model, model, "--json"),
        lambda *_: ("doctor", "--json"),
    ],
    ids=["convert", "compare", "doctor"],
)
def test_json_into_a_missing_folder(run_cli: Callable, tiny: Path, tmp_path: Path, use: Callable) -> None:
    missing = tmp_path / "missing"
    assert_refused(run_cli(*use(tiny, tmp_path), missing / "a.json"), "--json", missing, "does not exist")
    assert_refused(run_cli(*use(tiny, tmp_path), tmp_path), "--json", tmp_path, "is a folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(run_cli: Callable, tiny: Path, prompt: str) -> None:
    assert_refused(run_cli("generate", tiny, prompt), "prompt", "empty")


def test_a_prompt_that_is_too_long(run_cli: Callable, tiny: Path) -> None:
    ran = run_cli("generate", tiny, "x" * 200, "--max-new-tokens", 3)
    assert_refused(ran, "prompt: ", "200" if "200" in ran.err else "tokens", "context of 128")


def test_a_model_without_tokenizer(run_cli: Callable, model: Path, tmp_path: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert_refused(run_cli("generate", model, "hello"), model, "tokenizer")
    assert_refused(run_cli("convert", model, tmp_path / "out.gguf", "--layout", "gguf"), model, "tokenizer")
    assert run_cli("convert", model, tmp_path / "out").code == 0, "weights can be converted without one"
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_an_output_folder_that_is_not_ours(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert_refused(run_cli("convert", tiny, out), out, "not empty", "--overwrite")
    assert_refused(run_cli("convert", tiny, out, "--overwrite"), out, "holds no model")
    assert (out / "letter.txt").read_text() == "dear"


def test_an_output_below_a_file(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(run_cli("convert", tiny, tmp_path / "file/out"), tmp_path / "file", code=1)
    assert_refused(run_cli("convert", tiny, tmp_path / "file"), tmp_path / "file", "is a file")


def test_an_output_that_may_not_be_written(
    run_cli: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # a real one lets root in
    assert_refused(run_cli("convert", tiny, tmp_path / "out"), "Permission denied", tmp_path, code=1)


def test_a_weight_with_nan(run_cli: Callable, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, model / WEIGHTS)
    ran = run_cli("convert", model, tmp_path / "out")
    assert_refused(ran._replace(out=""), "model.layers.1.mlp.up_proj.weight", "NaN", "channel 3")  # the manifest came
    assert not (tmp_path / "out").exists()


def test_int8_again(run_cli: Callable, tiny_int8: Path, tmp_path: Path) -> None:
    assert_refused(run_cli("convert", tiny_int8, tmp_path / "out"), tiny_int8, "int8 already")
    assert_refused(run_cli("generate", tiny_int8, "hi", "--precision", "bf16"), tiny_int8, "stored in int8", "bf16")


def test_an_interrupt_ends_in_one_line(
    run_cli: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbits.quantize.convert.convert", interrupt)
    ran = run_cli("convert", tiny, tmp_path / "out")
    assert ran == (130, "", "error: interrupted\n")


def test_messages_are_not_taken_for_markup(run_cli: Callable, tmp_path: Path) -> None:
    path = tmp_path / f"[bold]:cat:{'long' * 50}/x.gguf"
    assert_refused(run_cli("convert", path, tmp_path / "out"), path)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["generate", "broken", "hello"], "byte 0"),
        (["formats", "bf61"], "bf16"),
        (["surprise"], "surprise"),
    ],
    ids=" ".join,
)
def test_the_process_ends_so_too(tmp_path: Path, arguments: list[str], part: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / WEIGHTS).write_bytes(b"\xff" * 8)
    command = [sys.executable, "-c", "from fewbits.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert part in done.stderr


def test_python_raises_the_same(tmp_path: Path) -> None:
    with pytest.raises(fewbits.FewbitsError, match="no such file or folder"):
        fewbits.convert(tmp_path / "no/where", tmp_path / "out")
