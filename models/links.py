"""Links to the weights of a network or a LoRA, in the place of a file of a diffusers folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..core.errors import ArtifactError
from ..folders.hub import PICKLED
from ..folders.manifests import LORA_FILE
from .files import PIECE, WEIGHTS, missing_pieces, pieces_of

HALF_VARIANT = ".fp16"
NETWORK_FILE = f"{WEIGHTS['diffusers']}.safetensors"
USUAL = (LORA_FILE, NETWORK_FILE, "adapter_model.safetensors", f"{WEIGHTS['diffusers']}{HALF_VARIANT}.safetensors")


def link(source: Path, target: Path) -> None:
    """A symbolic link, or where there are none a hard link or a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    for way in (os.symlink, os.link, shutil.copyfile):
        try:
            way(source, target)
            return
        except OSError:
            continue
    raise ArtifactError(f"cannot link or copy {source} to {target}")


def link_network(place: Path, folder: Path) -> None:
    """A network's weights as diffusers calls them: the file that `place` is or holds, or an index and all of its pieces."""
    for index in sorted(place.glob("*.safetensors.index*.json"), key=lambda path: len(path.name)):  # full ones first
        pieces = pieces_of(index)
        if pieces and all(piece.parent == place and piece.is_file() for piece in pieces):
            for piece in pieces:
                link(piece, folder / piece.name)
            link(index, folder / f"{NETWORK_FILE}.index.json")
            return
    link(weights_file(place), folder / NETWORK_FILE)


def weights_file(place: Path) -> Path:
    """The safetensors file that `place` is, or the one that it holds. Raises ArtifactError for a piece of several and a choice."""
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ArtifactError(
                f"{place} is a pickle, which is not read; convert it to .safetensors with diffusers first"
            )
        if PIECE.search(place.name):
            raise ArtifactError(
                f"{place} is one piece of several; give the path of its folder, with all and their index"
            )
        return place
    if usual := [place / name for name in USUAL if (place / name).is_file()]:
        return usual[0]
    files = sorted(path for path in place.glob("*.safetensors") if not PIECE.search(path.name))
    if len(files) > 1:
        raise ArtifactError(f"{place} holds {', '.join(path.name for path in files)}; give the path of one")
    if not files:
        raise ArtifactError(_no_file(place))
    return files[0]


def _no_file(place: Path) -> str:
    for index in sorted(place.glob("*.safetensors.index*.json")):
        if missing := missing_pieces(index):
            return f"{place} lacks {missing[0]}, which {index.name} lists; put it there"
    if piece := next(iter(sorted(place.glob("*.safetensors"))), None):
        return f"{place} holds {piece.name}, one piece of several, and no index of all; put {NETWORK_FILE}.index.json there"
    pickled = any(path for pattern in PICKLED for path in place.glob(pattern))
    more = ": only pickles, which are not read; convert them with diffusers first" if pickled else ""
    return f"{place} holds no .safetensors file{more}"
