"""A student folder's own networks in torch, without an export: the slow, correct path that the others are tested against.

Each backend name is one way of running them: "torch" module by module; "torch-compile" with denoiser and decoder compiled for
fixed batch sizes, which on a GPU are captured as CUDA graphs too; "torch-graph" captured without a compiler. Where networks
are captured, a lone picture's whole plan is one graph; pictures in a batch go step by step, since requests join and leave
between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import missing_extra
from ...folders.manifests import CONDITION_ENCODER, IMAGE_ENCODER, SAMPLERS, ModelDescription, Size
from ...folders.reading import read_student_manifest

try:
    import torch
except ImportError:
    raise missing_extra("torch", "export") from None

from ...kernels import group_norm_silu
from ...pipelines.adapters import Adapter, Rewriter, lora_layers, read_adapters  # noqa: F401 (pipelines are read here alone)
from ...pipelines.architectures import architecture_of, stages_of
from ...pipelines.description import describe_student
from ...pipelines.loading import load_student_pipeline
from ...pipelines.stages import Stages
from ...pipelines.tokenizer import tokenizers_of
from ..tokenizer import PromptTokenizer
from .base import BackendOptions, Column, Fresh, LoraSet, Pictures, Stopped
from .fused_update import FusedUpdate
from .graphs import GraphBackend, Run
from .torch_modes import (
    Capture,
    Captured,
    InPrecision,
    Network,
    OnGpu,
    as_run,
    check_mode,
    cuda_graphs,
    current,
    device_of,
    device_stopwatch,
    keep_channels_last,
    to_device,
    to_host,
    use_threads,
)
from .torch_quantised import computes_in, quantise
from .torch_tuning import COMPILED, Maker, fuse_projections
from .whole_plan import LONGEST, WholePlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_student(
    folder: Path, backend: str, options: BackendOptions, sizes: Sequence[Size] | None
) -> tuple[TorchBackend, PromptTokenizer, ModelDescription]:
    """What an engine is made of, from a student folder. sizes: by default the networks' own.

    Raises ArtifactError, ScheduleError, MissingExtraError.
    """
    student = read_student_manifest(folder)
    device = device_of(options.device)
    use_threads(options.threads)
    precision, scheme = computes_in(options, device)
    pipeline = load_student_pipeline(folder, dtype=DTYPES[precision])
    adapters = read_adapters(pipeline, architecture_of(type(pipeline).__name__).network, options.loras)
    stages = stages_of(pipeline)
    for size in sizes or ():
        stages.check_size(size)
    tokenizers = tokenizers_of(stages, student.known_words)
    specs = [spec for spec, _ in tokenizers]
    model = describe_student(folder, student, stages, precision, sizes or [stages.default_size], specs)
    reads = PromptTokenizer([one for _, one in tokenizers], specs)
    build = partial(TorchBackend, folder, model, stages, device, autotune=options.autotune)
    if scheme is not None:
        quantise(build(), reads, model, stages.denoiser(model.sizes[0]), scheme)
    loaded = build(name="torch" if backend == "auto" else backend, batches=options.batches, adapters=adapters)
    loaded.precision = precision if scheme is None else f"{precision} with matrices in {scheme}"
    return loaded, reads, model


class TorchBackend(GraphBackend[ModelDescription]):
    """The state is float32 between steps, the networks compute in the description's precision, cast at their boundary.

    A batch between two of `batches` is padded where the networks are compiled or captured. Only `finite` and `decode` wait
    for the device, and what compiles or captures.
    """

    way_out = "try backend 'torch', device cpu or precision fp32"

    def __init__(
        self,
        folder: Path,
        model: ModelDescription,
        stages: Stages,
        device: torch.device,
        *,
        name: str = "torch",
        batches: Sequence[int] = (1,),
        capture: Capture | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        autotune: bool = False,
    ) -> None:
        """capture: by default CUDA graphs, on a GPU and unless the name is "torch". adapters: the LoRAs, by name."""
        super().__init__(folder, model)
        self.name, self.device, self.precision = name, device, model.precision
        self._on_gpu = device.type == "cuda"
        if capture is None:
            check_mode(name, device)
        self._capture = cuda_graphs(device) if self._on_gpu and name != "torch" else capture
        self.batches = () if name == "torch" else tuple(batches)
        self._dtype = DTYPES[model.precision]
        self._tokens = [ids.to(device) for ids in stages.example_tokens(1).values()]
        self._make = Maker(name == COMPILED, autotune, self._capture, self.stopwatch)
        fuses = autotune and not adapters  # which are written into the weights that the products are made of
        self._networks, self._made = self._on_device(stages, fuses), dict[tuple[str, int], Network]()
        self._rewriter = Rewriter(adapters or {})
        self._sizes = {model.graph_name(kind, size): size for kind in ("denoiser", "decoder") for size in model.sizes}
        self._uncaptured: set[str] = set()
        self._tables = model.update_tables()
        self._update = FusedUpdate(self._tables.values(), device) if self._on_gpu or self._capture else None
        self.lone_plans = tuple(n for n in self._tables if n <= LONGEST and self._capture is not None)
        self._whole = {
            model.graph_name(SAMPLERS[1].format(n), size): (n, size) for n in self.lone_plans for size in model.sizes
        }
        captured = ["text_encoder", *self._whole] if self._capture else []
        self._fixed = {*self._sizes, *captured}  # run at fixed batch sizes

    def _on_device(self, stages: Stages, fuses: bool) -> dict[str, Network]:
        """By graph name. channels_last: 13.0 instead of 14.2 ms for the embedded denoiser on one core, 6.6 instead of 8.5
        for its decoder."""
        model, found = self.manifest, dict[str, Network]()
        kept = {"device": self.device, "memory_format": torch.channels_last}
        decoder, encoder = stages.decoder.to(**kept), stages.image_encoder.to(**kept)
        text = stages.text_encoder.to(self.device)
        if self._capture:
            group_norm_silu.apply(decoder)
        found["text_encoder"] = lambda *tokens: tuple(values.to(self._dtype) for values in text(*tokens))
        for size in model.sizes:
            denoiser = stages.denoiser(size).to(**kept)
            keep_channels_last(denoiser)
            if self._capture:
                group_norm_silu.apply(denoiser)
            if fuses:
                fuse_projections(denoiser)
            found[model.graph_name("denoiser", size)] = InPrecision(denoiser, self._dtype)
            found[model.graph_name("decoder", size)] = OnGpu(decoder) if self._on_gpu else decoder
            found[model.graph_name(IMAGE_ENCODER, size)] = encoder
            if stages.condition_encoder is not None:
                condition_encoder = stages.condition_encoder.to(**kept)
                found[model.graph_name(CONDITION_ENCODER, size)] = lambda pictures, network=condition_encoder: tuple(
                    values.to(self._dtype) for values in network(pictures)
                )
        return found

    def stopwatch(self) -> Callable[[], Stopped]:
        if not self._on_gpu:
            return super().stopwatch()
        return device_stopwatch(self.device)

    def describe(self) -> str:
        where = torch.cuda.get_device_name(self.device) if self._on_gpu else "cpu"
        graphs = ["CUDA graphs" + "".join(f" without {name}" for name in sorted(self._uncaptured))]
        how = self._make.how + graphs * (self._capture is not None) or ["eager"]
        threads = [] if self._on_gpu else [f"{torch.get_num_threads()} threads"]
        return ", ".join([f"torch {torch.__version__} on {where}", self.precision, *how, *threads])

    @torch.inference_mode()
    def open(self, graph: str, batch: int) -> Run:
        if not batch or graph not in self._fixed:
            return as_run(self._networks[graph])
        with self._current():
            inputs = self.example(graph, batch)
            network = self._plan(*self._whole[graph]) if graph in self._whole else self._compiled(graph, inputs)
            if self._capture is None:
                return as_run(network)
            try:
                return Captured(network, inputs, self._capture)
            except RuntimeError:
                if graph in self._sizes:
                    raise
                self._uncaptured.add(graph)  # some text encoders ask the device about their mask
                return as_run(network)

    def _compiled(self, graph: str, inputs: Sequence[torch.Tensor]) -> Network:
        """The network as it runs at the batch of these inputs, made once: compiled where this backend compiles it."""
        if graph not in self._sizes:
            return self._networks[graph]
        key = graph, len(inputs[0])
        if key not in self._made:
            self._made[key] = self._make(self._networks[graph], inputs)
        return self._made[key]

    def _plan(self, steps: int, size: Size) -> WholePlan:
        """All that a lone picture needs behind its prompt."""
        assert self._update is not None
        names = [self.manifest.graph_name(kind, size) for kind in ("denoiser", "decoder")]
        examples = [self.example(name, 1) for name in names]
        denoise, decode = map(self._compiled, names, examples)
        schedule, latents = self.manifest.schedule, examples[0][0]
        return WholePlan(self._tables[steps], schedule, denoise, decode, self._update, latents)

    def prepare(self, graphs: Sequence[str], batches: Sequence[int] = (1,)) -> None:
        super().prepare(graphs, batches)
        for name, (_, size) in self._whole.items():
            if self.manifest.graph_name("denoiser", size) in graphs:
                self._graph(name, 1)
        if self._update is not None:  # its kernel is compiled now, not in the first request
            shape, table = self.manifest.latent_shape, next(iter(self.manifest.update_tables().values()))
            x = self.upload(np.zeros((1, *shape), np.float32))
            a, b = (values[-1:].astype(np.float32) for values in (table.a, table.b))  # the last step takes no noise
            self._update(
                x, m := x.to(self._dtype), a, b, network_input=torch.empty_like(m)
            )  # nothing that is drawn with

    def example(self, graph: str, batch: int) -> list[torch.Tensor]:
        """Inputs of a graph's shapes, as the network reads them: a short prompt and its conditions, latents of zeros."""
        if graph in self._whole:
            steps, size = self._whole[graph]
            noise = self._zeros((batch, *self.manifest.latent_shape_of(size)))
            told = self.example(self.manifest.graph_name("denoiser", size), batch)[2:]
            k = len(self._tables[steps].renoised)
            return [*told, noise, *([noise.new_zeros((batch, k, *noise.shape[1:]))] if k else [])]
        if graph == "text_encoder":
            return [ids.expand(batch, *ids.shape[1:]).clone() for ids in self._tokens]
        dtype = self._dtype if self._capture and graph.startswith("denoiser") else torch.float32
        latents = self._zeros((batch, *self.manifest.latent_shape_of(self._sizes[graph])), dtype)
        if graph.startswith("decoder"):
            return [latents]
        conditions = [
            values.expand(batch, *values.shape[1:]).clone() for values in self._networks["text_encoder"](*self._tokens)
        ]
        one, told = torch.ones(batch, device=self.device), list[torch.Tensor]()
        if self.manifest.guidance.embedded:
            told.append(one)
        if self.manifest.control:
            size = self._sizes[graph]
            picture = torch.zeros((batch, *size, 3), dtype=torch.uint8, device=self.device)
            told += [*self._networks[self.manifest.graph_name(CONDITION_ENCODER, size)](picture), one.clone()]
        return [latents, torch.zeros(batch, device=self.device), *conditions, *told]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, device=self.device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    @property
    def graph_names(self) -> Collection[str]:
        return {*self.manifest.graph_names, *self._whole}

    @property
    def loras(self) -> Mapping[str, frozenset[str]]:
        return {name: adapter.stages for name, adapter in self._rewriter.adapters.items()}

    def adapt(self, loras: LoraSet) -> None:
        """In place, so that what is compiled or captured computes with the new weights as it is."""
        if self._rewriter.written != dict(loras):
            with self._current():
                self._rewriter.write(dict(loras))

    @torch.inference_mode()
    def upload(self, values: NDArray[Any]) -> torch.Tensor:
        return to_device(values, self.device)

    @torch.inference_mode()
    def join(self, arrays: Sequence[Any]) -> Any:
        return arrays[0] if len(arrays) == 1 else torch.cat(list(arrays))

    @torch.inference_mode()
    def run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a graph, queued; of a captured one valid until its next call. Raises ArtifactError."""
        rows = len(inputs[0])
        bucket = self._bucket(rows) if graph in self._fixed else 0
        with self._current():
            run = self._graph(graph, bucket)
            captured = isinstance(run, Captured)  # copies into its static arrays by itself, from the host too
            pads = bucket > rows and not captured
            host = torch.from_numpy if captured else self.upload
            tensors: list[Any] = [values if isinstance(values, torch.Tensor) else host(values) for values in inputs]
            if pads:
                tensors = [torch.cat([v, v[-1:].expand(bucket - rows, *v.shape[1:])]) for v in tensors]
            try:
                outputs: list[Any] = run(tensors)
            except Exception as error:  # torch's errors share no base of their own
                raise self._broken(graph, error) from None
        return [values[:rows] for values in outputs] if pads else outputs

    def denoise(self, x: Any, timestep: NDArray[np.float32], conditions: Sequence[Any]) -> Any:
        return self.run(self._at_size("denoiser", x), [x, timestep, *conditions])[0]

    @torch.inference_mode()
    def update(self, x: Any, m: Any, a: Column, b: Column, fresh: Fresh = None) -> Any:
        c, z = (None, None) if fresh is None else fresh
        if self._update is not None:
            network = self._graphs.get((self._at_size("denoiser", x), self._bucket(len(x))))
            if not isinstance(network, Captured):
                return self._update(x, m, a, b, c, noise=z)
            x_s = self._update(x, m, a, b, c, noise=z, network_input=network.next_input(len(x)))
            network.ready = x_s
            return x_s
        rows = (-1, *(1,) * (x.ndim - 1))
        updated = torch.from_numpy(a).view(rows) * x + torch.from_numpy(b).view(rows) * m
        return updated if c is None or z is None else updated + torch.from_numpy(c).view(rows) * z

    @torch.inference_mode()
    def finite(self, x: Any) -> NDArray[np.bool_]:
        return torch.isfinite(x).flatten(1).all(1).cpu().numpy()

    def decode(self, x: Any) -> Pictures:
        return self.pictures(self.run(self._at_size("decoder", x), [x]), x)

    @torch.inference_mode()
    def pictures(self, outputs: Sequence[torch.Tensor], x: Any) -> Pictures:
        """On the host; waits for the device."""
        images, finite = to_host(outputs, self.device)
        return images, finite

    def close(self) -> None:
        super().close()
        self._networks.clear()
        self._made.clear()
        self._rewriter = Rewriter({})
        if self._on_gpu:
            torch.cuda.empty_cache()

    def _current(self) -> AbstractContextManager[None]:
        return current(self.device, self._dtype)
