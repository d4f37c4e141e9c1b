"""`imagine-flash push`: an artifact on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Quiet, flag, note, say


def push_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An exported model.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="What it is called on the hub.")],
    private: Annotated[bool, flag("--private", help="Of a repository that is made: seen by its owner alone.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Instead of main; it must exist.")] = None,
    dry_run: Annotated[bool, flag("--dry-run", help="Print the model card and upload nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Upload an artifact to the Hugging Face hub, with a model card; log in first with: hf auth login."""
    from ..folders.publish import model_card, push_to_hub
    from ..folders.reading import read_artifact_manifest

    if dry_run:
        say(model_card(read_artifact_manifest(artifact), name))
        return
    say(push_to_hub(artifact, name, private=private, revision=revision))
    note(f"next: imagine-flash generate PROMPT --model {name}")
