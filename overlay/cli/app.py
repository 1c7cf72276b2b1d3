"""The commands and their options. What a command does is in the module of its name, loaded when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from overlay import __version__
from overlay.cli.failure import CommandError, missing_library


class _Commands(typer.core.TyperGroup):
    """Every failure that a person can do something about ends as one message on stderr and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            failure = missing_library(error)
        except CommandError as error:
            failure = error
        typer.echo(f"error: {failure}", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    invoke_without_command=True,
)

Json = Annotated[bool, typer.Option("--json", help="For machines; the fields are in the module's docstring.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="The folder for fetched releases; vllm-overlay/releases in the user's cache folder by default."),
]


@app.callback()
def overlay(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """What the overlay would do in a vLLM, and what it does in the ones that run here."""
    if version:
        typer.echo(f"vllm-auxstream-overlay {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def check(
    vllm: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|WHEEL|VERSION",
            help="An unpacked vLLM, a wheel file, or a release, which is fetched; the installed vLLM when left out.",
        ),
    ] = None,
    json: Json = False,
    cache: Cache = None,
) -> None:
    """What each patch would do in one vLLM, without importing it.

    Exit status: 0 all shapes are known, 1 something drifted, 2 bad input.
    """
    from overlay.cli import check

    raise typer.Exit(check.run(vllm, json, cache))


@app.command()
def matrix(
    versions: Annotated[
        list[str] | None, typer.Argument(help="Releases; all from 0.17.1 on when left out.", show_default=False)
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the table as Markdown.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if the written table is not the one of now.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="The Markdown file; docs/COMPATIBILITY.md of the repository by default.")
    ] = None,
    json: Json = False,
    cache: Cache = None,
) -> None:
    """What each patch would do in every release of vLLM, against what is expected of it.

    Exit status: 0 all as expected, 1 a verdict or the written table differs, 2 bad input.
    """
    from overlay.cli import matrix

    raise typer.Exit(
        matrix.run(tuple(versions or ()), write=write, compare=check, output=output, as_json=json, cache=cache)
    )


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until Ctrl-C.")] = False,
    gone: Annotated[bool, typer.Option("--all", help="Also processes that are gone.")] = False,
    journal_dir: Annotated[
        Path | None, typer.Option(help="The journals' folder; VLLMOVERLAY_JOURNAL_DIR or its default when left out.")
    ] = None,
    json: Json = False,
) -> None:
    """What the overlay does in the processes of this host.

    Exit status: 0 nothing is wrong, 1 a live process has a problem or a patch without effect, 2 bad input.
    """
    from overlay.cli import status

    raise typer.Exit(status.run(journal_dir, gone=gone, as_json=json, watch=watch))
