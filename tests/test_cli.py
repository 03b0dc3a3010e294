"""The command line: what each command prints and writes, and its exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from fewbits.cli import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_without_a_command_it_shows_the_commands(run_cli: Callable) -> None:
    alone, asked = run_cli(), run_cli("--help")
    assert (alone.code, asked.code) == (0, 0)
    assert all(command in text for command in COMMANDS for text in (alone.out, asked.out))
    assert alone.err == asked.err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run_cli: Callable, command: str) -> None:
    ran = run_cli(command, "--help")
    assert ran.code == 0
    assert command in ran.out
    for parameter in COMMANDS[command].params:
        assert parameter.name == "help" or parameter.help, f"{parameter.name} is not explained"


def test_formats_and_show(run_cli: Callable) -> None:
    assert "e4m3fn" in run_cli("formats").out
    assert "65504" in run_cli("formats", "fp16").out.replace(",", "")
    assert "fp16" in run_cli("show", "-1.5", "--in", "fp16").out


def test_convert_prints_the_manifest_and_writes_the_folder(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a [b] :cat:"  # neither markup nor an emoji
    ran = run_cli("convert", tiny, out, "--json", tmp_path / "manifest.json", "--keep", "*.down_proj")
    assert (ran.code, ran.err) == (0, "")
    assert f"wrote {out}: int8" in ran.out.replace("\n", "")
    assert "kept by '*.down_proj'" in " ".join(ran.out.split())
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["path"] == str(out)
    assert {row["format"] for row in written["manifest"]} == {"int8", "bf16"}
    assert written["nbytes"] == sum(row["nbytes"] for row in written["manifest"])


def test_convert_casts_and_overwrites(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    assert run_cli("convert", tiny, tmp_path / "out").code == 0
    assert run_cli("convert", tiny, tmp_path / "out", "--to", "fp16").code == 2
    assert run_cli("convert", tiny, tmp_path / "out", "--to", "fp16", "--overwrite").code == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"


def test_generate_writes_the_answer_alone_to_stdout(run_cli: Callable, tiny_int8: Path) -> None:
    greedy = run_cli("generate", tiny_int8, "hello", "--max-new-tokens", 5, "--raw")
    assert greedy.code == 0
    assert greedy.out.endswith("\n")
    assert greedy.err == ""
    again = run_cli("generate", tiny_int8, "hello", "--max-new-tokens", 5, "--raw")
    assert again == greedy


def test_generate_draws_by_seed(run_cli: Callable, tiny_int8: Path) -> None:
    def drawn(seed: int) -> str:
        return run_cli("generate", tiny_int8, "hello", "--max-new-tokens", 20, "--temperature", 2, "--seed", seed).out

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_doctor_tells_the_machine(run_cli: Callable, tmp_path: Path) -> None:
    ran = run_cli("doctor", "--json", tmp_path / "doctor.json")
    assert ran.code == 0
    assert version("torch") in ran.out
    assert version("torch") in (tmp_path / "doctor.json").read_text()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_installed_command_runs(encoding: str) -> None:
    command = [Path(sys.executable).with_name("fewbits"), "formats"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert "e4m3fn" in done.stdout.decode(encoding)
    assert done.stderr == b""
