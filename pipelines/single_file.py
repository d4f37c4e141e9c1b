"""Whole pipelines in one .safetensors file, as the communities share them, unpacked once into a diffusers folder in the cache."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from ..core.errors import ArtifactError, missing_extra
from ..folders.cache import check_room
from ..folders.files import atomic_folder, cache_folder
from ..folders.hub import local_folder
from ..folders.manifests import PIPELINE_FILE
from ..folders.reading import read_config
from ..models.catalogue import entry_called
from .architectures import architecture_of
from .half import dtype_of
from .loading import first_line
from .stages import quiet

CONFIGS = ("*.json", "*/*.json", "*/*.txt", "*/*.model")  # of a repository: all but weights


def unpacked(model: str | Path, *, base: str | None = None, entry: str | None = None) -> Path | str:
    """The diffusers folder of a single file, made by diffusers' from_single_file if the cache does not have it; a model that is
    no such file stays what it is.

    base: a folder or hub id of the pipeline that the networks belong to, whose configs are read; by default that of the
    catalogue's entry. Raises ArtifactError, MissingExtraError.
    """
    file, known = Path(model), None if entry is None else entry_called(entry)
    if not file.is_file() or (known is not None and known.weights != "pipeline"):
        if base is not None:
            raise ArtifactError(f"--base goes with a single .safetensors file of a whole pipeline, not with {model}")
        return model
    if file.suffix != ".safetensors":
        raise ArtifactError(
            f"{file} is neither a folder nor a .safetensors file; pickles are not read, convert one that you trust with diffusers"
        )
    if base is None and known is None:
        raise ArtifactError(
            f"{file} does not say which pipeline it is: add --base stable-diffusion-v1-5/stable-diffusion-v1-5, another hub id or "
            "a folder with its configs, or --as and a name of the catalogue; of one network's weights too"
        )
    config = local_folder(base or (known.pipeline_id if known else ""), only=CONFIGS)
    return _folder_of(file, config)


def _folder_of(file: Path, config: Path) -> Path:
    if not (config / PIPELINE_FILE).is_file():
        raise ArtifactError(f"{config} is no diffusers pipeline: {PIPELINE_FILE} is missing")
    index = read_config(config / PIPELINE_FILE)
    name = str(index.get("_class_name"))
    architecture_of(name)
    there = file.stat()
    key = json.dumps(
        [str(file.resolve()), there.st_size, there.st_mtime_ns, str(config.resolve()), index], sort_keys=True
    )
    parent = cache_folder("checkpoints") or Path(tempfile.gettempdir()) / "imagine-flash-checkpoints"
    target = parent / hashlib.sha256(key.encode()).hexdigest()[:16] / file.stem
    if (target / PIPELINE_FILE).is_file():
        return target
    check_room(target, int(1.1 * there.st_size), f"unpacking {file}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target, replaces=(PIPELINE_FILE,)) as temporary:  # another process may have been faster
        _load(file, config, name).save_pretrained(temporary, safe_serialization=True)
    return target


def _load(file: Path, config: Path, name: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise missing_extra("diffusers", "export") from None
    unused: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    unused = unused if name == "StableDiffusionPipeline" else {}
    try:
        with quiet():
            return getattr(diffusers, name).from_single_file(
                str(file), config=str(config), local_files_only=True, dtype=dtype_of([file]), **unused
            )
    except Exception as error:  # whatever a file of something else makes the libraries raise
        raise ArtifactError(
            f"{file} does not load as a {name} with the configs of {config}: {first_line(error)}"
        ) from error
