"""What several tests do to an artifact that was exported for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagine_flash.folders.files import hash_files
from imagine_flash.folders.manifests import ArtifactManifest
from imagine_flash.folders.reading import read_artifact_manifest, write_manifest


def with_format(folder: Path, name: str, write: Callable[[Path, ArtifactManifest], dict[str, Any]]) -> ArtifactManifest:
    """Adds a further format to the artifact in `folder`, as an export that was asked for it does; returns its manifest."""
    manifest = read_artifact_manifest(folder)
    formats = {**manifest.formats, name: write(folder, manifest)}
    write_manifest(folder, manifest.model_copy(update={"formats": formats, "files": hash_files(folder)}))
    return read_artifact_manifest(folder)
