"""`imagine-flash bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import Device, Output, Quiet, examples, flag, needs, progress, say, show_help, writable

if TYPE_CHECKING:
    from ..benchmarks.schema import Record

Model = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="An artifact folder; by default the embedded model.")
]
Rounds = Annotated[int, typer.Option(metavar="INTEGER", help="Timings of each candidate, taken in turn; at least 5.")]
Quick = Annotated[bool, flag("--quick", help="Fewer cases, to see that everything runs.")]
bench = typer.Typer(
    help="Measure speed, checked and against a baseline, as a record.",
    callback=show_help,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench.command("kernels", epilog=examples("bench kernels --quick", "bench kernels --device cuda -o docs/results/gpu"))
def bench_kernels_command(
    output: Output = Path("kernels"),
    device: Device = None,
    rounds: Rounds = 50,
    quick: Annotated[bool, flag("--quick", help="Only the smallest shapes, to see that everything runs.")] = False,
    quiet: Quiet = False,
) -> None:
    """Time the update, to_image and GroupNorm + SiLU against what users run instead."""
    needs("bench", "torch", "diffusers", "matplotlib", "psutil")
    from ..benchmarks.kernels import bench_kernels

    writable(output)
    _show(bench_kernels(output, device=device, rounds=rounds, quick=quick, console=progress()), output)


@bench.command("gpu", epilog=examples("bench gpu -o docs/results/gpu", "bench gpu --tiny --no-compile --rounds 5"))
def bench_gpu_command(
    output: Output = Path("gpu"),
    device: Device = None,
    minutes: Annotated[
        float,
        typer.Option(
            metavar="NUMBER", help="No further row begins after so many; kernels get at most a quarter of them."
        ),
    ] = 20.0,
    rounds: Rounds = 50,
    compile: Annotated[
        bool,
        flag(
            "--compile/--no-compile",
            help="Also what torch.compile makes, with kernels tried out and in fp8 too, which takes minutes for each.",
        ),
    ] = True,
    mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        typer.Option(
            metavar="NAME",
            help="torch.compile's mode, for diffusers: default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs.",
        ),
    ] = "max-autotune",
    tiny: Annotated[bool, flag("--tiny", help="Small shapes, to try the whole of it on a CPU.")] = False,
    quiet: Quiet = False,
) -> None:
    """Time a Stable-Diffusion-Turbo-shaped student with random weights on a GPU, beside diffusers, and the kernels."""
    needs("bench", "torch", "diffusers", "matplotlib", "psutil")
    from ..benchmarks.gpu import bench_gpu

    writable(output)
    how: dict[str, Any] = {"tiny": tiny, "compile": compile, "mode": mode, "console": progress()}
    measured = bench_gpu(output, device=device, minutes=minutes, rounds=rounds, **how)
    _show(measured, output)
    say(f"{output}-kernels.json\n{output}-kernels.png")


@bench.command(
    "runtime", epilog=examples("bench runtime --quick", "bench runtime --model runs/artifact --backend onnxruntime")
)
def bench_runtime_command(
    output: Output = Path("runtime"),
    model: Model = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="openvino or onnxruntime; may be repeated; by default all that are installed."
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="INTEGER",
            help="Timings of single pictures, at least 5; groups get a tenth as many, whole processes a twentieth.",
        ),
    ] = 200,
    quick: Quick = False,
    quiet: Quiet = False,
) -> None:
    """Time the engine against its backends' bare calls and diffusers; batching, cold start and memory."""
    needs("cpu", "onnxruntime")
    needs("bench", "matplotlib", "psutil")
    from ..benchmarks.runtime import bench_runtime

    writable(output)
    how: dict[str, Any] = {"rounds": rounds, "quick": quick, "console": progress()}
    _show(bench_runtime(output, model=model, backends=backend or (), **how), output)


@bench.command("serve", epilog=examples("bench serve --quick", "bench serve --only load --requests 100000 -o many"))
def bench_serve_command(
    output: Output = Path("serve"),
    model: Model = None,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="openvino or onnxruntime; by default the fastest here.")
    ] = "auto",
    rounds: Annotated[
        int,
        typer.Option(
            metavar="INTEGER", help="Timings of single pictures, at least 5; a twentieth as many typed sentences."
        ),
    ] = 200,
    requests: Annotated[int, typer.Option(metavar="INTEGER", help="Of 64 clients at once; at least 640.")] = 10_000,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="overhead, typing, load, greedy or ray; may be repeated; by default all."),
    ] = None,
    quick: Quick = False,
    quiet: Quiet = False,
) -> None:
    """Time the server: overhead, typing, many requests, a greedy client, and two replicas on Ray Serve."""
    needs("cpu", "onnxruntime")
    needs("serve", "fastapi", "uvicorn", "httptools", "websockets", "prometheus_client", "multipart")
    needs("bench", "matplotlib", "psutil")
    from ..benchmarks.serve import bench_serve

    writable(output)
    record = bench_serve(
        output,
        model=model,
        backend=backend,
        rounds=rounds,
        requests=requests,
        only=only or (),
        quick=quick,
        console=progress(),
    )
    _show(record, output)


@bench.command(
    "latency",
    epilog=examples(
        "bench latency --steps 1 --against diffusers",
        "bench latency --model sd-turbo-shape --decoder tiny --folder shapes --python optimum-intel=other/bin/python",
    ),
)
def bench_latency_command(
    output: Output = Path("latency"),
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="An artifact folder, embedded, or a shape with random weights: sd15-shape, sd-turbo-shape, "
            "sdxl-turbo-shape, pixart-shape, tiny-shape.",
        ),
    ] = "embedded",
    backends: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Such as openvino,openvino:fp32,onnxruntime; all others are compared with the first; by default the "
            "fastest here.",
        ),
    ] = "",
    steps: Annotated[
        str | None, typer.Option(metavar="1,2,4", help="By default all of the model's; of shapes 1.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="512x512", help="WIDTHxHEIGHT, several with commas; by default the model's first."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="1,4", help="Pictures of one call, each of a prompt of its own.")] = "1",
    decoder: Annotated[str, typer.Option(metavar="tiny,full", help="Of shapes; by default tiny.")] = "",
    against: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="diffusers, diffusers-compile, optimum-onnx, optimum-intel, openvino-genai; by default all but the second.",
        ),
    ] = "diffusers,optimum-onnx,optimum-intel,openvino-genai",
    python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="The Python of an environment where a baseline is installed; may be repeated."
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option(metavar="25,50", help="Also diffusers with so many guided steps of the teacher.")
    ] = "",
    energy: Annotated[bool, flag("--energy", help="Also joules per picture, where the machine has a meter.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Make shapes and converted models here, and find them again the next time."
        ),
    ] = None,
    rounds: Rounds = 20,
    quiet: Quiet = False,
) -> None:
    """Time this project from a prompt to pixels beside what people would use instead, each in a process of its own."""
    needs("bench", "torch", "diffusers", "transformers", "matplotlib", "psutil")
    from ..benchmarks.latency.bench import LatencyOptions, bench_latency
    from ..benchmarks.latency.candidates import pythons_of
    from ..export.options import parse_sizes, parse_steps

    writable(output)
    options = LatencyOptions(
        model=model,
        backends=_names(backends),
        steps=parse_steps(steps) or (),
        sizes=parse_sizes(sizes) or (),
        batches=parse_steps(batch) or (1,),
        decoders=_names(decoder),
        against=_names(against),
        pythons=pythons_of(python or ()),
        teacher=parse_steps(teacher or None) or (),
        energy=energy,
        rounds=rounds,
        folder=folder,
    )
    _show(bench_latency(output, options, progress()), output)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@bench.command(
    "report",
    epilog=examples("bench report kernels.json notes.md", "bench report docs/results/serve.json docs/results/serve.md"),
)
def bench_report_command(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="A record that a bench command wrote.")],
    into: Annotated[Path, typer.Argument(metavar="FILE", help="The Markdown file whose table is replaced.")],
    marker: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the comments in FILE around the table, bench:NAME and /bench; by default the record's name.",
        ),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="RECORD", help="A further record for the same table and plot; may be repeated."),
    ] = None,
    any_machine: Annotated[bool, flag("--any-machine", help="Also records of different machines.")] = False,
) -> None:
    """Write a record's table into a Markdown file, and its plot beside the record; of a study or an evaluation the tables, and
    with a record of `bench latency` the plot of quality against time."""
    needs("bench", "matplotlib")
    from ..benchmarks.quality.plots import against_time, plot_against_time
    from ..benchmarks.quality.tables import quality_as_markdown, read_quality
    from ..benchmarks.records import joined, plot, put_between, update_table_in
    from ..benchmarks.schema import read_record

    further = [read_record(path) for path in also or ()]
    if (quality := read_quality(record)) is not None:
        lines = against_time(quality, joined(further, any_machine=any_machine)) if further else None
        put_between(into, quality_as_markdown(quality), marker or record.stem)
        say(f"wrote the tables in {into}")
        if lines:
            picture = record.with_name(f"{record.stem}_time.png")
            plot_against_time(lines, picture)
            say(f"wrote {picture}")
        return
    found = joined([read_record(record), *further], any_machine=any_machine)
    update_table_in(into, found, marker or record.stem)
    plot(found, record.with_suffix(".png"))
    say(f"wrote the table in {into} and {record.with_suffix('.png')}")


def _show(record: Record, output: Path) -> None:
    from rich.console import Console

    from ..benchmarks.records import as_rich

    Console().print(as_rich(record))
    say(f"{output}.json\n{output}.png")
