"""`fewbits explore`: the file, the server, and what goes wrong."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError

import pytest


def test_the_file_is_written(run_cli: Callable, tmp_path: Path) -> None:
    ran = run_cli("explore", "--out", tmp_path / "page.html")
    assert (ran.code, ran.out) == (0, "")
    assert re.search(r"page.html is written: \d+ kB", ran.err)
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--out", "."], ["--out", "is a folder"]),
        (["--out", "no/where.html"], ["--out", "the folder no does not exist"]),
        (["--out", "page.html", "--port", "0"], ["--port", "--out", "give one of them"]),
        (["--port", "70000"], ["--port 70000", "65535"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input(
    run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_cli("explore", *arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert all(part in ran.err for part in parts)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_be_written(run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # a real one lets root in
    ran = run_cli("explore", "--out", tmp_path / "page.html")
    assert ran.code == 1
    assert "Permission denied" in ran.err


def test_a_port_in_use(run_cli: Callable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run_cli("explore", "--port", port)
    assert ran.code == 2
    assert ran.err == f"error: --port {port} is in use: name another, or --port 0 for any free one\n"


def test_no_browser(run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    ran = run_cli("explore", "--out", tmp_path / "page.html", "--open")
    assert ran.code == 0
    assert f"found no browser on this machine: open {(tmp_path / 'page.html').as_uri()} yourself" in ran.err


def test_it_serves_one_page_until_ctrl_c() -> None:
    command = [sys.executable, "-c", "from fewbits.cli import main; main()", "explore", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        url = serving.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        with urllib.request.urlopen(url) as answer:
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            assert b"One number, in every format" in answer.read()
        with pytest.raises(HTTPError, match="404") as missing:
            urllib.request.urlopen(url + "style.css")
        missing.value.close()
        serving.send_signal(signal.SIGINT)
        out, err = serving.communicate(timeout=20)
    assert (serving.returncode, out) == (0, "")
    assert err.endswith("stopped\n")
