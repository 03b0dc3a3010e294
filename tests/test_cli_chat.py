"""`fewbits chat` as a process: from a pipe, and at a (pseudo) terminal with Ctrl-C."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from fewbits.models.chat import Answer

fcntl = pytest.importorskip("fcntl", reason="pseudo-terminals are of Unix")
pty = pytest.importorskip("pty", reason="pseudo-terminals are of Unix")

MAIN = "from fewbits.cli import main; main()"
CONTROLLED = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {MAIN}"  # Ctrl-C then comes to it
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "INPUTRC": os.devnull, "PYTHONUTF8": "1"}
CTRL_C, CTRL_D = "\x03", "\x04"
GREEDY = ("--temperature", 0, "--max-new-tokens", 8)


@pytest.fixture(scope="module")
def talker(save_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers do not end by themselves."""
    folder = tmp_path_factory.mktemp("talker")
    save_tiny(folder, dtype=torch.float32, eos_token_id=None, max_position_embeddings=100_000)
    return folder


@pytest.fixture
def piped(run_cli: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command, in this process, with these bytes on its standard input."""

    def run(model: Path, data: str | bytes, *arguments: object) -> Any:
        data = data if isinstance(data, bytes) else data.encode()
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(data), encoding="utf-8"))
        return run_cli("chat", model, *arguments)

    return run


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.screen, here = pty.openpty()
        command = [sys.executable, "-c", CONTROLLED, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=here, stdout=here, stderr=here, start_new_session=True, env=ENVIRONMENT
        )
        os.close(here)
        self.unread = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def read(self, *, at_least: int = 1) -> str:
        """So many characters, or all until the process ends."""
        deadline = time.monotonic() + 60
        while len(self.unread) < at_least:
            assert select.select([self.screen], [], [], deadline - time.monotonic())[0], f"silent after {self.unread!r}"
            try:
                self.unread += os.read(self.screen, 4096).decode("latin-1")  # what is looked for is ASCII
            except OSError:  # EIO: nobody has the terminal open any more
                break
        shown, self.unread = self.unread, ""
        return shown

    def read_until(self, text: str) -> str:
        """All up to this text; what comes after is left to read."""
        shown, deadline = "", time.monotonic() + 60
        while text not in shown:
            more = self.read()
            assert more, f"it ended, without {text!r}: {shown!r}"
            assert time.monotonic() < deadline, f"no {text!r}: {shown[-1000:]!r}"
            shown += more
        shown, found, self.unread = shown.partition(text)
        return shown + found

    def read_to_prompt(self) -> str:
        """All up to the prompt; then waits until it listens: a signal just before readline's select is seen late."""
        shown = self.read_until(">>> ")
        time.sleep(0.5)
        return shown

    def end(self) -> tuple[int, str]:
        """The exit code, and what was still shown."""
        shown = self.read(at_least=sys.maxsize)
        return self.process.wait(60), shown


@pytest.fixture
def terminal(talker: Path) -> Iterator[Terminal]:
    with Terminal("chat", talker, "--temperature", 0, "--max-new-tokens", 90_000) as started:
        started.read_to_prompt()
        yield started


def test_from_a_pipe_each_line_is_a_turn(talker: Path, piped: Callable) -> None:
    command = [sys.executable, "-c", MAIN, "chat", talker, *map(str, GREEDY)]
    ran = subprocess.run(
        command, input=b"hello\n\nhe\n/reset\nhello", capture_output=True, check=False, env=ENVIRONMENT
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    first = piped(talker, "hello\n", *GREEDY).out.encode()
    assert len(first) > 1
    assert ran.stdout.startswith(first)
    assert ran.stdout.endswith(first)
    assert len(ran.stdout) > 2 * len(first)
    assert b"\x1b" not in ran.stdout
    assert b">>>" not in ran.stdout


def test_reset_makes_the_difference(talker: Path, piped: Callable) -> None:
    forgot = piped(talker, "hello\n/reset\nhello\n", *GREEDY).out
    remembered = piped(talker, "hello\nhello\n/quit\nhello\n", *GREEDY).out
    assert forgot == forgot[: len(forgot) // 2] * 2
    assert remembered != forgot


def test_the_options_reach_the_conversation(talker: Path, piped: Callable) -> None:
    plain = piped(talker, "hello\n", *GREEDY).out
    assert piped(talker, "hello\n", *GREEDY, "--system", "be brief").out != plain
    assert piped(talker, "hello\n", *GREEDY, "--precision", "int8").code == 0
    drawn = [piped(talker, "hello\n", "--max-new-tokens", 8, "--seed", seed).out for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [("/surprise\nhello\n", "no command /surprise; /help lists them"), ("x" * 130, "context of 128; shorten one")],
    ids=["command", "long"],
)
def test_from_a_pipe_a_refusal_ends_it(tiny: Path, piped: Callable, text: str, message: str) -> None:
    ran = piped(tiny, text, *GREEDY)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_bytes_that_are_not_utf8_are_read(talker: Path, piped: Callable) -> None:
    ran = piped(talker, b"he\xff\n", *GREEDY)
    assert (ran.code, ran.err) == (0, "")
    assert ran == piped(talker, "he\ufffd\n", *GREEDY)


def test_no_input_is_no_error(talker: Path, piped: Callable) -> None:
    assert piped(talker, "") == (0, "", "")


def test_an_interrupt_ends_a_pipe(talker: Path, piped: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> Answer:
        return Answer("half", interrupted=True, forgotten=0)

    monkeypatch.setattr("fewbits.models.chat.Conversation.answer", stopped)
    assert piped(talker, "hello\nhello\n") == (130, "\n", "error: interrupted\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.type("hello\n")
    terminal.read_until("hello")
    terminal.read(at_least=300)  # in the middle of an answer that would take minutes
    terminal.type(CTRL_C)
    shown = terminal.read_to_prompt()
    assert "stopped" in shown
    assert "Traceback" not in shown
    terminal.type("he\n")
    terminal.read(at_least=300)
    terminal.type(CTRL_C)
    assert "stopped" in terminal.read_to_prompt()
    terminal.type("/reset\n")
    assert "forgotten" in terminal.read_to_prompt()
    terminal.type("/help\n")
    assert "/quit" in terminal.read_until("goes on.")
    terminal.read_to_prompt()
    terminal.type("/surprise\n")
    assert "no command /surprise" in terminal.read_until("lists them")
    terminal.read_to_prompt()
    terminal.type(CTRL_D)
    code, rest = terminal.end()
    assert code == 0
    assert "error" not in rest


def test_ctrl_c_at_the_prompt_asks_once(terminal: Terminal) -> None:
    terminal.type(CTRL_C)
    terminal.read_until("Ctrl-C again ends")
    terminal.read_to_prompt()
    terminal.type("/reset\n")
    terminal.read_until("forgotten")
    terminal.read_to_prompt()
    terminal.type(CTRL_C)
    terminal.read_until("Ctrl-C again ends")
    terminal.read_to_prompt()
    terminal.type(CTRL_C)
    assert terminal.end()[0] == 0


def test_lines_are_edited_and_remembered(terminal: Terminal) -> None:
    pytest.importorskip("readline")
    terminal.type("/resetx\x7f\n")
    terminal.read_until("forgotten")
    terminal.read_to_prompt()
    terminal.type("\x1b[A\n")  # up: the line before
    terminal.read_until("forgotten")
    terminal.type("/quit\n")
    assert terminal.end()[0] == 0


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come before the weights are loaded."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the weights were loaded")

    monkeypatch.setattr("fewbits.models.load.AutoModelForCausalLM.from_pretrained", load)


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x" * 200], "prompt: 202 tokens fill the model's context of 128; shorten it"),
        (["generate", "x" * 100, "--max-new-tokens", 50], "prompt: 102 tokens and 50 new ones pass"),
        (["generate", ""], "prompt: it is empty"),
        (["chat", "--max-new-tokens", 126], "prompt: 3 tokens and 126 new ones pass"),
        (["chat", "--system", " "], "system prompt: it is empty"),
        (["chat", "--system", "x" * 200], "tokens fill the model's context of 128; shorten it"),
    ],
    ids=lambda value: " ".join(map(str, value))[:30] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_loading(
    run_cli: Callable, tiny: Path, arguments: list, message: str
) -> None:
    command, *rest = arguments
    ran = run_cli(command, tiny, *rest)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.usefixtures("unloadable")
def test_a_model_without_chat_template(run_cli: Callable, save_tiny: Callable, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    for file in tmp_path.glob("chat_template*"):
        file.unlink()
    ran = run_cli("chat", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert f"{tmp_path}: the tokenizer has no chat template" in ran.err
    assert "fewbits generate --raw" in ran.err


def test_generate_clamps_its_default_to_the_context(run_cli: Callable, tiny: Path) -> None:
    ran = run_cli("generate", tiny, "x" * 120)
    assert (ran.code, ran.err) == (0, "")
