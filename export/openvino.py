"""The stages of an artifact as OpenVINO IR, each compared with its ONNX graph before anything stays on the disk.

One IR per stage, with the batch axis left free: the runtime fixes it with `model.reshape` before it compiles, which took
20 ms of the 350 ms that a denoiser of 6.7M parameters needs to load (2 of 60 for its text encoder, 4 of 70 for its decoder;
an EPYC core), and a file per batch size would hold the weights once more each. The whole-sampler graphs are left out for
the same reason: an IR keeps its weights in a file of its own and shares none.

Weights keep the type they have in the ONNX: float16 where that loses nothing, behind a Convert that OpenVINO folds when it
compiles, else float32. So the three stages of that model take 15.4 MB as its weights.bin does. OpenVINO's own
compress_to_fp16 rounds what is left and saved 0.3 %; it is not used. A graph gives the same bytes in every new process;
within one, OpenVINO numbers the nodes without a name ever higher.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ArtifactError, ParityError, missing_extra
from ..core.images import MAX_PSNR, psnr
from ..folders.files import atomic_folder
from ..folders.manifests import STAGES, ArtifactManifest, GraphSpec, TensorSpec
from ..folders.sizes import Size
from ..pipelines.stages import GUIDANCE
from .cases import Case
from .int8 import (
    QUANTISED,
    Compiled,
    Int8,
    Tensors,
    calibration,
    check_pictures,
    compress_weights,
    import_nncf,
    quantise,
)
from .ledger import LIMITS
from .onnx import BATCH

FOLDER = "openvino"
RELATIVE_TOLERANCE = 1e-4  # of the largest value
IMAGE_TOLERANCE = 1.0  # levels of 0..255
INT8_PSNR = 25.0  # dB
SEED = 0

Errors = dict[str, dict[str, float | None]]  # output -> measure -> value; None for NaN or Inf


def write_openvino(
    folder: Path,
    manifest: ArtifactManifest,
    *,
    int8: Int8 | None = None,
    cases: Sequence[Case] = (),
    prompts: Sequence[str] | None = None,
    psnr: float = LIMITS["int8"].psnr,
) -> dict[str, Any]:
    """Writes folder/openvino/NAME.xml and NAME.bin for the stage graphs; returns what the manifest says about them.

    int8: "weights" or "full", of denoiser and decoder alone: see export/int8.py. cases: what torch drew, at least one for
    "full", whose pictures must have this psnr (dB); prompts: what "full" is calibrated on.

    Every file is read back and run on the CPU against onnxruntime on seeded inputs, at the smallest and the largest
    batch of the manifest. "errors" holds the worst, by precision hint ("f32", and "bf16" on a CPU that has it) and
    output: of a float output "max" (of the largest value) and "rms" (of the output's), of images "max" in levels of
    0..255 and "psnr" in dB, at most 100; None where a value is NaN or Inf. "inference_precision" is the hint that was
    held to a limit; bf16 is only measured.

    Raises ParityError if a float32 error exceeds 1e-4 or one level, images of 8-bit weights have a PSNR under 25 dB or
    pictures of 8-bit products one under `psnr`; ArtifactError, MissingExtraError. An older folder/openvino gives way
    only then, whole.
    """
    ov, nncf = import_libraries(int8)
    names = _stage_names(folder, manifest, QUANTISED if int8 == "full" else STAGES)
    core = ov.Core()
    hints = ["f32"] + ["bf16"] * ("BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    graphs: dict[str, Any] = {}
    feeds = dict[str, list[Tensors]]()
    if int8 == "full":
        for size in manifest.sizes[:1] if manifest.any_size else manifest.sizes:
            told = [{name: one[:1].numpy() for name, one in case.told.items()} for case in cases if case.size == size]
            feeds |= calibration(folder, manifest, size, prompts, told)
    pictures: dict[str, Any] = {}
    with atomic_folder(folder / FOLDER, replaces=[f"{name}.xml" for name in manifest.graphs]) as target:
        for name in names:
            model = _read(core, folder / manifest.graphs[name].file)
            seeded = list(_cases(folder, manifest, name))
            path = target / f"{name}.xml"
            ov.save_model(model, path, compress_to_fp16=False)
            errors = _checked(core, path, name, seeded, hints)
            if nncf is not None:
                path.with_suffix(".bin").unlink()  # it may be mapped into memory
                model = quantise(nncf, model, feeds[name]) if int8 == "full" else compress_weights(nncf, model)
                ov.save_model(model, path, compress_to_fp16=False)
                errors = _measured(core, path, seeded, hints)
                if int8 == "weights":
                    _check_int8(name, errors["f32"])
            graphs[name] = {"file": f"{FOLDER}/{name}.xml", "weights": f"{FOLDER}/{name}.bin", "errors": errors}
        if int8 == "full":
            compiled = partial(_compiled, core, target, hints[-1])
            pictures = {"psnr": check_pictures(compiled, manifest, cases, psnr), "prompts": len(feeds[names[-1]])}
    return (
        {
            "openvino": ov.__version__,
            "weights": {None: "as in the ONNX", "weights": "int8_asym", "full": "int8_sym"}[int8],
            "batch": "free; reshape before compiling" if manifest.any_size is None else "free, as height and width are",
            "inference_precision": "f32",
            "checked_batches": sorted(set(manifest.batch)),
            "graphs": graphs,
        }
        | ({"nncf": nncf.__version__} if nncf is not None else {})
        | ({"activations": "int8", "pictures": pictures} if pictures else {})
    )


def _compiled(core: Any, folder: Path, hint: str, name: str, batch: int) -> Compiled:
    """An IR at one batch size, as the runtime compiles it."""
    model = core.read_model(folder / f"{name}.xml")
    model.reshape({port: [batch, *list(port.partial_shape)[1:]] for port in model.inputs})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})

    def run(inputs: Tensors) -> Tensors:
        found = compiled(inputs)
        return {name: found[name] for port in compiled.outputs for name in port.names}

    return run


def _stage_names(folder: Path, manifest: ArtifactManifest, stages: Sequence[str]) -> list[str]:
    """The graphs of these stages at every size, in their order."""
    if manifest.precision != "fp32":
        raise ArtifactError(
            f"OpenVINO lowers the precision itself when it loads a graph; export with precision fp32 for it, "
            f"got {manifest.precision}"
        )
    wanted = dict.fromkeys(manifest.graph_name(stage, size) for stage in stages for size in manifest.sizes)
    names = [name for name in wanted if name in manifest.graphs]
    if not names:
        raise ArtifactError(
            f"{folder} holds whole-sampler graphs only; OpenVINO is written for stages: export them too"
        )
    for name in names:
        file = manifest.graphs[name].file
        if not (folder / file).is_file():
            raise ArtifactError(f"{folder}: {file} is missing; run 'imagine-flash export' again")
    return names


def _cases(folder: Path, manifest: ArtifactManifest, name: str) -> Iterator[tuple[Tensors, Tensors]]:
    """Seeded inputs of a graph and what onnxruntime makes of them, at the smallest and the largest batch; of any size, at those
    that torch drew."""
    spec, text = manifest.graphs[name], manifest.graphs.get("text_encoder")
    is_free = any(name != BATCH for tensor in spec.inputs for name in tensor.shape if isinstance(name, str))
    sizes = dict.fromkeys([manifest.image_size, *(picture.size for picture in manifest.references if is_free)])
    for batch, size in itertools.product(sorted(set(manifest.batch)), sizes):
        conditions: Tensors = {}
        if text is not None and {tensor.name for tensor in text.outputs} & {tensor.name for tensor in spec.inputs}:
            conditions = _run_onnx(folder, text, _inputs(folder, manifest, text, batch, size, {}))
        inputs = _inputs(folder, manifest, spec, batch, size, conditions)
        yield inputs, _run_onnx(folder, spec, inputs)


def _inputs(
    folder: Path, manifest: ArtifactManifest, spec: GraphSpec, batch: int, size: Size, conditions: Tensors
) -> Tensors:
    """Token ids of the vocabulary, masks of half the context, visited timesteps, the conditions given, else normal noise."""
    random = np.random.default_rng(SEED)
    times = [manifest.schedule.network_time(table.timesteps) for table in manifest.update_tables().values()]
    vocabularies = {tokenizer.input: folder / tokenizer.file for tokenizer in manifest.tokenizers}
    masks = {tokenizer.mask for tokenizer in manifest.tokenizers}

    def draw(tensor: TensorSpec) -> NDArray[Any]:
        shape = tensor.at(batch, size)
        if tensor.name in conditions:
            return conditions[tensor.name]
        if tensor.name in vocabularies:
            return random.integers(0, _vocabulary_size(vocabularies[tensor.name]), shape).astype(tensor.dtype)
        if tensor.name in masks:
            return np.broadcast_to(np.arange(shape[1]) < (shape[1] + 1) // 2, shape).astype(tensor.dtype)
        if tensor.name == "timestep":
            return random.choice(np.concatenate(times), batch).astype(tensor.dtype)
        if tensor.name == GUIDANCE:
            return np.full(shape, manifest.guidance.default, tensor.dtype)
        return random.standard_normal(shape).astype(tensor.dtype)

    return {tensor.name: draw(tensor) for tensor in spec.inputs}


def _vocabulary_size(path: Path) -> int:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path)).get_vocab_size()


def _run_onnx(folder: Path, spec: GraphSpec, inputs: Tensors) -> Tensors:
    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "cpu") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(folder / spec.file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no base of their own
        raise _unreadable("onnxruntime", folder / spec.file, error) from None
    names = [tensor.name for tensor in spec.outputs]
    return dict(zip(names, (np.asarray(value) for value in session.run(names, inputs)), strict=True))


def _read(core: Any, path: Path) -> Any:
    try:
        return core.read_model(path)
    except RuntimeError as error:
        raise _unreadable("OpenVINO", path, error) from None


def _unreadable(library: str, path: Path, error: Exception) -> ArtifactError:
    reason = " ".join(str(error).split())[:300]
    return ArtifactError(f"{library} cannot read {path} ({reason}); run 'imagine-flash export' again")


def _checked(
    core: Any, path: Path, name: str, cases: list[tuple[Tensors, Tensors]], hints: list[str]
) -> dict[str, Errors]:
    """The errors of a file, by hint. Raises ParityError beyond the float32 limits."""
    errors = _measured(core, path, cases, hints)
    for output, measures in errors["f32"].items():
        limit, unit = (
            (IMAGE_TOLERANCE, "levels") if "psnr" in measures else (RELATIVE_TOLERANCE, "of the largest value")
        )
        error = measures["max"]
        if error is None or error > limit:
            found = "NaN or Inf" if error is None else f"{error:.3g}"
            raise ParityError(
                f"{name}: {output} in OpenVINO at f32 differs from onnxruntime by {found}, more than {limit:g} {unit}; "
                "leave OpenVINO out or try another version of it"
            )
    return errors


def _check_int8(name: str, errors: Errors) -> None:
    for output, measures in errors.items():
        likeness = None if None in measures.values() else measures.get("psnr", MAX_PSNR)
        if likeness is None or likeness < INT8_PSNR:
            found = "NaN or Inf" if likeness is None else f"a PSNR of {likeness:.1f} dB"
            raise ParityError(f"{name}: {output} with int8 weights: {found}, must be {INT8_PSNR:g} dB; leave int8 out")


def _measured(core: Any, path: Path, cases: list[tuple[Tensors, Tensors]], hints: list[str]) -> dict[str, Errors]:
    """The worst errors of an IR file over the cases, by hint, with the batch fixed as the runtime does."""
    model = core.read_model(path)
    worst: dict[str, Errors] = {hint: {} for hint in hints}
    for rows, group in itertools.groupby(cases, key=lambda case: len(next(iter(case[0].values())))):
        drawn = list(group)
        model.reshape({port: [rows, *list(port.partial_shape)[1:]] for port in model.inputs})
        for hint in hints:
            compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
            for inputs, expected in drawn:
                got = compiled(inputs)
                for output, values in expected.items():
                    found = difference(got[output], values)
                    seen = worst[hint].setdefault(output, found)
                    worst[hint][output] = {measure: _worse(measure, seen[measure], found[measure]) for measure in found}
    return worst


def difference(got: NDArray[Any], expected: NDArray[Any]) -> dict[str, float | None]:
    """uint8: "max" in levels, "psnr" in dB (peak 255). Float: "max" of the largest value, "rms" of the output's RMS."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        largest, power = float(np.abs(a - b).max()), float(np.square(a - b).mean())
        if expected.dtype == np.uint8:
            found = {"max": largest, "psnr": psnr(got, expected)}
        else:
            scale, size = float(np.abs(b).max()) or 1.0, float(np.square(b).mean()) or 1.0
            found = {"max": largest / scale, "rms": float(np.sqrt(power / size))}
    return {measure: value if np.isfinite(value) else None for measure, value in found.items()}


def _worse(measure: str, one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return None
    return min(one, other) if measure == "psnr" else max(one, other)


def import_libraries(int8: Int8 | None) -> tuple[Any, Any]:
    """OpenVINO, and NNCF where there are 8 bits, else None. Raises MissingExtraError."""
    try:
        import openvino
    except ImportError:
        raise missing_extra("openvino", "openvino") from None
    return openvino, import_nncf() if int8 else None
