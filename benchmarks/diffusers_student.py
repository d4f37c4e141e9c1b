"""What people draw a student with today: diffusers' pipeline in eager torch, with this project's scheduler."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ImagineFlashError
from ..core.noise import initial_noise
from ..engine import GenerateRequest
from ..folders.files import hash_folder
from ..folders.manifests import ArtifactManifest
from ..folders.reading import read_student_manifest

NAME = "diffusers, torch eager"


def student_of(folder: Path, manifest: ArtifactManifest) -> Path:
    """The folder `student` beside an artifact, if that is what it was exported from. Raises ImagineFlashError: why not."""
    for package in ("torch", "diffusers", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImagineFlashError(f"{package} is not installed")
    student = folder.resolve().parent / "student"
    if manifest.pipeline != "StableDiffusionPipeline":
        raise ImagineFlashError(
            f"this benchmark draws with a StableDiffusionPipeline, the model has {manifest.pipeline}"
        )
    if not student.is_dir() or hash_folder(student) != manifest.student_sha256:
        raise ImagineFlashError("the artifact's student is not in the folder 'student' beside it")
    return student


def pipeline_of(student: Path) -> Any:
    """The student's pipeline in float32 on the CPU, with the sampler that it was distilled for."""
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar as quiet_loading
    from transformers.utils.logging import disable_progress_bar as quiet_weights

    from ..pipelines.scheduler import ImagineFlashScheduler

    quiet_loading()
    quiet_weights()
    pipeline: Any = StableDiffusionPipeline.from_pretrained(student, dtype=torch.float32)
    correction = read_student_manifest(student).noise_correction
    pipeline.scheduler = ImagineFlashScheduler.from_config(pipeline.scheduler.config, noise_correction=correction)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture_of(request: GenerateRequest, manifest: ArtifactManifest) -> dict[str, Any]:
    """The arguments of `drawer` for the first picture of a request."""
    steps = request.steps or max(manifest.plans)
    return {"prompt": request.prompt, "steps": steps, "seed": request.seed, "shape": manifest.latent_shape}


def drawer(
    student: Path, *, prompt: str, steps: int, seed: int, shape: Sequence[int], warm_prompt: bool = False
) -> Callable[[], Any]:
    """Draws one picture a call, as PIL's image, from latents of this shape (C, h, w). warm_prompt: the embeddings are
    computed once, before the first call."""
    import torch

    pipeline = pipeline_of(student)
    plan = list(read_student_manifest(student).step_plans[steps].timesteps)
    noise = torch.from_numpy(initial_noise(seed, 1, (shape[0], shape[1], shape[2])))
    given: dict[str, Any] = {"prompt": prompt}
    if warm_prompt:
        with torch.no_grad():
            given = {"prompt_embeds": pipeline.encode_prompt(prompt, "cpu", 1, False)[0]}

    def draw() -> Any:
        return pipeline(**given, timesteps=plan, guidance_scale=1.0, latents=noise).images[0]

    return draw


def draw_to_file(student: str, output: str, **picture: Any) -> None:
    """All that a process has to do for one picture; benchmarks start it anew each time."""
    drawer(Path(student), **picture)().save(output)
