"""The commands and their options. Each command's code is in the module of its name, which is loaded when it is called."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from overlay import __version__
from overlay.cli import failure
from overlay.cli.options import MOST_LAYERS


class _Commands(typer.core.TyperGroup):
    """Every failure ends as one message on stderr and an exit status that is not 1; see `failure.report`."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            status = super().main(*arguments, **{**options, "standalone_mode": False})
        except Exception as error:
            if not hasattr(error, "show"):
                status = failure.report(error)
            else:  # wrong usage: one of click's own exceptions, wherever typer has its click from
                text = io.StringIO()
                error.show(text)
                failure.say(text.getvalue())
                status = failure.FAILED
        sys.exit(status)

    def invoke(self, ctx: Any) -> Any:
        """What typer would end with status 1 itself: an interrupt, and a reader that has gone."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # here a full disk still has a message
        except (KeyboardInterrupt, OSError) as error:
            raise typer.Exit(failure.report(error)) from error


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
            metavar="PATH|WHEEL|VERSION|latest",
            help="An unpacked vLLM, a wheel file, or a release, which is fetched; the installed vLLM when left out.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|CONFIG.JSON",
            help="Also what each patch would do with this checkpoint, layer group by layer group, by its configuration.",
            show_default=False,
        ),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option("--tp", min=1, help="GPUs on which that checkpoint is served.")] = 1,
    lora: Annotated[bool, typer.Option("--lora", help="That checkpoint is served with --enable-lora.")] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also what a decode step of that checkpoint would gain, measured on this GPU."),
    ] = False,
    json: Json = False,
    cache: Cache = None,
) -> None:
    """What each patch would do in one vLLM, and with one checkpoint, without importing it (--measure does, in a process).

    Exit status: 0 all shapes are known, 1 something drifted or vLLM failed at --measure, 2 bad input.
    """
    from overlay.cli import check

    raise typer.Exit(check.run(vllm, json, cache, model, tensor_parallel, lora, measure))


@app.command()
def matrix(
    versions: Annotated[
        list[str] | None, typer.Argument(help="Releases; all from 0.17.1 on when left out.", show_default=False)
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the table as Markdown.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if the written table is not the one of now.")] = False,
    latest: Annotated[
        bool, typer.Option("--latest", help="Only the newest release, and one line: what drifted there.")
    ] = False,
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
        matrix.run(
            tuple(versions or ()), write=write, compare=check, output=output, as_json=json, cache=cache, latest=latest
        )
    )


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until Ctrl-C.")] = False,
    gone: Annotated[bool, typer.Option("--all", help="Also processes that are gone.")] = False,
    journal_dir: Annotated[
        Path | None, typer.Option(help="The journals' folder; VLLMOVERLAY_JOURNAL_DIR or its default when left out.")
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(
            metavar="PATCH,PATCH,…",
            help="For probes and alerts: status 1 unless each of these patches is in effect in some process.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """What the overlay does in the processes of this host.

    Exit status: 0 nothing is wrong, 1 a live process has a problem or a patch without effect, or a required patch is
    missing, 2 bad input.
    """
    from overlay.cli import status

    raise typer.Exit(status.run(journal_dir, gone=gone, as_json=json, watch=watch, required=require))


@app.command()
def doctor(json: Json = False) -> None:
    """Whether a vLLM that is started here has the overlay, and what to do where it has not. Run it where vLLM runs.

    Exit status: 0 nothing needs doing, 1 something does, 2 bad input.
    """
    from overlay.cli import doctor

    raise typer.Exit(doctor.run(json))


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|CONFIG.JSON|FOLDER",
            help="Qwen3.5-35B-A3B (the default), Qwen3.5-27B, Qwen3-Next-80B-A3B or tiny (the default without a GPU); a "
            "configuration; a checkpoint's folder.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="The weights of a named shape: bf16, fp8-block, fp8-tensor, fp8-channel, w4-experts, w4 or nvfp4.",
        ),
    ] = "bf16",
    layers: Annotated[
        int | None,
        typer.Option(max=MOST_LAYERS, help="Layers of that shape; as many as fit when left out.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs per engine.")] = 1,
    arms: Annotated[
        str,
        typer.Option(
            help="Of stock, overlay, the overlay with one plan (auto, dual, serial), and control: stock again."
        ),
    ] = "stock,overlay",
    batches: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Running requests of a decode step.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Prompt lengths for the first token.", show_default=False)
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="R,R,…", help="Also real servers, at these requests per second.", show_default=False),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…", help="Also real servers of all arms, with so many clients at a time.", show_default=False
        ),
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(
            help="What to measure, in this order; servers come last: tokens,ttft,decode,serving (the default), timeline.",
            show_default=False,
        ),
    ] = None,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="The GPU kernels of a layer, as a table and a picture; alone, no times.")
    ] = False,
    capture_sizes: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="CUDA graph capture sizes.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the results; bench-<time> here when left out.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Caches and logs; a later run starts sooner with it.")] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds after which no further step begins.")] = 7200.0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds, for a first look.")] = False,
    together: Annotated[
        bool, typer.Option("--start-together", help="Start all engines at once; start times then mean nothing.")
    ] = False,
    in_turn: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Benches with the same file start their engines at the same time, and measure one after the other.",
        ),
    ] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Keep the compile caches of an earlier run.")] = False,
    memory_check: Annotated[
        bool,
        typer.Option(
            "--memory-check/--no-memory-check",
            help="Refuse what does not fit. Without it all servers are alive together.",
        ),
    ] = True,
    ask_stock: Annotated[
        int,
        typer.Option(metavar="N", min=2, help="How often stock answers each case of tokens, to see what it repeats."),
    ] = 2,
    engine: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help="A further argument of vllm.LLM, of all arms.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An environment variable, of all arms.")
    ] = None,
    overlay_env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of all arms but stock.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="OLD NEW", help="Measure nothing: what moved between two results.json?"),
    ] = None,
) -> None:
    """Stock vLLM and the overlay against each other on this machine: tokens, decode step, first token, starts, servers.

    Without a GPU it compares tokens, and its times say nothing about speed.

    Exit status: 0 measured, tokens identical; 1 tokens differ, something failed, or --compare found a regression; 2 bad
    input, or too little memory; 3 interrupted or out of time: what was measured is kept.
    """
    if compare is not None:
        from overlay.cli import output
        from overlay.cli.bench import compare as gate

        raise typer.Exit(gate.run(*compare, output.console()))
    from overlay.cli.bench import command

    raise typer.Exit(
        command.run(
            command.Options(
                model=model,
                format=form,
                layers=layers,
                tensor_parallel=tensor_parallel,
                arms=command.parse_arms(arms),
                phases=command.parse_phases(phases, timeline),
                batches=command.parse_numbers("--batches", batches),
                prompts=command.parse_numbers("--prompts", prompts),
                rates=command.parse_rates(rates),
                concurrency=command.parse_numbers("--concurrency", concurrency),
                capture_sizes=command.parse_numbers("--capture-sizes", capture_sizes),
                out=out,
                work=work,
                budget=budget,
                quick=quick,
                ask_stock=ask_stock,
                in_turn=in_turn,
                together=together,
                warm=warm,
                memory_check=memory_check,
                engine=tuple(engine or ()),
                variables=tuple(env or ()),
                overlay_variables=tuple(overlay_env or ()),
            )
        )
    )
