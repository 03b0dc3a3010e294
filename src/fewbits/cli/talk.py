"""`fewbits generate` and `fewbits chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fewbits.cli.app import MODEL, PRECISION, app, progress_bar

_KV_CACHE = "int8: keys and values in a quarter of the memory; without it, as they are computed."


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    prompt: Annotated[str, typer.Argument(help="What you say to it.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to write; without it, 256 or what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws, where temperature is above 0.")] = 0,
    precision: Annotated[str | None, typer.Option(help=PRECISION)] = None,
    kv_cache: Annotated[str | None, typer.Option(help=_KV_CACHE)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")] = False,
) -> None:
    """Let a model answer a prompt; its chat template is applied."""
    from fewbits.models.generate import check_prompt, generate_text
    from fewbits.models.load import AutoModelForCausalLM
    from fewbits.models.source import open_source

    source = open_source(model)
    tokenizer = source.tokenizer()
    check_prompt(source.config, tokenizer, prompt, max_new_tokens=max_new_tokens, use_chat_template=not raw)
    with progress_bar("loading", in_bytes=True) as step:
        loaded = AutoModelForCausalLM.from_pretrained(model, precision=precision, kv_cache=kv_cache, progress=step)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    generate_text(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        use_chat_template=not raw, write=write,
    )  # fmt: skip
    write("\n")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help=MODEL)],
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens in an answer; without it, 1024 or what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws, where temperature is above 0.")] = 0,
    precision: Annotated[str | None, typer.Option(help=PRECISION)] = None,
    kv_cache: Annotated[str | None, typer.Option(help=_KV_CACHE)] = None,
) -> None:
    """Talk with a model; Ctrl-C stops an answer, Ctrl-D ends. From a pipe, each line is a turn."""
    from fewbits.models.chat import Conversation, check_chat
    from fewbits.models.load import AutoModelForCausalLM
    from fewbits.models.source import open_source
    from fewbits.report.chat_loop import chat_loop

    source = open_source(model)
    tokenizer = source.tokenizer()
    check_chat(source.config, tokenizer, system=system, max_new_tokens=max_new_tokens)
    with progress_bar("loading", in_bytes=True) as step:
        loaded = AutoModelForCausalLM.from_pretrained(model, precision=precision, kv_cache=kv_cache, progress=step)
    chat_loop(
        Conversation(
            loaded, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
    )
