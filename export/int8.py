"""OpenVINO networks in 8 bits, by NNCF: calibrated on prompts, and judged by the pictures that torch drew.

"weights" stores the weights of matrices and convolutions in 8 bits, asymmetric, one scale per output channel; products are
computed as before. "full" also computes the products of denoiser and decoder in 8 bits: weights symmetric, activations with
the ranges that calibration prompts reach, after SmoothQuant. Two kinds of layers stay as they are, each of which costs much
more likeness than time: the first and the last that the latents pass, and those that they do not pass at all (the embedding
of the timestep, and what is made of it and of the text).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ParityError, missing_extra
from ..core.noise import step_noise
from ..core.update import UpdateTable, sample
from ..folders.manifests import ArtifactManifest, Size
from ..pipelines.stages import LATENTS
from .cases import Case
from .ledger import Ledger, Limits
from .sessions import open_session
from .tokenizer import random_prompts

Int8 = Literal["weights", "full"]
Tensors = dict[str, NDArray[Any]]
Compiled = Callable[[Tensors], dict[str, NDArray[Any]]]  # inputs by name -> outputs by name
QUANTISED = ("denoiser", "decoder")  # of "full"
LAYERS = ("MatMul", "Convolution", "GroupConvolution")
PROMPTS = 16  # of the calibration
SMOOTHED = {"convolution": 0.15, "matmul": 0.5}  # SmoothQuant's alphas: docs/decisions/017-int8.md


def compress_weights(nncf: Any, model: Any) -> Any:
    """The model with 8-bit weights."""
    with _silent():
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)


def quantise(nncf: Any, model: Any, feeds: Sequence[Tensors]) -> Any:
    """The model with 8-bit products, calibrated on these inputs by name, each of one picture."""
    free = {port.any_name: port.partial_shape for port in model.inputs}
    model.reshape({name: list(values.shape) for name, values in feeds[0].items()})
    advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(**SMOOTHED))
    with _silent():
        model = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            subset_size=len(feeds),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=left_out(model)),
            advanced_parameters=advanced,
        )
    model.reshape(free)
    return model


def left_out(model: Any) -> list[str]:
    """The layers that "full" leaves as they are, by the names that OpenVINO has for them."""
    passed = {port.get_node().get_friendly_name() for port in model.inputs if LATENTS in port.names}
    layers, outside = list[str](), list[str]()
    for op in model.get_ordered_ops():
        name = op.get_friendly_name()
        if any(value.get_node().get_friendly_name() in passed for value in op.input_values()):
            passed.add(name)
        if op.get_type_name() in LAYERS:
            (layers if name in passed else outside).append(name)
    return list(dict.fromkeys([*layers[:1], *layers[-1:], *outside]))


def calibration(
    folder: Path, manifest: ArtifactManifest, size: Size, prompts: Sequence[str] | None, told: Sequence[Tensors] = ({},)
) -> dict[str, list[Tensors]]:
    """Inputs of the denoiser and the decoder by graph name, as onnxruntime's float32 graphs meet them when they draw.

    prompts: None takes 16 of random words of the first tokenizer. The empty prompt comes first, since guidance asks for it;
    each prompt takes one of the plans in turn. told: what the denoiser takes beside the text, of one picture each, in turn.
    """
    denoiser, decoder = (manifest.graph_name(kind, size) for kind in QUANTISED)
    conditions = _conditions(folder, manifest, ["", *(prompts or _words(folder, manifest))])
    session = open_session(folder / manifest.graphs[denoiser].file)
    tables, shape = list(manifest.update_tables().values()), manifest.latent_shape_of(size)
    asked: list[Tensors] = []

    def walk(seed: int, text: Tensors) -> NDArray[np.float32]:
        def ask(x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
            time = np.full(1, manifest.schedule.network_time(t), np.float32)
            asked.append({LATENTS: x, "timestep": time, **text, **told[seed % len(told)]})
            return session.run(["m"], asked[-1])[0]

        table = tables[seed % len(tables)]
        noises = [step_noise(seed, 1, shape, draw) for draw in range(1 + len(table))]
        return sample(ask, noises[0], table, noises=noises[1:])

    drawn = [{LATENTS: walk(seed, text)} for seed, text in enumerate(conditions)]
    return {denoiser: asked, decoder: drawn}


def check_pictures(
    compiled: Callable[[str, int], Compiled], manifest: ArtifactManifest, cases: Sequence[Case], limit: float
) -> float:
    """The lowest PSNR (dB) of what 8-bit networks draw against torch's pictures, over sizes, plans and seeds of the smallest
    batch. compiled(graph, batch): a stage. Raises ParityError under `limit`."""
    ledger = Ledger(Limits(psnr=limit))
    smallest = min(manifest.batch)
    for case in (case for case in cases if len(case.prompts) == smallest):
        denoiser, decoder = (compiled(manifest.graph_name(kind, case.size), smallest) for kind in QUANTISED)
        names = [spec.name for spec in manifest.graphs[manifest.graph_name("denoiser", case.size)].inputs]
        given = [tensor.numpy() for tensor in (*case.conditions, *case.told.values())]
        for steps, table in manifest.update_tables().items():
            if steps in case.images:
                x = _draw(denoiser, names, given, case, table, manifest)
                got = decoder({LATENTS: x})
                ledger.compare_images("int8", [got["images"], got["finite"]], case, steps)
    if ledger.failures:
        raise ParityError(
            f"{ledger.failures[0].message}; calibrate on prompts such as yours (--check-prompts FILE), or leave --int8 out"
        )
    return ledger.errors["int8"]["psnr"]


def _draw(
    denoiser: Compiled,
    names: Sequence[str],
    given: Sequence[NDArray[Any]],
    case: Case,
    table: UpdateTable,
    manifest: ArtifactManifest,
) -> NDArray[np.float32]:
    def ask(x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        times = np.full(len(x), manifest.schedule.network_time(t), np.float32)
        return denoiser(dict(zip(names, [x, times, *given], strict=True)))["m"]

    return sample(ask, case.noise.numpy(), table, noises=[z.numpy() for z in case.fresh.unbind(1)])


def _words(folder: Path, manifest: ArtifactManifest) -> list[str]:
    from tokenizers import Tokenizer

    first = manifest.tokenizers[0]
    return random_prompts(Tokenizer.from_file(str(folder / first.file)), first.known_words, PROMPTS)


def _conditions(folder: Path, manifest: ArtifactManifest, prompts: Sequence[str]) -> list[Tensors]:
    """What the text encoder makes of each prompt, by name."""
    from tokenizers import Tokenizer

    session = open_session(folder / manifest.graphs["text_encoder"].file)
    names = [spec.name for spec in manifest.graphs["text_encoder"].outputs]
    tokenizers = [(spec, Tokenizer.from_file(str(folder / spec.file))) for spec in manifest.tokenizers]
    found = []
    for prompt in prompts:
        tokens: Tensors = {}
        for spec, tokenizer in tokenizers:
            encoded = tokenizer.encode(spec.text(prompt))
            tokens[spec.input] = np.array([encoded.ids], np.int64)
            if spec.mask:
                tokens[spec.mask] = np.array([encoded.attention_mask], np.int64)
        found.append(dict(zip(names, session.run(names, tokens), strict=True)))
    return found


@contextlib.contextmanager
def _silent() -> Any:
    """Without NNCF's tables and progress bars."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def import_nncf() -> Any:
    """NNCF, imported with its usage statistics off: it would send them without asking."""
    switch, before = "NNCF_CI", os.environ.get("NNCF_CI")
    os.environ[switch] = "1"
    try:
        import nncf  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_extra("nncf", "int8") from None
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
    nncf.set_log_level(logging.ERROR)
    return nncf
