"""TensorRT plans of an artifact: the recipe is written at export, the plans are built from it on the machine with the GPU.

`folders/tensorrt_plans.py` says what a plan is made from and finds it again.

Plain `tensorrt` rather than Polygraphy: one build is some fifteen calls, all of them in both 10.x and 11.x, and the wrapper
would be one more package to install. Networks are strongly typed (11.x knows no others), so the precision is the graph's
own; float32 products may be computed as TF32, which is TensorRT's default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.errors import ArtifactError, missing_extra
from ..folders.files import atomic_file, sha256_file
from ..folders.manifests import WHOLE_SAMPLER, ArtifactManifest, GraphSpec
from ..folders.reading import read_artifact_manifest
from ..folders.tensorrt_plans import (
    FOLDER,
    RECIPE_FILE,
    BuildRecipe,
    GraphRecipe,
    PlanKey,
    PlanRecord,
    Profile,
    plan_key,
    read_json,
    this_machine,
)
from .tensorrt_operators import PARSER_VERSION, allow_decomposing, check_graph


def write_tensorrt(folder: Path, manifest: ArtifactManifest) -> dict[str, Any]:
    """Writes tensorrt/build.json and returns what `manifest.formats["tensorrt"]` holds.

    Of a graph with Attention, tensorrt/ holds a copy that only TensorRT takes; its weights stay where they are. Raises
    ArtifactError for a graph with an opset, operator or type that TensorRT's ONNX parser does not list, or with a free axis
    other than the batch; MissingExtraError without onnx.
    """
    try:
        import onnx
    except ImportError:
        raise missing_extra("onnx", "export") from None
    graphs, copies = dict[str, GraphRecipe](), dict[str, bytes]()
    for name, spec in manifest.graphs.items():
        model = onnx.load(folder / spec.file, load_external_data=False)
        check_graph(name, model)
        file = spec.file
        if allow_decomposing(model):
            file = f"{FOLDER}/{name}.onnx"
            copies[file] = model.SerializeToString(deterministic=True)
        external = {e.value for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location"}
        weights = sorted((PurePosixPath(spec.file).parent / location).as_posix() for location in external)
        graphs[name] = GraphRecipe(file=file, weights=weights, profile=batch_profile(spec, manifest.batch))
    (folder / FOLDER).mkdir(exist_ok=True)
    for file, copy in copies.items():
        (folder / file).write_bytes(copy)
    recipe = BuildRecipe(parser=PARSER_VERSION, graphs=graphs)
    with atomic_file(folder / RECIPE_FILE) as temporary:
        temporary.write_text(recipe.model_dump_json(indent=2), encoding="utf-8")
    return {"recipe": RECIPE_FILE, "parser": PARSER_VERSION, "graphs": sorted(graphs)}


def batch_profile(spec: GraphSpec, batch: tuple[int, int]) -> Profile:
    """The shapes a plan must take: the batch runs from batch[0] to batch[1], everything else is fixed. `profiles_of` says
    for which of them it is made fast. Raises ArtifactError for another free axis.
    """
    profile: Profile = {}
    for tensor in spec.inputs:
        rest = [size for size in tensor.shape[1:] if isinstance(size, int)]
        if len(tensor.shape) > len(rest) + 1:
            wrong = f"the input {tensor.name!r} has the shape {tensor.shape}, but only its first axis may be free"
            raise ArtifactError(f"{spec.file}: {wrong} in a TensorRT plan; export one graph per size")
        low, high = ([n if isinstance(size, str) else size for size in tensor.shape[:1]] + rest for n in batch)
        profile[tensor.name] = (low, high, high)
    return profile


def build_plans(
    folder: str | Path,
    *,
    graphs: Sequence[str] | None = None,
    whole_sampler: bool = False,
    version_compatible: bool = False,
    refit: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Path]:
    """Builds the plans of an artifact for the GPU of this machine and returns their paths; what is there is kept.

    graphs: which; by default `graphs_to_build`. version_compatible: later TensorRTs of the same major version run the plans
    too. refit: weights may be replaced later. progress is told what is being done. Raises ArtifactError, MissingExtraError.
    """
    folder = Path(folder)
    manifest, recipe = read_artifact_manifest(folder), read_json(folder / RECIPE_FILE, BuildRecipe)
    machine = this_machine(folder)
    flags = ["VERSION_COMPATIBLE"] * version_compatible + ["REFIT"] * refit
    wanted = graphs or graphs_to_build(recipe, whole_sampler=whole_sampler)
    keys = [plan_key(manifest, recipe, name, machine, flags) for name in wanted]
    for key in keys:
        plan = folder / FOLDER / key.file
        record = plan.with_suffix(".json")
        if plan.is_file() and record.is_file() and sha256_file(plan) == read_json(record, PlanRecord).sha256:
            progress(f"{plan.name} is there")
        else:
            progress(f"building {plan.name}")
            write_plan(folder, key, _build(folder, recipe.graphs[key.graph].file, key), driver=machine.driver)
    return [folder / FOLDER / key.file for key in keys]


def graphs_to_build(recipe: BuildRecipe, *, whole_sampler: bool) -> list[str]:
    """Those of the stages; with whole_sampler, or where there are no stages, those of the whole sampler too."""
    stages = [name for name in recipe.graphs if not name.startswith(WHOLE_SAMPLER)]
    return list(recipe.graphs) if whole_sampler or not stages else stages


def write_plan(folder: Path, key: PlanKey, plan: bytes, *, driver: str = "") -> Path:
    """Writes a plan, then its record; a plan without one counts as not there."""
    path = folder / FOLDER / key.file
    record = PlanRecord(key=key, sha256=hashlib.sha256(plan).hexdigest(), driver=driver).model_dump_json(indent=2)
    for target, content in ((path, plan), (path.with_suffix(".json"), record.encode())):
        with atomic_file(target) as temporary:
            temporary.write_bytes(content)
    return path


def _build(folder: Path, file: str, key: PlanKey) -> bytes:
    """One plan of the graph in `file`, with the timings of earlier builds. Raises ArtifactError with TensorRT's first message."""
    trt: Any = import_module("tensorrt")
    errors: list[str] = []

    class Log(trt.ILogger):
        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                errors.append(msg)

    def failed(what: str) -> ArtifactError:
        why = " ".join(errors[0].split()) if errors else "it does not say why"
        return ArtifactError(f"{key.graph}: TensorRT {key.tensorrt} {what}: {why}")

    logger = Log()
    try:
        builder = trt.Builder(logger)
    except TypeError:  # pybind11's word for a null pointer
        raise failed("cannot start on this machine") from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # the path only says where the weights are: the parser takes none from above its folder
    if not parser.parse((folder / file).read_bytes(), str(folder / PurePosixPath(file).name)):
        errors[:0] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise failed(f"cannot parse {file}")
    config, timings = builder.create_builder_config(), folder / FOLDER / f"timing_{key.sm}_trt{key.tensorrt}.cache"
    _configure(builder, config, key, timings.read_bytes() if timings.is_file() else b"")
    errors.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failed(f"cannot build {file}")
    with atomic_file(timings) as temporary:
        temporary.write_bytes(config.get_timing_cache().serialize())
    return bytes(plan)


def _configure(builder: Any, config: Any, key: PlanKey, timings: bytes) -> None:
    """The key's profiles and flags, and the timings of earlier builds."""
    trt: Any = import_module("tensorrt")
    for shapes in key.profiles:
        profile = builder.create_optimization_profile()
        for tensor, bounds in shapes.items():
            profile.set_shape(tensor, *map(tuple, bounds))
        config.add_optimization_profile(profile)
    flags = {"VERSION_COMPATIBLE": trt.BuilderFlag.VERSION_COMPATIBLE, "REFIT": trt.BuilderFlag.REFIT}
    for flag in flags.keys() & key.flags:
        config.set_flag(flags[flag])
    for known in (timings, b""):  # TensorRT refuses those of another GPU
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            break
