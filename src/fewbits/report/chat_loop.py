"""The prompt loop of a conversation: a person at a terminal, or one turn a line from a pipe."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING

from rich.console import Console

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.models.chat import Conversation

_PROMPT = ">>> "
_HELP = """\
/reset   forget what was said
/quit    end (or Ctrl-D)
/help    this
Ctrl-C stops an answer; the conversation goes on."""


def chat_loop(conversation: Conversation) -> None:
    """Read turns from stdin and write the answers to stdout until the end of input or ``/quit``.

    At a terminal, notes (on stderr) say what happened, a refused message can be said otherwise, and Ctrl-C stops an
    answer, or at the prompt, pressed twice, ends. From a pipe, each line is a turn, nothing but answers is written, and
    a refused message or an interrupt ends the program.

    Raises:
        FewbitsError: From a pipe: a message that the conversation refuses, or an unknown command.
        KeyboardInterrupt: From a pipe.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        _at_terminal(conversation)
        return
    for line in sys.stdin:
        if not _turn(conversation, line):
            return


def _at_terminal(conversation: Conversation) -> None:
    _note("/help lists the commands")
    leaving = False  # Ctrl-C was pressed at the prompt
    while True:
        try:
            line = _read_line()
        except EOFError:
            _note("")
            return
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = True
            _note("\nCtrl-C again ends (so do Ctrl-D and /quit)")
            continue
        leaving = False
        try:
            if not _turn(conversation, line):
                return
        except FewbitsError as error:
            _note(str(error))
        except KeyboardInterrupt:  # came before the answer began or after it ended
            _note("\nstopped")


def _turn(conversation: Conversation, line: str) -> bool:
    """Answer a line or do what it commands; False ends the loop."""
    line = line.strip()
    if not line:
        return True
    if re.fullmatch("/[a-z]*", line):  # "/etc/fstab is …" is a message
        return _command(conversation, line)
    answer = conversation.answer(line, _write)
    _write("\n")
    if answer.interrupted and not sys.stdin.isatty():
        raise KeyboardInterrupt
    if answer.interrupted:
        _note("stopped" if answer.text else "stopped; the question is taken back")
    if answer.forgotten:
        _note(f"the context is full: the oldest turns ({answer.forgotten}) are forgotten")
    return True


def _command(conversation: Conversation, name: str) -> bool:
    if name == "/reset":
        conversation.reset()
        if sys.stdin.isatty():
            _note("forgotten")
    elif name == "/help":
        _note(_HELP)
    elif name != "/quit":
        raise FewbitsError(f"no command {name}; /help lists them")
    return name != "/quit"


def _read_line() -> str:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # input() then edits lines and remembers them
    if sys.stdout.isatty():
        return input(_PROMPT)
    sys.stderr.write(_PROMPT)  # input() would write it among the answers
    sys.stderr.flush()
    return input()


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _note(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(text, style="dim")
