"""`fewbits explore`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.app import app, to_stderr
from fewbits.errors import FewbitsError

_PORT = 8731


@app.command()
def explore(
    port: Annotated[
        int | None, typer.Option(help=f"Port on this machine, {_PORT} by default; 0: any free one.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the page to this file instead; it works offline.")] = None,
) -> None:
    """Explore precision in a browser: bits, ranges, blocks, what goes wrong in training, what fits."""
    from fewbits.report.explore import page_data
    from fewbits.report.explore_page import page_html, write_page
    from fewbits.report.explore_server import PageServer

    if out is not None:
        if port is not None:
            raise FewbitsError("--port serves the page and --out writes it: give one of them")
        write_page(out, page_html(page_data()))
        to_stderr(f"{out} is written: {out.stat().st_size / 1e3:.0f} kB, no server needed")
        if open_:
            _open(out.absolute().as_uri())
        return
    with PageServer(page_html(page_data()), _PORT if port is None else port) as server:
        typer.echo(server.url)
        to_stderr("Ctrl-C stops it")
        if open_:
            _open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            to_stderr("stopped")


def _open(url: str) -> None:
    if not webbrowser.open(url):
        to_stderr(f"--open found no browser on this machine: open {url} yourself")
