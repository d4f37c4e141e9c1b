"""`imagine-flash export`: a student folder becomes an artifact folder, or nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer

from ..core.artifact import (
    ARTIFACT_FILE,
    ArtifactManifest,
    GraphSpec,
    StudentManifest,
    TokenizerSpec,
    atomic_folder,
    hash_files,
    hash_folder,
    read_student_manifest,
    write_manifest,
)
from ..core.plan import plans_by_steps
from ..core.schedule import NoiseSchedule
from ..core.update import UpdateTable, update_table
from .onnx import OPSET, export_stages, save_graph
from .parity import check_parity
from .sampler_graph import sampler_graph
from .stages import Stages, load_stages
from .weights import WEIGHTS_FILE, WeightStore

TOKENIZER_FILE = "tokenizer.json"
VERSIONED = ("imagine-flash", "torch", "diffusers", "transformers", "onnx", "onnxscript")
END_OF_WORD = "</w>"


def export_student(
    student: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    opset: int = OPSET,
    progress: Callable[[str], None] = lambda stage: None,
) -> ArtifactManifest:
    """Exports a student folder to the artifact folder `out` and returns its manifest.

    Writes text_encoder, denoiser, decoder and sampler_N graphs (ONNX), weights.bin, tokenizer.json and manifest.json in
    one rename, after every graph agreed with torch; an artifact that was at `out` stays whole until then. name: what the
    model is called, by default the student folder's name. progress is told what is being done. Raises ArtifactError,
    ParityError, ScheduleError, MissingExtraError.
    """
    student = Path(student)
    described = read_student_manifest(student)
    with atomic_folder(out, replaces=(ARTIFACT_FILE,)) as folder, torch.inference_mode():
        progress("loading the student")
        stages = load_stages(student)
        tables, schedule = _update_tables(described, stages)
        progress("writing the graphs")
        graphs = _write_graphs(folder, stages, tables, schedule, opset)
        vocabulary = write_tokenizer(folder / TOKENIZER_FILE, stages)
        manifest = ArtifactManifest(
            name=name or student.resolve().name,
            created_with={package: version(package) for package in VERSIONED}
            | {"onnxruntime": onnxruntime.__version__},
            prediction_type=stages.prediction_type,  # type: ignore[arg-type]  (pydantic checks it)
            scheduler=_plain(stages.scheduler),
            plans={n: [int(t) for t in table.timesteps] for n, table in tables.items()},
            noise_correction=described.noise_correction,
            latent_shape=list(stages.latent_shape),
            image_size=list(stages.image_size),
            scaling_factor=stages.decoder.scaling_factor,
            tokenizer=TokenizerSpec(
                file=TOKENIZER_FILE, context_length=stages.context_length, known_words=described.known_words
            ),
            graphs=graphs,
            files=hash_files(folder),
            parity={},
            student_sha256=hash_folder(student),
        )
        progress("comparing with torch")
        errors = check_parity(folder, manifest, stages, parity_prompts(vocabulary))
        manifest = manifest.model_copy(update={"parity": errors})
        write_manifest(folder, manifest)
    return manifest


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """What a CLIP vocabulary holds as one token: its entries ending in </w>, without single characters but "a"."""
    words = {entry.removesuffix(END_OF_WORD) for entry in tokenizer.get_vocab() if entry.endswith(END_OF_WORD)}
    return sorted(word for word in words if len(word) > 1 or word == "a")


def write_tokenizer(path: Path, stages: Stages) -> list[str]:
    """Writes a tokenizer.json that pads to the context and never truncates; returns its whole words."""
    source = stages.tokenizer
    tokenizer = Tokenizer.from_str(source.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=stages.context_length, pad_id=source.pad_token_id, pad_token=str(source.pad_token))
    tokenizer.save(str(path), pretty=False)
    return whole_words(tokenizer)


def parity_prompts(words: list[str]) -> list[str]:
    """Three prompts of 1, 4 and 8 of the words (or "a" where there are none), always the same for one vocabulary."""
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(words or ["a"], size)) for size in (1, 4, 8)]


def _write_graphs(
    folder: Path, stages: Stages, tables: dict[int, UpdateTable], schedule: NoiseSchedule, opset: int
) -> dict[str, GraphSpec]:
    graphs = export_stages(stages, WeightStore(folder / WEIGHTS_FILE), opset=opset)
    for steps, table in tables.items():
        graphs[f"sampler_{steps}"] = sampler_graph(graphs, table, schedule.network_time(table.timesteps))
    return {name: save_graph(graph, folder / f"{name}.onnx") for name, graph in graphs.items()}


def _update_tables(student: StudentManifest, stages: Stages) -> tuple[dict[int, UpdateTable], NoiseSchedule]:
    schedule = NoiseSchedule.from_scheduler_config(stages.scheduler)
    plans = plans_by_steps(student.plans, schedule.num_train_timesteps)
    correct, kind = student.noise_correction, stages.prediction_type
    return {n: update_table(schedule, p, kind, noise_correction=correct) for n, p in plans.items()}, schedule


def _plain(config: dict) -> dict:
    """The scheduler config without private keys (but for the class name), which may hold paths."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
