"""A model that somebody else trained as a student folder: links to its files, and an imagine_flash.json that describes it.

Everything that takes a student then takes it: the export, the torch backends, `inspect`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..core.errors import ArtifactError
from ..folders.files import ARTIFACT_FILE, STUDENT_FILE, atomic_folder, cache_folder
from ..folders.hub import PICKLED, local_folder
from ..folders.manifests import LORA_FILE, PIPELINE_FILE, StudentManifest
from ..folders.reading import write_manifest
from .catalogue import catalogue, find
from .describe import SCHEDULER_FILE, Described, ModelOptions, describe

UNUSED = ("*.onnx*", "*.bin", "*openvino_*", "*.jpg", "*.png", "safety_checker/*", "feature_extractor/*")
PIPELINE_FILES = ("*.json", "*/*.safetensors", "*/*.txt", "*/*.model")  # not whole checkpoints at the top
VARIANTS = ("*.fp16.safetensors", "*.fp16-*.safetensors", "*.non_ema.safetensors")
NETWORKS = ("unet", "transformer")


def student_of(model: str | Path, options: ModelOptions | None = None) -> Path:
    """The folder of a student: `model` itself where it is one or an artifact, else one made of links, in the cache.

    model: a folder, a hub id or a name of the catalogue. Raises ArtifactError, PlanError, ScheduleError, MissingExtraError.
    """
    options, folder = options or ModelOptions(), Path(model)
    if _is_ours(folder):
        return folder
    if not folder.exists() and find(str(model)) is None and options == ModelOptions():
        folder = _fetch(str(model), None)
        if _is_ours(folder):
            return folder
    return write_student(describe(model, options, fetch=_fetch))


def _is_ours(folder: Path) -> bool:
    return (folder / STUDENT_FILE).is_file() or (folder / ARTIFACT_FILE).is_file()


def write_student(described: Described) -> Path:
    """The student folder of a description, named by its content, so that the same is made once. Raises ArtifactError."""
    places = [described.folder, described.network, described.lora]
    named = [str(place.resolve()) for place in places if place is not None]
    manifest = StudentManifest(
        plans=described.plans,
        noise_correction=described.noise_correction,
        sampler=described.sampler,
        guidance=described.guidance,
        default_steps=described.default_steps,
        sources=described.sources,
        recipe={},
        teacher_sha256="",
        base=None if described.lora is None else PIPELINE_FOLDER,
        known_words=described.known_words,
        vocabulary=described.vocabulary,
    )
    files = sorted(
        path for place in places if place is not None for path in (place, *place.rglob("*")) if path.is_file()
    )
    signature = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = json.dumps([named, signature, described.scheduler, manifest.model_dump(mode="json")], sort_keys=True)
    parent = cache_folder("students") or Path(tempfile.gettempdir()) / "imagine-flash-students"
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / hashlib.sha256(key.encode()).hexdigest()[:16] / described.name
    if (target / STUDENT_FILE).is_file():
        return target
    target.parent.mkdir(exist_ok=True)
    with atomic_folder(target) as temporary:
        pipeline = temporary if described.lora is None else temporary / PIPELINE_FOLDER
        _link_pipeline(described, pipeline)
        if described.lora is not None:
            _link(_safetensors(described.lora), temporary / LORA_FILE)
        write_manifest(temporary, manifest)
    return target


PIPELINE_FOLDER = "pipeline"  # of a LoRA's base, beside the LoRA


def _link_pipeline(described: Described, target: Path) -> None:
    """Links to every file of the pipeline, with the scheduler's config and the denoiser's weights that are described."""
    for path in sorted(described.folder.rglob("*")):
        name = path.relative_to(described.folder)
        if not path.is_file() or name.as_posix() == SCHEDULER_FILE or any(part.startswith(".") for part in name.parts):
            continue
        if described.network is not None and name.parts[0] in NETWORKS and name.suffix != ".json":
            continue
        if len(name.parts) > 1 or name.suffix == ".json":
            _link(path, target / name)
    scheduler = target / SCHEDULER_FILE
    scheduler.parent.mkdir(parents=True, exist_ok=True)
    values = {**described.scheduler}
    if described.prediction_type != "flow":
        values["prediction_type"] = described.prediction_type
    scheduler.write_text(json.dumps(values, indent=2), encoding="utf-8")
    index = json.loads((target / PIPELINE_FILE).read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", values["_class_name"]]
    (target / PIPELINE_FILE).unlink()
    (target / PIPELINE_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    if described.network is not None:
        network = next((target / name for name in NETWORKS if (target / name).is_dir()), None)
        if network is None:
            raise ArtifactError(f"{described.folder} has no {' or '.join(NETWORKS)} whose weights could be replaced")
        config = described.network / "config.json"
        if config.is_file():  # the network's own, such as one that is told a guidance scale
            (network / "config.json").unlink()
            _link(config, network / "config.json")
        for index_file in network.glob("*.index.json"):
            index_file.unlink()
        _link(_safetensors(described.network), network / "diffusion_pytorch_model.safetensors")


def _safetensors(place: Path) -> Path:
    """The one safetensors file there. Raises ArtifactError."""
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ArtifactError(
                f"{place} is a pickle, which is not read; convert it to .safetensors with diffusers first"
            )
        return place
    known = [LORA_FILE, "diffusion_pytorch_model.safetensors", "adapter_model.safetensors"]
    files = [place / name for name in known if (place / name).is_file()] or sorted(place.glob("*.safetensors"))
    if not files:
        pickled = any(path for pattern in PICKLED for path in place.glob(pattern))
        more = ": only pickles, which are not read; convert them with diffusers first" if pickled else ""
        raise ArtifactError(f"{place} holds no .safetensors file{more}")
    return files[0]


def _link(source: Path, target: Path) -> None:
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


def _fetch(name: str, file: str | None) -> Path:
    """The folder of a hub id, or a file of it; a path stays what it is."""
    if file is None:
        return local_folder(name, ignore=(*UNUSED, *VARIANTS), only=PIPELINE_FILES if find_base(name) else None)
    folder = local_folder(name, only=[file])
    if not (folder / file).is_file():
        raise ArtifactError(f"{name} has no file {file}; it may have been renamed there")
    return folder / file


def find_base(name: str) -> bool:
    """Whether the catalogue knows it as a pipeline."""
    return any(entry.pipeline_id == name for entry in catalogue().values())


def taken_from(manifest: StudentManifest | Any) -> list[str]:
    """A line for everything that was taken from somewhere."""
    return [f"{field}: {source}" for field, source in manifest.sources.items()]
