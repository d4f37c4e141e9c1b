"""A model that somebody else trained as a student folder: links to its files, and an imagine_flash.json that describes it.

Everything that takes a student then takes it: the export, the torch backends, `inspect`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ArtifactError
from ..folders.files import ARTIFACT_FILE, STUDENT_FILE, atomic_folder, cache_folder
from ..folders.hub import local_folder
from ..folders.manifests import LORA_FILE, PEFT_CONFIG, PIPELINE_FILE, SCHEDULER_FILE, StudentManifest
from ..folders.reading import read_config, write_manifest
from .catalogue import find
from .control import PARTS, control_class
from .describe import NONE, Described, describe
from .files import NETWORKS, PIECE, TOLD, UNDRAWN, WEIGHTS, missing_files, missing_pieces, pipeline_files
from .links import HALF_VARIANT, link, link_network, weights_file
from .options import ModelOptions

UNUSED = ("*.onnx*", "*.bin", "*openvino_*", "*.jpg", "*.png", *(f"{part}/*" for part in UNDRAWN))
FULL = tuple(f"*/{stem}{rest}.safetensors" for stem in WEIGHTS.values() for rest in ("", "-*-of-*"))
LAYOUT = 3  # of the links: students that were made in another one are made anew
NON_EMA = "*.non_ema.safetensors"
FOREIGN = {  # fields of ModelOptions that say what a model of ours says itself, and their options
    "entry": "--as",
    "timesteps": "--timesteps",
    "sampler": "--sampler",
    "prediction": "--prediction",
    "any_steps": "--any-steps",
    "guidance": "--guidance",
}


def student_of(model: str | Path, options: ModelOptions | None = None) -> Path:
    """The folder of a student: `model` itself where it is one or an artifact, else one made of links, in the cache.

    model: a folder, a hub id or a name of the catalogue. Raises ArtifactError, PlanError, ScheduleError, MissingExtraError.
    """
    options, folder = options or ModelOptions(), Path(model)
    if not folder.exists() and find(str(model)) is None:
        folder = _fetch_unknown(str(model))
    if _is_ours(folder) and options.tiny_decoder in (None, NONE) and options.controlnet is None:
        check_left_out(options, str(model))
        return folder
    if (folder / ARTIFACT_FILE).is_file():
        what, option = ("decoder", "tiny-decoder") if options.controlnet is None else ("networks", "controlnet")
        raise ArtifactError(f"{folder} was exported with its {what}; export its student again with --{option}")
    return write_student(describe(model, options, fetch=_fetch))


def check_left_out(options: ModelOptions, name: str) -> None:
    """Raises ArtifactError for what would be ignored, since the model called `name` says itself how it is sampled."""
    for field, option in FOREIGN.items():
        value = getattr(options, field)
        if value is None or value is False:
            continue
        typed = "" if value is True else f" {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        raise ArtifactError(
            f"{option}{typed}: {name} says itself how it is sampled; leave the option out, it is for models without {STUDENT_FILE}"
        )


def _is_ours(folder: Path) -> bool:
    return (folder / STUDENT_FILE).is_file() or (folder / ARTIFACT_FILE).is_file()


def write_student(described: Described) -> Path:
    """The student folder of a description, named by its content, so that the same is made once. Raises ArtifactError."""
    places = [described.folder, described.network, described.lora, described.decoder, described.control]
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
        path
        for place in places
        if place is not None
        for path in (place, place.with_name(PEFT_CONFIG), *place.rglob("*"))
        if path.is_file()
    )
    signature = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = json.dumps([LAYOUT, named, signature, described.scheduler, manifest.model_dump(mode="json")], sort_keys=True)
    parent = _made()
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / hashlib.sha256(key.encode()).hexdigest()[:16] / described.name
    if (target / STUDENT_FILE).is_file():
        return target
    target.parent.mkdir(exist_ok=True)
    with atomic_folder(target) as temporary:
        pipeline = temporary if described.lora is None else temporary / PIPELINE_FOLDER
        _link_pipeline(described, pipeline)
        if described.lora is not None:
            _link_lora(weights_file(described.lora), temporary)
        write_manifest(temporary, manifest)
    return target


def _made() -> Path:
    """Where the folders are that `write_student` makes."""
    return cache_folder("students") or Path(tempfile.gettempdir()) / "imagine-flash-students"


def is_made(student: Path) -> bool:
    """Whether the folder is one that was made of another's model, and not a student of its own."""
    return student.is_relative_to(_made())


PIPELINE_FOLDER = "pipeline"  # of a LoRA's base, beside the LoRA


def _link_lora(file: Path, target: Path) -> None:
    """The weights, and of peft's the config beside them, which says how strong they are."""
    link(file, target / LORA_FILE)
    if (config := file.parent / PEFT_CONFIG).is_file():
        link(config, target / PEFT_CONFIG)


def _link_pipeline(described: Described, target: Path) -> None:
    """Links to every file of the pipeline, with the scheduler's config and the denoiser's weights that are described."""
    for path in sorted(described.folder.rglob("*")):
        name = path.relative_to(described.folder)
        if not path.is_file() or name.as_posix() == SCHEDULER_FILE or any(part.startswith(".") for part in name.parts):
            continue
        if described.network is not None and name.parts[0] in NETWORKS and name.suffix != ".json":
            continue
        if (len(name.parts) > 1 or name.suffix == ".json") and _is_whole(path):
            link(path, target / name)
            if HALF_VARIANT in name.name and not PIECE.search(name.name):  # pieces are found by their index
                full = name.name.replace(HALF_VARIANT, "", 1)
                file = f"{full.partition('.safetensors')[0]}.safetensors"
                if not any(_is_whole(path.with_name(other)) for other in (full, file, f"{file}.index.json")):
                    link(path, (target / name).with_name(full))  # half the precision is all there is
    _write_scheduler(described, target)
    if described.network is not None:
        _replace_network(described.network, target)
    if described.decoder is not None:
        _replace_decoder(described.decoder, target)
    if described.control is not None:
        _add_control(described.control, described.pipeline, target)


def _is_whole(path: Path) -> bool:
    """Whether the file is there and, of an index of weights, what it lists: of several precisions one is fetched."""
    return path.is_file() and not (".safetensors.index" in path.name and missing_pieces(path))


def _write_scheduler(described: Described, target: Path) -> None:
    scheduler = target / SCHEDULER_FILE
    scheduler.parent.mkdir(parents=True, exist_ok=True)
    values = {**described.scheduler}
    if described.prediction_type != "flow":
        values["prediction_type"] = described.prediction_type
    scheduler.write_text(json.dumps(values, indent=2), encoding="utf-8")
    _set_classes(target, scheduler=values["_class_name"])


def _set_classes(target: Path, pipeline: str | None = None, **parts: str | None) -> None:
    """Which classes of diffusers the pipeline and its components are, None for one that goes; in a file of its own instead of
    a link."""
    index = target / PIPELINE_FILE
    changed: dict[str, Any] = {part: ["diffusers", name] for part, name in parts.items() if name is not None}
    kept = {key: value for key, value in read_config(index).items() if key not in parts}
    values = kept | changed | ({} if pipeline is None else {"_class_name": pipeline})
    index.unlink()
    index.write_text(json.dumps(values, indent=2), encoding="utf-8")


def _replace_decoder(place: Path, target: Path) -> None:
    shutil.rmtree(target / "vae", ignore_errors=True)
    link(place / "config.json", target / "vae" / "config.json")
    link_network(place, target / "vae")
    _set_classes(target, vae="AutoencoderTiny")


def _add_control(place: Path, pipeline: str, target: Path) -> None:
    """A ControlNet or T2I-adapter as the component that diffusers' class of such pipelines has; the one that was there goes."""
    kind = control_class(place)
    for part in PARTS.values():
        shutil.rmtree(target / part, ignore_errors=True)
    link(place / "config.json", target / PARTS[kind] / "config.json")
    link_network(place, target / PARTS[kind])
    _set_classes(target, pipeline, **(dict.fromkeys(PARTS.values()) | {PARTS[kind]: kind}))


def _replace_network(place: Path, target: Path) -> None:
    """The denoiser's weights, and its config where there is one, such as of a network that is told a guidance scale."""
    network = next((target / name for name in NETWORKS if (target / name).is_dir()), None)
    if network is None:
        raise ArtifactError(f"{target.name} has no {' or '.join(NETWORKS)} whose weights could be replaced")
    if (place / "config.json").is_file():
        (network / "config.json").unlink()
        link(place / "config.json", network / "config.json")
    for index_file in network.glob("*.index*.json"):
        index_file.unlink()
    link_network(place, network)


def _fetch(name: str, file: str | None = None, *, without: Sequence[str] = (), network: bool = False) -> Path:
    """The folder of a hub id, or a file of it, with the weights that are drawn with; a path stays what it is. Of weights in
    several precisions half, as the cards load them, and full ones for the components that have no other."""
    if file is not None:
        folder = local_folder(name, only=[file, Path(file).with_name(PEFT_CONFIG).as_posix()])
        if not (folder / file).is_file():
            raise ArtifactError(f"{name} has no file {file}; it may have been renamed there")
        return folder / file
    only = pipeline_files(local_folder(name, only=TOLD))
    if network and only is None:
        folder = local_folder(name, only=("config.json", f"*{HALF_VARIANT}.safetensors"))
        return folder if any(folder.glob("*.safetensors")) else local_folder(name, ignore=UNUSED)
    unused = (*UNUSED, *(f"{part}/*.safetensors" for part in without))
    folder = local_folder(name, ignore=(*unused, *FULL, NON_EMA), only=only)
    missing = {path.partition("/")[0] for path in missing_files(folder, without=without)}
    if missing and folder != Path(name):
        there = (f"{part.name}/*.safetensors" for part in folder.iterdir() if part.name not in missing)
        folder = local_folder(name, ignore=(*unused, f"*{HALF_VARIANT}*", NON_EMA, *there), only=only)
    return folder


def _fetch_unknown(name: str) -> Path:
    """The folder of a hub id that the catalogue does not have: all of an artifact, of a pipeline what is drawn with."""
    told = local_folder(name, only=TOLD)
    return _fetch(name) if any((told / file).is_file() for file in TOLD) else local_folder(name)
