"""Tiny models with two LoRAs each, for the tests of LoRAs by request."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.tests import architectures
from imagine_flash.tests.loras import ATTENTION, write_lora

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
def lora_model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Model]]:
    import diffusers

    from imagine_flash.models.options import ModelOptions
    from imagine_flash.models.student import student_of

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
def lora_model(lora_model_of: Callable[[str], Model]) -> Model:
    return lora_model_of("sd15")


@pytest.fixture(scope="module")
def lora_engine(lora_model: Model) -> Iterator[Engine]:
    with Engine.load(lora_model.student, backend="torch", device="cpu", loras=lora_model.loras) as loaded:
        yield loaded


def ask(lora: dict[str, float] | None = None, **values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": PROMPT, "seed": 7, "lora": lora, **values})


def picture(engine: Engine, lora: dict[str, float] | None = None, **values: Any) -> np.ndarray:
    return engine.generate(ask(lora, **values)).images[0]


def levels(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())
