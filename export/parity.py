"""The gate of every export: each graph runs in onnxruntime against torch, and a difference stops the export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..core.artifact import ArtifactManifest
from ..core.errors import ParityError, missing_extra
from ..core.update import UpdateTable, reference_update
from .stages import Stages

LATENT_TOLERANCE = 1e-4  # absolute; of the largest value for embeddings beyond 1
IMAGE_TOLERANCE = 1  # levels of 0..255
BATCHES = (1, 3)
SEEDS = (0, 1)

Errors = dict[str, dict[str, float]]
Run = Callable[..., np.ndarray]  # run(graph, *tensors)


@dataclass(frozen=True)
class _Case:
    """One batch of prompts with its noise."""

    prompts: tuple[str, ...]
    seed: int
    input_ids: torch.Tensor  # int64 (B, L)
    noise: torch.Tensor  # float32 (B, C, h, w)

    def __str__(self) -> str:
        _, channels, height, width = self.noise.shape
        return f"prompt {self.prompts[0]!r}, seed {self.seed}, batch {len(self.prompts)}, latents {channels}x{height}x{width}"


def check_parity(folder: Path, manifest: ArtifactManifest, stages: Stages, prompts: Sequence[str]) -> Errors:
    """The largest error of every graph in `folder` against torch, float32, over prompts, seeds and batch sizes 1 and 3.

    "embeddings", "m" and "latents" are absolute errors, "images" levels of 0..255. Raises ParityError, naming graph,
    prompt, size and error, beyond 1e-4 or one level, for NaN or Inf, for a constant image, for differing token ids.
    """
    run = _runner(folder, manifest)
    ledger = _Ledger({})
    for case in _cases(folder / manifest.tokenizer.file, stages, prompts):
        embeddings = _finite(stages.text_encoder(case.input_ids), "text_encoder", case)
        got = torch.from_numpy(run("text_encoder", case.input_ids))
        scale = max(1.0, float(embeddings.abs().max()))
        ledger.record("text_encoder", "embeddings", got.numpy(), embeddings, case, LATENT_TOLERANCE * scale)
        for steps in manifest.plans:
            _check_plan(run, ledger, manifest, stages, case, steps, (embeddings, got))
    return ledger.errors


@dataclass(frozen=True)
class _Ledger:
    """The largest error seen so far, by graph and kind."""

    errors: Errors

    def record(self, graph: str, kind: str, got: np.ndarray, expected: torch.Tensor, case: _Case, limit: float) -> None:
        error = _difference(got, expected)
        if not error <= limit:  # also true for NaN
            raise ParityError(f"{graph}: {kind} differ from torch by {error:.3g}, more than {limit:.3g} ({case})")
        kinds = self.errors.setdefault(graph, {})
        kinds[kind] = max(error, kinds.get(kind, 0.0))


def _check_plan(
    run: Run,
    ledger: _Ledger,
    manifest: ArtifactManifest,
    stages: Stages,
    case: _Case,
    steps: int,
    embeddings: tuple[torch.Tensor, torch.Tensor],  # torch's, onnxruntime's
) -> None:
    """One plan three ways: torch, the stage graphs in a loop, the whole-sampler graph."""
    table = manifest.update_tables()[steps]
    x = x_onnx = case.noise
    for i, time in enumerate(manifest.schedule.network_time(table.timesteps)):
        t = torch.full((len(x),), float(time))
        m = _finite(stages.denoiser(x, t, embeddings[0]), "denoiser", case)
        ledger.record("denoiser", "m", run("denoiser", x, t, embeddings[0]), m, case, LATENT_TOLERANCE)
        m_onnx = run("denoiser", x_onnx, t, embeddings[1])
        x, x_onnx = _step(x, m.numpy(), table, i), _step(x_onnx, m_onnx, table, i)
        ledger.record(f"stages_{steps}", "latents", x_onnx.numpy(), x, case, LATENT_TOLERANCE)
    _finite(stages.decoder.decode(x), "decoder", case)
    images = stages.decoder(x)
    _not_constant(images, case)
    drawn = {
        "decoder": run("decoder", x),
        f"stages_{steps}": run("decoder", x_onnx),
        f"sampler_{steps}": run(f"sampler_{steps}", case.input_ids, case.noise),
    }
    for graph, got in drawn.items():
        ledger.record(graph, "images", got, images, case, IMAGE_TOLERANCE)


def _cases(tokenizer_file: Path, stages: Stages, prompts: Sequence[str]) -> Iterator[_Case]:
    from tokenizers import Tokenizer

    exported = Tokenizer.from_file(str(tokenizer_file))
    for batch in BATCHES:
        for seed in SEEDS:
            chosen = tuple(prompts[(seed + i) % len(prompts)] for i in range(batch))
            ids = stages.tokenizer(
                list(chosen), padding="max_length", max_length=stages.context_length, truncation=True
            ).input_ids
            again = [encoding.ids for encoding in exported.encode_batch(list(chosen))]
            if ids != again:
                raise ParityError(f"tokenizer: {chosen!r} gives other token ids than in the student folder")
            noise = torch.randn(batch, *stages.latent_shape, generator=torch.Generator().manual_seed(seed))
            yield _Case(chosen, seed, torch.tensor(ids), noise)


def _runner(folder: Path, manifest: ArtifactManifest) -> Run:
    """run(graph, *tensors) -> array; sessions are built once."""
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "cpu") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_reuse = False
    sessions = {
        name: onnxruntime.InferenceSession(folder / spec.file, options, providers=["CPUExecutionProvider"])
        for name, spec in manifest.graphs.items()
    }

    def run(name: str, *tensors: torch.Tensor) -> np.ndarray:
        names = (spec.name for spec in manifest.graphs[name].inputs)
        feed = {key: tensor.numpy() for key, tensor in zip(names, tensors, strict=True)}
        return np.asarray(sessions[name].run(None, feed)[0])

    return run


def _step(x: torch.Tensor, m: np.ndarray, table: UpdateTable, index: int) -> torch.Tensor:
    return torch.from_numpy(reference_update(x.numpy(), m, table, index))


def _difference(got: np.ndarray, expected: torch.Tensor) -> float:
    """The largest absolute difference; NaN where either is NaN."""
    if got.shape != tuple(expected.shape):
        return float("inf")
    return float(np.abs(got.astype(np.float64) - expected.numpy().astype(np.float64)).max())


def _finite(values: torch.Tensor, stage: str, case: _Case) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise ParityError(f"{stage}: NaN or Inf in torch itself; the student is broken ({case})")
    return values


def _not_constant(images: torch.Tensor, case: _Case) -> None:
    if (images == images[:, :1, :1]).flatten(1).all(1).any():
        raise ParityError(f"decoder: an image of one colour; the student is broken ({case})")
