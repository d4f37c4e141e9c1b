"""`imagine-flash inspect`: what a folder holds, and what the gate measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ImagineFlashError, ParityError
from .common import flag, say

if TYPE_CHECKING:
    from ..folders.manifests import ArtifactManifest


def inspect_command(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="An artifact or a student folder; by default the embedded model."),
    ] = None,
    run: Annotated[
        bool, flag("--run", help="Draw the artifact's reference pictures here and compare them with torch's.")
    ] = False,
    json_: Annotated[bool, flag("--json", help="The whole manifest as JSON.")] = False,
) -> None:
    """Say what a folder holds; of an artifact, after checking the hash of every file."""
    from ..folders.files import STUDENT_FILE
    from ..folders.reading import read_artifact_manifest, read_student_manifest

    if folder is None:
        from ..engine.loading import embedded_folder

        folder = embedded_folder()
    if (folder / STUDENT_FILE).is_file():
        if run:
            raise ImagineFlashError(
                f"{folder} is a student; --run draws with an artifact: imagine-flash export {folder} OUT"
            )
        student = read_student_manifest(folder)
        if json_:
            typer.echo(student.model_dump_json(indent=1))
            return
        for field, value in student.model_dump(mode="json", exclude={"recipe"}).items():
            say(f"{field}: {value}")
        return
    if run and json_:
        raise ImagineFlashError("--run and --json are two results; give one of them at a time")
    manifest = read_artifact_manifest(folder)
    if json_:
        typer.echo(manifest.model_dump_json(indent=1))
        return
    hidden = {"vocabulary", "files", "graphs", "tokenizers", "scheduler", "parity", "references"}
    for field, value in manifest.model_dump(mode="json", exclude=hidden).items():
        say(f"{field}: {value}")
    _print_words(manifest)
    _print_graphs(manifest)
    print_parity(manifest)
    if run:
        _verify(folder)


def _print_words(manifest: ArtifactManifest) -> None:
    """What a model with a known vocabulary draws."""
    known = sorted({word for tokenizer in manifest.tokenizers for word in tokenizer.known_words})
    for group, words in manifest.vocabulary.items():
        say(f"draws {group}: {', '.join(words)}")
    if known:
        say(f"knows {len(known)} words: {' '.join(known)}")


def _print_graphs(manifest: ArtifactManifest) -> None:
    for name, graph in manifest.graphs.items():
        takes = ", ".join(f"{t.name} {t.dtype} {t.shape}" for t in graph.inputs)
        gives = ", ".join(f"{t.name} {t.dtype} {t.shape}" for t in graph.outputs)
        say(f"{name}: {graph.file} (opset {graph.opset}) {takes} -> {gives}")
        if graph.islands and not name.startswith("sampler"):
            say(f"  in float32: {', '.join(graph.islands)}")


def print_parity(manifest: ArtifactManifest, *, stderr: bool = False) -> None:
    """What the gate measured, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="against torch")
    table.add_column("graph", no_wrap=True)
    for heading in ("tensors: largest error", "RMS", "images: levels", "PSNR, dB"):
        table.add_column(heading, justify="right")
    for name, errors in manifest.parity.items():
        tensors = [v for kind, v in errors.items() if not kind.endswith("_rms") and kind not in ("images", "psnr")]
        rms = [value for kind, value in errors.items() if kind.endswith("_rms")]
        row = [f"{max(tensors):.2g}" if tensors else "", f"{max(rms):.2g}" if rms else ""]
        row += [
            f"{errors['images']:g}" if "images" in errors else "",
            f"{errors['psnr']:.1f}" if "psnr" in errors else "",
        ]
        table.add_row(name, *row)
    Console(stderr=stderr).print(table)


def _verify(folder: Path) -> None:
    from ..engine import Engine
    from ..folders.reading import read_artifact_manifest

    failed: list[Any] = []
    for found in Engine.load(folder, precision=read_artifact_manifest(folder).precision).verify():
        reference = found.reference
        say(
            f"{'ok  ' if found.passed else 'FAIL'} {reference.prompt!r}, seed {reference.seed}, {reference.steps} steps, "
            f"{reference.size[1]}x{reference.size[0]}: PSNR {found.psnr:.1f} dB, largest difference {found.levels} of 255"
        )
        failed += [] if found.passed else [reference]
    if failed:
        raise ParityError(f"{len(failed)} of the reference pictures of {folder} are drawn differently here")
