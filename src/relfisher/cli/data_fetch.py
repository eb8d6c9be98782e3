"""`relfisher data fetch`: the only command that downloads."""

from __future__ import annotations

from typing import Annotated

import typer

from relfisher.cli.arguments import ArgumentError

__all__ = ["data_fetch"]


def data_fetch(
    name: Annotated[str, typer.Argument(help="mnist or fashion-mnist.")],
    base_url: Annotated[str | None, typer.Option(help="Fetch the files from here instead.")] = None,
) -> None:
    """Download a data set into the cache and check its hashes."""
    from rich.console import Console

    from relfisher.studies.data import DataError, fetch
    from relfisher.studies.progress import DownloadDisplay

    console = Console(stderr=True)
    try:
        directory = fetch(name, base_url=base_url, bar=DownloadDisplay(console) if console.is_terminal else None)
    except DataError as error:
        raise ArgumentError("name" if base_url is None else "--base-url", str(error)) from error
    print(directory)
