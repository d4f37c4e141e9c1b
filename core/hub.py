"""Folders by the name they have on the Hugging Face hub."""

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from .errors import ArtifactError, missing_extra

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLED = ("*pytorch_model*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5")  # never read here, so never fetched


def local_folder(name: str | Path, *, ignore: Sequence[str] = ()) -> Path:
    """The folder of that path; a hub id ("owner/name", where no such folder is) is downloaded into the hub's cache.

    ignore: patterns of further files that are not needed. Raises ArtifactError, MissingExtraError.
    """
    folder = Path(name)
    if folder.exists() or not HUB_ID.fullmatch(str(name)):
        return folder
    try:
        hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
    except ImportError:
        raise missing_extra("huggingface_hub", "cpu") from None
    known = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError)
    try:
        return Path(hub.snapshot_download(str(name), ignore_patterns=[*PICKLED, *ignore]))
    except known as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"{name} is no folder here and could not be fetched from the Hugging Face hub ({reason}); check the path"
        ) from None
