"""LoRAs by request: the pictures of diffusers' own pipeline with them, on every backend; and no trace of them in any other."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from imagine_flash.core.errors import ArtifactError, EngineError, RequestError
from imagine_flash.core.images import psnr
from imagine_flash.core.noise import step_noise
from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.engine.backends.base import BackendOptions
from imagine_flash.engine.backends.openvino import OpenvinoBackend, processor_with_bf16
from imagine_flash.engine.backends.torch import TorchBackend
from imagine_flash.engine.backends.torch_modes import Captured
from imagine_flash.engine.backends.torch_tuning import compiled
from imagine_flash.engine.fairness import FairShare
from imagine_flash.engine.loading import LoadOptions, check_loading
from imagine_flash.engine.work import Client
from imagine_flash.export import ExportOptions, export_student
from imagine_flash.folders.files import NETWORKS_FILE
from imagine_flash.folders.reading import read_artifact_manifest
from imagine_flash.models.describe import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.pipelines.adapters import Adapter, Rewriter, read_adapters
from imagine_flash.pipelines.architectures import stages_of
from imagine_flash.tests import architectures
from imagine_flash.tests.engine.test_batching import Gate
from imagine_flash.tests.engine.test_captured import emulate, make_recordable
from imagine_flash.tests.engine.test_fairness import work
from imagine_flash.tests.loras import ATTENTION, write_lora
from imagine_flash.tests.onnxruntime_device import load

OPENVINO = find_spec("openvino") is not None

PROMPT, STEPS = "a fox on a pink background", 2
ROWS: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
TARGETS: dict[str, Any] = {  # what "ink" changes beside what "pixel" does
    "sd15": {"unet": ("conv1", "to_k", "proj_in", "to_q")},
    "sdxl": {"unet": ("conv1", "to_k", "proj_in", "to_q"), "text_encoder_2": ("q_proj", "fc1")},
    "pixart": {"transformer": ("linear_1", "to_k", "to_q")},
}
TEXTS: dict[str, Any] = {
    "sd15": {"text_encoder": ("q_proj", "out_proj")},
    "sdxl": {"text_encoder": ("q_proj", "fc1"), "text_encoder_2": ("q_proj",)},
    "pixart": {"text_encoder": ("q", "wi_0")},
}
SETS: list[dict[str, float]] = [{"pixel": 0.7, "ink": -0.3}, {"ink": 1.0}, {"pixel": 1.0}]


@dataclasses.dataclass(frozen=True)
class Model:
    """A plain diffusers folder, the student of it, and the folders of two LoRAs."""

    kind: str
    folder: Path
    student: Path
    loras: dict[str, str]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Model]]:
    root, made = tmp_path_factory.mktemp("loras"), dict[str, Model]()
    patched = pytest.MonkeyPatch()
    patched.setenv("IMAGINE_FLASH_CACHE", str(root / "cache"))

    def make(kind: str) -> Model:
        if kind not in made:
            build, network = architectures.DRAWN[kind], "transformer" if kind == "pixart" else "unet"
            pipeline = build()
            pipeline.scheduler = diffusers.EulerDiscreteScheduler(**ROWS)
            pipeline.save_pretrained(root / kind)
            student = student_of(root / kind, ModelOptions(steps=(STEPS,)))
            pixel = write_lora(root / f"{kind}-pixel", build(), {network: ATTENTION, **TEXTS[kind]}, seed=1)
            ink = write_lora(root / f"{kind}-ink", build(), TARGETS[kind], seed=2, scale=0.5)
            made[kind] = Model(kind, root / kind, student, {"pixel": str(pixel), "ink": str(ink)})
        return made[kind]

    yield make
    patched.undo()


@pytest.fixture(scope="module")
def model(model_of: Callable[[str], Model]) -> Model:
    return model_of("sd15")


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with Engine.load(model.student, backend="torch", device="cpu", loras=model.loras) as loaded:
        yield loaded


def ask(lora: dict[str, float] | None = None, **values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": PROMPT, "seed": 7, "lora": lora, **values})


def picture(engine: Engine, lora: dict[str, float] | None = None, **values: Any) -> np.ndarray:
    return engine.generate(ask(lora, **values)).images[0]


def levels(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def diffusers_pictures(model: Model) -> list[np.ndarray]:
    """Of its own pipeline without, then with each of the sets, from our noise."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(model.folder)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"latents": torch.from_numpy(step_noise(7, 1, (4, 8, 8), 0)), "output_type": "np"}
    if model.kind == "pixart":
        given |= {"height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False}

    def draw() -> np.ndarray:
        drawn = pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, **given)
        return (drawn.images[0] * 255).round().astype(np.uint8)

    pictures = [draw()]
    _load_in_diffusers(pipeline, model)
    for chosen in SETS:
        weights = [chosen.get(name, 0.0) for name in model.loras]
        for part in [pipeline] if model.kind != "pixart" else [pipeline.transformer, pipeline.text_encoder]:
            if model.kind == "pixart":  # peft's own way, since diffusers has none for this class
                _weigh(part, dict(zip(model.loras, weights, strict=True)))
            else:
                part.set_adapters(list(model.loras), weights)
        pictures.append(draw())
    return pictures


def _load_in_diffusers(pipeline: Any, model: Model) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    for name, folder in model.loras.items():
        if model.kind != "pixart":
            pipeline.load_lora_weights(folder, adapter_name=name)
            continue
        for part in sorted(Path(folder).iterdir()):
            module, config = getattr(pipeline, part.name), LoraConfig.from_pretrained(str(part))
            inject_adapter_in_model(config, module, adapter_name=name)
            tensors = load_file(part / "adapter_model.safetensors")
            named = {key.removeprefix("base_model.model."): values for key, values in tensors.items()}
            set_peft_model_state_dict(module, named, adapter_name=name)


def _weigh(module: torch.nn.Module, weights: dict[str, float]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            there: Any = layer
            there.set_adapter(list(there.lora_A))
            for name in there.lora_A:
                there.set_scale(name, weights[name])


@pytest.mark.parametrize("kind", TARGETS)
def test_they_draw_what_diffusers_draws(model_of: Callable[[str], Model], kind: str) -> None:
    model = model_of(kind)
    expected = diffusers_pictures(model)
    with Engine.load(model.student, backend="torch", device="cpu", loras=model.loras) as engine:
        assert engine.loras == ["ink", "pixel"]
        before = picture(engine)
        assert psnr(before, expected[0]) >= 45
        for chosen, other in zip(SETS, expected[1:], strict=True):
            drawn = picture(engine, chosen)
            assert psnr(drawn, other) >= 45 and levels(drawn, before) > 5
        backwards = dict(reversed(SETS[0].items()))
        assert np.array_equal(picture(engine, backwards), picture(engine, SETS[0]))
        for none in (None, {}, {"pixel": 0.0}):
            assert np.array_equal(picture(engine, none), before), "not a bit of them is left"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.weekly] * (k != "sd15")) for k in TARGETS])
def test_an_artifact_draws_with_them_what_torch_does(
    model_of: Callable[[str], Model], kind: str, tmp_path: Path
) -> None:
    """Two sizes, whose graphs share what is fed to them."""
    model, sizes = model_of(kind), ((64, 64), (64, 96))
    options = ExportOptions(batch=(1, 2), forms="stages", image_encoder=False, sizes=sizes)
    export_student(model.student, tmp_path / kind, options=options)
    wide = {"height": 64, "width": 96}
    with Engine.load(model.student, backend="torch", device="cpu", loras=model.loras, sizes=sizes) as engine:
        expected = [picture(engine, chosen, **size) for chosen in SETS for size in ({}, wide)]
    for backend in ("onnxruntime", "on device", *["openvino"] * OPENVINO):
        with load(tmp_path / kind, backend, loras=model.loras) as engine:
            before = picture(engine)
            drawn = [picture(engine, chosen, **size) for chosen in SETS for size in ({}, wide)]
            assert max(map(levels, drawn, expected)) <= 1
            assert np.array_equal(picture(engine), before)
    if OPENVINO and processor_with_bf16():
        with Engine.load(tmp_path / kind, backend="openvino", precision="bf16", loras=model.loras) as engine:
            was = picture(engine)
            drawn = [picture(engine, chosen, **size) for chosen in SETS for size in ({}, wide)]
            assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(drawn, expected, strict=True)) < 4
            assert np.array_equal(picture(engine), was)
    with Engine.load(tmp_path / kind, backend="onnxruntime") as engine:
        assert levels(picture(engine), before) <= 1
    (tmp_path / kind / NETWORKS_FILE).unlink()
    manifest = (tmp_path / kind / "manifest.json").read_text()
    assert NETWORKS_FILE in manifest and str(tmp_path) not in manifest


@pytest.mark.slow
def test_a_weight_that_equals_anothers_is_not_fed(tmp_path: Path) -> None:
    """An export stores equal weights as one, here zeros: a LoRA of one layer would have changed the other too."""
    from imagine_flash.tests import pipelines

    pipeline = pipelines.build_pipeline()
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("attn1.to_k", "attn1.to_v")):
            torch.nn.init.zeros_(module.weight)
    pipeline.save_pretrained(tmp_path / "student")
    lora = write_lora(tmp_path / "lora", pipelines.build_pipeline(), {"unet": ("to_k",)})
    options = ExportOptions(batch=(1, 2), forms="stages", image_encoder=False)
    export_student(pipelines.describe(tmp_path / "student"), tmp_path / "artifact", options=options)
    with pytest.raises(
        ArtifactError, match=r"does not hold the weight of unet\..*attn1\.to_k.*as one that can be replaced"
    ):
        Engine.load(tmp_path / "artifact", backend="onnxruntime", loras={"a": lora})


def test_sets_never_share_a_call_and_equals_do(engine: Engine) -> None:
    chosen = [None, SETS[0], SETS[1], SETS[0], None]
    alone = [picture(engine, one, seed=i) for i, one in enumerate(chosen)]
    gate = Gate(engine)
    first = engine.submit(ask(None, seed=0))
    assert gate.entered.wait(20)
    others = [engine.submit(ask(one, seed=i)) for i, one in enumerate(chosen) if i]
    gate.open.set()
    together = [drawing.result(20).images[0] for drawing in (first, *others)]
    assert max(map(levels, alone, together)) <= 1
    assert sorted(gate.calls) == [1, 1, 1, 1, 2, 2, 2], "each with its like alone, ten rows in all"


def test_the_prompt_cache_knows_the_text_encoders_loras_apart(model: Model) -> None:
    """Embeddings of the wrong set would be drawn with; those of a LoRA of the denoiser alone are the prompt's own."""
    with Engine.load(model.student, backend="torch", device="cpu", loras=model.loras) as engine:
        cached = [
            engine.generate(ask(one)).cached for one in (None, {"ink": 1.0}, {"pixel": 1.0}, {"pixel": 0.5}, None)
        ]
        assert cached == [False, True, False, False, True]
        assert engine.generate(ask({"ink": 0.2, "pixel": 0.5})).cached
        guided = ask({"pixel": 1.0}, guidance=3.0, negative_prompt="a dog")
        drawn, plain = engine.generate(guided).images, engine.generate(guided.model_copy(update={"lora": None})).images
    with Engine.load(model.student, backend="torch", device="cpu", loras=model.loras, prompt_cache_bytes=0) as fresh:
        assert np.array_equal(fresh.generate(guided).images, drawn) and levels(drawn, plain) > 1


def test_what_is_written_is_timed_and_told(engine: Engine) -> None:
    engine.generate(ask())
    changed, again = (engine.generate(ask({"pixel": 0.5, "ink": 0.0})) for _ in range(2))
    assert changed.timings.adapt > 0 == again.timings.adapt and "adapt" in changed.timings.stages()
    assert changed.loras == (("pixel", 0.5),) and changed.caption().startswith(f"{PROMPT} <lora:pixel:0.5>\n")


def test_a_half_network_is_as_it_was_afterwards(model: Model) -> None:
    with Engine.load(model.student, backend="torch", device="cpu", precision="bf16", loras=model.loras) as engine:
        before = picture(engine)
        assert levels(picture(engine, SETS[0]), before) > 5 and np.array_equal(picture(engine), before)


def test_captured_calls_draw_with_what_is_written(
    model: Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are captured before any LoRA is, and are not captured again."""
    make_recordable(monkeypatch)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model.folder)
    adapters = read_adapters(pipeline, "unet", model.loras)
    backend = TorchBackend(
        model.student,
        engine.manifest,
        stages_of(pipeline),
        torch.device("cpu"),
        name="torch-graph",
        capture=emulate,
        adapters=adapters,
    )
    backend.prepare(("text_encoder", "denoiser", "decoder"))
    with Engine(backend, engine.tokenizer, engine.manifest, max_batch=1) as captured:
        graphs = dict(backend._graphs)
        assert all(isinstance(run, Captured) for run in graphs.values())
        for chosen in (None, SETS[0], SETS[1], None):
            assert levels(picture(captured, chosen), picture(engine, chosen)) <= 1
        assert backend._graphs == graphs


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_with_what_is_written() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from imagine_flash.pipelines.lora import ADAPTER

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv1d(3, 3, 1)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), plain, adapter_name=ADAPTER)
    layer: Any = plain[0]
    plain[0] = layer.get_base_layer()
    rewriter = Rewriter({"a": Adapter({"0": layer}, frozenset({"denoiser"}))})
    with torch.inference_mode():
        x = torch.randn(2, 3, 8)
        fast, before, first = compiled(plain, [x]), plain(x), layer.get_base_layer()
        with torch.compiler.set_stance("fail_on_recompile"):
            for weight in (0.7, 0.0, -1.0):
                rewriter.write({"a": weight} if weight else {})
                expected = plain[1](x @ first.weight.T + first.bias)
                assert torch.allclose(fast(x), expected, atol=1e-6)
                assert torch.allclose(fast(x), before, atol=1e-6) == (weight == 0)


def test_a_write_that_fails_leaves_no_trace(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the layers were written when memory ran out."""
    with Engine.load(model.student, backend="torch", device="cpu", loras=model.loras) as engine:
        before, calls, delta = picture(engine), [], Adapter.delta

        def fails(self: Adapter, path: str) -> torch.Tensor:
            calls.append(path)
            if len(calls) == 4:
                raise RuntimeError("out of memory")
            return delta(self, path)

        with monkeypatch.context() as patch:
            patch.setattr(Adapter, "delta", fails)
            with pytest.raises(EngineError, match="adapt: out of memory"):
                engine.generate(ask(SETS[0]))
        assert np.array_equal(picture(engine), before)
        assert levels(picture(engine, SETS[0]), before) > 5


def test_no_set_starves() -> None:
    """In closed form: while one client asks for one set again and again, another's request has its turn at once."""
    share = FairShare()
    many = [work(Client("alice"), 1, lora={"pixel": 1.0})[0] for _ in range(20)]
    share.arrive("alice", is_waiting=False)
    share.begin(many[:4])
    share.arrive("bob", is_waiting=False)
    (other,) = work(Client("bob"), 1, lora={"ink": 1.0})
    group = share.next_group([*many[4:], other], 4, same_steps=False)
    assert group == [other]
    share.begin(group)
    group = share.next_group(many[4:], 4, same_steps=False)
    assert {chunk.job.loras for chunk in group} == {(("pixel", 1.0),)}


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"pixe": 1.0}, r"no LoRA 'pixe'; did you mean 'pixel'\?; it has ink, pixel"),
        ({"x" * 1000: 1.0}, r"no LoRA 'x{100}'; it has ink, pixel"),
        ({"pixel": float("nan")}, r"lora must be a weight from -20 to 20 by name, such as .*, got nan"),
        ({"pixel": 21}, r"lora must be .*, got 21"),
        ({"pixel": "much"}, r"lora must be .*, got 'much'"),
        ({"pixel": True}, r"lora must be .*, got True"),
        (["pixel"], r"lora must be .*, got \['pixel'\]"),
    ],
)
def test_a_request_that_cannot_be(engine: Engine, lora: Any, says: str) -> None:
    with pytest.raises(RequestError, match=f"^{says}$") as raised:
        engine.generate(ask(lora))
    assert raised.value.param == "lora"


def test_an_engine_without_any_says_so(tiny_artifact: Path) -> None:
    with Engine.load(tiny_artifact, backend="onnxruntime") as engine:
        assert engine.loras == []
        with pytest.raises(RequestError, match="no LoRA 'pixel'; none was loaded"):
            engine.generate(ask({"pixel": 1.0}))


def zero(folder: Path) -> Path:
    return write_lora(folder, architectures.DRAWN["sd15"](), {"unet": ATTENTION}, scale=0.0)


def not_finite(folder: Path) -> Path:
    return write_lora(folder, architectures.DRAWN["sd15"](), {"unet": ATTENTION}, scale=float("nan"))


def of_another_base(folder: Path) -> Path:
    return write_lora(folder, architectures.DRAWN["sdxl"](), {"unet": ATTENTION})


def more_than_factors(folder: Path) -> Path:
    return write_lora(folder, architectures.DRAWN["sd15"](), {"unet": ATTENTION}, use_dora=True)


def nothing(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (zero, "changes no weight: its own are zero"),
        (not_finite, "holds NaN or Inf, in .*to_"),
        (of_another_base, "does not fit this StableDiffusionPipeline"),
        (more_than_factors, "is more than two factors in unet.*as DoRA is; fuse it: imagine-flash export --lora"),
        (nothing, "there is no LoRA .*give a .safetensors file, a folder or a hub id"),
    ],
)
def test_a_lora_that_cannot_be_swapped(model: Model, tmp_path: Path, write: Callable[[Path], Path], says: str) -> None:
    with pytest.raises(ArtifactError, match=says) as raised:
        Engine.load(model.student, backend="torch", loras={"pixel": write(tmp_path / "lora")})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loras": {"a:b": "x"}}, r"loras: a LoRA's name has up to 100 letters.*got 'a:b'; NAME=PATH gives one"),
        ({"loras": {"": "x"}}, r"a LoRA's name has"),
        ({"loras": {"a": "x"}, "route": "sampler"}, r"whole-sampler graphs have their weights for good"),
        (
            {"loras": {"a": "x"}, "backend": "tensorrt"},
            r"LoRAs are not swapped in TensorRT plans; take the student with",
        ),
        ({"loras": {"a": "x"}, "backend": "onnxruntime"}, r"there is no LoRA x"),
    ],
)
def test_an_engine_that_cannot_be(tiny_artifact: Path, options: Any, says: str) -> None:
    with pytest.raises((ArtifactError, RequestError), match=says):
        Engine.load(tiny_artifact, **options)


def test_what_is_in_8_bits_is_not_swapped(tiny_artifact: Path) -> None:
    pytest.importorskip("openvino", reason="its precisions are asked for")
    manifest = read_artifact_manifest(tiny_artifact)
    in_8_bits = manifest.model_copy(update={"formats": {"openvino": {"weights": "int8_sym"}}})
    for precision, loras, expected in (("auto", {}, "int8"), ("auto", {"a": "x"}, "fp32"), ("int8", {"a": "x"}, None)):
        options = BackendOptions(precision=precision, loras=loras)
        if expected is None:
            with pytest.raises(ArtifactError, match="OpenVINO swaps no LoRAs in int8; take fp32 or bf16"):
                OpenvinoBackend.check(tiny_artifact, in_8_bits, options)
        else:
            assert OpenvinoBackend.check(tiny_artifact, in_8_bits, options)[2] == expected


def test_whole_samplers_alone_have_nothing_to_swap(tiny_artifact: Path, model: Model) -> None:
    from imagine_flash.engine.backends.fed_weights import FedWeights
    from imagine_flash.folders.reading import read_artifact_manifest

    manifest = read_artifact_manifest(tiny_artifact)
    whole = {name: graph for name, graph in manifest.graphs.items() if name.startswith("sampler")}
    with pytest.raises(ArtifactError, match="has no graph of a stage that the LoRA 'ink' changes"):
        FedWeights(tiny_artifact, manifest.model_copy(update={"graphs": whole}), {"ink": model.loras["ink"]})


def test_an_artifact_of_before_is_told_apart(tiny_artifact: Path, tmp_path: Path) -> None:
    from imagine_flash.engine.backends.fed_weights import FedWeights
    from imagine_flash.folders.reading import read_artifact_manifest

    for path in tiny_artifact.glob("*.onnx"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ArtifactError, match=r"does not say what its networks are made of.*export the student again"):
        FedWeights(tmp_path, read_artifact_manifest(tiny_artifact), {"a": "x"})


def test_a_file_of_a_repository_may_be_named(tiny_artifact: Path) -> None:
    """Loading fetches it; until then nothing is wrong with it."""
    check_loading(tiny_artifact, LoadOptions(loras={"ink": "owner/name/ink.safetensors"}))
    with pytest.raises(ArtifactError, match=r"lora ink: there is no \./name/ink.safetensors"):
        check_loading(tiny_artifact, LoadOptions(loras={"ink": "./name/ink.safetensors"}))
