"""What an engine is told of a student folder that it draws with as it is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core.errors import ArtifactError
from ..folders.manifests import STUDENT_BATCHES, ModelDescription, Size, StudentManifest, TokenizerSpec
from ..folders.reading import first_problem
from .stages import Stages


def describe_student(
    folder: Path,
    student: StudentManifest,
    stages: Stages,
    precision: str,
    sizes: Sequence[Size],
    tokenizers: Sequence[TokenizerSpec],
) -> ModelDescription:
    """A student as the engine knows it. sizes: height and width of the pictures, the default first.

    Raises ArtifactError for plans that the schedule does not have.
    """
    known: dict[str, Any] = {
        "format": student.format,
        "name": folder.resolve().name,
        "pipeline": stages.pipeline,
        "precision": precision,
        "created_with": {package: version(package) for package in ("torch", "diffusers", "transformers")},
        "prediction_type": stages.prediction_type,
        "scheduler": stages.scheduler,
        "plans": student.plans,
        "noise_correction": student.noise_correction,
        "sampler": student.sampler,
        "guidance": stages.guidance(student.guidance),
        "default_steps": student.default_steps,
        "sources": student.sources,
        "latent_channels": stages.latent_channels,
        "downscale": stages.downscale,
        "sizes": list(sizes),
        "batch": STUDENT_BATCHES,
        "scaling_factor": stages.decoder.scaling_factor,
        "vocabulary": student.vocabulary,
        "tokenizers": list(tokenizers),
        "control": stages.control,
    }
    try:
        return ModelDescription(**known)
    except ValidationError as error:
        raise ArtifactError(f"{folder}: {first_problem(error, known)}") from None
