"""The gate of every export: each graph runs in onnxruntime against torch, and a difference stops the export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..core.errors import ArtifactError, ParityError
from ..core.noise import step_noise
from ..core.update import sample
from ..folders.manifests import CONDITION_ENCODER, IMAGE_ENCODER, ArtifactManifest, Size, TokenizerSpec, size_name
from ..pipelines.stages import Stages
from .cases import Case, Sampling
from .ledger import Ledger, Limits
from .sessions import GraphSession, Run

SEEDS = (0, 1)
SCALES = (1.0, 0.5)  # of the conditioning pictures, by seed; the first is that of a request which says none
SQUARES = 8  # of a conditioning picture's side
LINES = "a\na"  # a prompt of two lines: what stands between them is a token of its own in some vocabularies
SHOWN = 60  # characters of a prompt in a message
SATURATED = 0.99  # share of pixels at 0 or 255 beyond which an image shows nothing


def make_cases(
    stages: Stages,
    sampling: Sampling,
    sizes: Sequence[Size],
    batches: Sequence[int],
    prompts: Sequence[str],
    progress: Callable[[str], None] = lambda _: None,
) -> list[Case]:
    """Torch's answers, float32: every size at every batch, two seeds, every plan.

    Raises ParityError where torch itself gives NaN, Inf, or images of one colour or all black and white.
    """
    cases = []
    for size in sizes:
        denoiser = stages.denoiser(size)
        for batch in batches:
            for seed in SEEDS:
                progress(f"torch at {size_name(size)}, batch {batch}, seed {seed}")
                chosen = tuple(prompts[(seed + i) % len(prompts)] for i in range(batch))
                cases.append(_draw(stages, sampling, denoiser, chosen, seed, size))
    return cases


def check_tokenizers(folder: Path, specs: Sequence[TokenizerSpec], stages: Stages, prompts: Sequence[str]) -> None:
    """Raises ParityError for a prompt that an exported tokenizer reads in another way than the student's, ArtifactError for one of
    more tokens than the model reads."""
    from tokenizers import Tokenizer

    variants = [*(prompt.upper() + " " for prompt in prompts), LINES]
    for spec, tokens in zip(specs, stages.tokens, strict=True):
        tokenizer = Tokenizer.from_file(str(folder / spec.file))
        found = {prompt: tokenizer.encode(spec.text(prompt)) for prompt in (*prompts, *variants)}
        for prompt in prompts:
            if (count := len(found[prompt].ids)) > tokens.length:
                shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
                raise ArtifactError(
                    f"the prompt {shown!r} has {count} tokens, the model reads {tokens.length}; shorten it"
                )
        read = [prompt for prompt, e in found.items() if len(e.ids) <= tokens.length]  # capitals can be more tokens
        exported = [found[prompt] for prompt in read]
        again = {spec.input: [e.ids for e in exported]}
        if spec.mask:
            again[spec.mask] = [e.attention_mask for e in exported]
        expected = tokens.encode(read)
        for name, rows in again.items():
            for prompt, ids, wanted in zip(read, rows, expected[name].tolist(), strict=True):
                if ids != wanted:
                    raise ParityError(
                        f"tokenizer: {prompt!r} gives other token ids than in the student folder ({spec.file})"
                    )


def check_parity(
    graphs: Mapping[str, Path],
    manifest: ArtifactManifest,
    cases: Iterable[Case],
    limits: Limits,
    progress: Callable[[str], None] = lambda _: None,
    *,
    half: bool = False,
) -> Ledger:
    """Runs every graph of `graphs` (name -> ONNX file) on every case, one session at a time. half: as of `open_session`.

    Kinds of figures: the conditions, "m" and "latents" (largest absolute difference) and their "_rms" (relative),
    "images" (levels of 0..255) and "psnr" (dB, the worst image). "stages_N" is the loop over the stage graphs.
    """
    ledger, cases, opened = Ledger(limits), list(cases), partial(GraphSession, half=half)
    progress("text_encoder")
    with opened(graphs["text_encoder"]) as run:
        text = _text(run, ledger, manifest, cases)
    graphs_of = [manifest.graph_name("denoiser", case.size) for case in cases]
    for name in dict.fromkeys(graphs_of):
        here = [i for i, graph in enumerate(graphs_of) if graph == name]
        size = cases[here[0]].size  # of any size, the graphs have one name
        walked: dict[tuple[int, int], torch.Tensor] = {}
        told = _told(graphs, opened, ledger, manifest, {i: cases[i] for i in here}, size, progress)
        progress(name)
        with opened(graphs[name]) as run:
            for i in here:
                found = _walk(run, name, ledger, manifest, cases[i], (*text[i], *told[i]))
                walked |= {(i, n): x for n, x in found.items()}
        name = manifest.graph_name("decoder", size)
        progress(name)
        with opened(graphs[name]) as run:
            for i in here:
                for steps in cases[i].latents:
                    ledger.compare_images(name, run(cases[i].latents[steps]), cases[i], steps)
                    loop = manifest.graph_name(f"stages_{steps}", size)
                    ledger.compare_images(loop, run(walked[i, steps]), cases[i], steps)
        name = manifest.graph_name(IMAGE_ENCODER, size)
        if name in graphs:
            progress(name)
            with opened(graphs[name]) as run:
                for i in here:
                    for steps, images in cases[i].images.items():
                        ledger.compare(name, "latents", run(images)[0], cases[i].encoded[steps], cases[i])
        for steps in cases[here[0]].latents:
            for kind in ("sampler_{}", "sampler_{}_from_embeddings"):
                name = manifest.graph_name(kind.format(steps), size)
                if name not in graphs:
                    continue
                progress(name)
                with opened(graphs[name]) as run:
                    for i in here:
                        given = cases[i].conditions if kind.endswith("embeddings") else cases[i].tokens.values()
                        noises = cases[i].noises_of(manifest.update_tables()[steps])
                        ledger.compare_images(name, run(*given, *cases[i].told.values(), *noises), cases[i], steps)
    return ledger


def _draw(
    stages: Stages, sampling: Sampling, denoiser: torch.nn.Module, prompts: tuple[str, ...], seed: int, size: Size
) -> Case:
    tokens = stages.encode_prompts(prompts)
    renoised = max((max(table.renoised, default=-1) + 1 for table in sampling.tables.values()), default=0)
    shape = stages.latent_shape(size)
    draws = [torch.from_numpy(step_noise(seed, len(prompts), shape, draw)) for draw in range(1 + renoised)]
    noise, fresh = draws[0], torch.stack(draws[1:], dim=1) if renoised else torch.zeros(len(prompts), 0, *shape)
    condition = _conditioning_pictures(len(prompts), seed, size)
    told = stages.beside(condition, sampling.guidance or 1.0, SCALES[seed])
    conditions = tuple(stages.text_encoder(*tokens.values()))
    case = Case(prompts, seed, size, tokens, noise, fresh, condition, conditions, told, {}, {}, {}, {})
    for given in case.conditions:
        _finite(given, "text_encoder", case)
    for given in case.told.values():
        _finite(given, CONDITION_ENCODER, case)

    def ask(walk: list[tuple[torch.Tensor, ...]], x: torch.Tensor, timestep: float) -> torch.Tensor:
        t = torch.full((len(x),), float(sampling.schedule.network_time(timestep)))
        m = _finite(denoiser(x, t, *case.conditions, *case.told.values()), "denoiser", case)
        walk.append((x, t, m))
        return m

    for steps, table in sampling.tables.items():
        walk = case.walks[steps] = []
        x = sample(partial(ask, walk), noise, table, noises=list(fresh.unbind(1)))
        _finite(stages.decoder.decode(x), "decoder", case)
        case.latents[steps], case.images[steps] = x, stages.decoder(x)[0]
        _not_empty(case.images[steps], case)
        case.encoded[steps] = _finite(stages.image_encoder(case.images[steps]), IMAGE_ENCODER, case)
    return case


def _text(run: Run, ledger: Ledger, manifest: ArtifactManifest, cases: list[Case]) -> list[tuple[torch.Tensor, ...]]:
    """onnxruntime's conditions of every case."""
    names = [spec.name for spec in manifest.graphs["text_encoder"].outputs]
    found = []
    for case in cases:
        got = run(*case.tokens.values())
        for name, value, expected in zip(names, got, case.conditions, strict=True):
            ledger.compare("text_encoder", name, value, expected, case)
        found.append(tuple(torch.from_numpy(value) for value in got))
    return found


def _told(
    graphs: Mapping[str, Path],
    opened: Callable[[Path], GraphSession],
    ledger: Ledger,
    manifest: ArtifactManifest,
    cases: Mapping[int, Case],
    size: Size,
    progress: Callable[[str], None],
) -> dict[int, tuple[torch.Tensor, ...]]:
    """What the denoiser takes beside the text, of every case: features as onnxruntime gives them."""
    name = manifest.graph_name(CONDITION_ENCODER, size)
    if name not in graphs:
        return {i: tuple(case.told.values()) for i, case in cases.items()}
    features, found = [spec.name for spec in manifest.graphs[name].outputs], {}
    progress(name)
    with opened(graphs[name]) as run:
        for i, case in cases.items():
            got = dict(zip(features, run(case.condition), strict=True))
            for feature, value in got.items():
                ledger.compare(name, feature, value, case.told[feature], case)
            own = {feature: torch.from_numpy(value) for feature, value in got.items()}
            found[i] = tuple((case.told | own).values())
    return found


def _walk(
    run: Run, name: str, ledger: Ledger, manifest: ArtifactManifest, case: Case, given: tuple[torch.Tensor, ...]
) -> dict[int, torch.Tensor]:
    """The denoiser on torch's own inputs; and the whole loop on onnxruntime's (given), whose latents are returned by steps."""
    walked, schedule = {}, manifest.schedule

    def ask(x: torch.Tensor, timestep: float) -> torch.Tensor:
        t = torch.full((len(x),), float(schedule.network_time(timestep)))
        return torch.from_numpy(run(x, t, *given)[0])

    for steps, table in manifest.update_tables().items():
        if steps not in case.walks:
            continue
        for x, t, m in case.walks[steps]:
            ledger.compare(name, "m", run(x, t, *case.conditions, *case.told.values())[0], m, case)
        x_onnx = sample(ask, case.noise, table, noises=list(case.fresh.unbind(1)))
        loop = manifest.graph_name(f"stages_{steps}", case.size)
        ledger.compare(loop, "latents", x_onnx.numpy(), case.latents[steps], case)
        walked[steps] = x_onnx
    return walked


def _conditioning_pictures(batch: int, seed: int, size: Size) -> torch.Tensor:
    """uint8 (B, H, W, 3): squares of random colours, which have flat parts and edges."""
    squares = np.random.default_rng(seed).integers(0, 256, (batch, SQUARES, SQUARES, 3), dtype=np.uint8)
    rows, columns = (np.arange(side) * SQUARES // side for side in size)
    return torch.from_numpy(squares[:, rows][:, :, columns])


def _finite(values: torch.Tensor, stage: str, case: Case) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise ParityError(f"{stage}: NaN or Inf in torch itself; the student is broken ({case})")
    return values


def _not_empty(images: torch.Tensor, case: Case) -> None:
    if (images == images[:, :1, :1]).flatten(1).all(1).any():
        raise ParityError(f"decoder: an image of one colour; the student is broken ({case})")
    extreme = ((images == 0) | (images == 255)).flatten(1).float().mean(1)
    if (extreme > SATURATED).any():
        raise ParityError(
            f"decoder: an image all black and white ({float(extreme.max()):.1%}); the student is broken ({case})"
        )
