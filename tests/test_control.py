"""--controlnet and --condition, as a user types them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagine_flash.engine import Engine, GenerateRequest
from imagine_flash.models.options import ModelOptions
from imagine_flash.models.student import student_of
from imagine_flash.tests import control, pipelines
from imagine_flash.tests.commands import fails, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a ControlNet for it, and a conditioning picture of twice its size."""
    folder = tmp_path_factory.mktemp("made")
    pipelines.build_student(folder / "student", half=False)
    control.saved(control.build_controlnet(pipelines.build_pipeline().unet), folder / "canny")
    Image.fromarray(control.picture(1, side=128)).save(folder / "edges.png")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))


def generate(made: Path, *options: Any) -> tuple[Any, ...]:
    return ("generate", "a cat", "--seed", "7", "--model", made / "student", "--backend", "torch", *options)


def test_generate_draws_under_a_picture(made: Path, tmp_path: Path) -> None:
    out, canny = tmp_path / "cat.png", made / "canny"
    options = ("--controlnet", canny, "--condition", made / "edges.png", "--condition-scale", "0.8", "-o", out)
    done = run(*generate(made, *options))
    assert done.returncode == 0, done.stderr
    assert f"student: control from {canny}, a ControlNet\n" in done.stderr
    with Engine.load(student_of(made / "student", ModelOptions(controlnet=str(canny)))) as engine:
        condition = np.asarray(Image.open(made / "edges.png").resize((64, 64), Image.Resampling.BICUBIC))
        asked = GenerateRequest(prompt="a cat", seed=7, condition=condition, condition_scale=0.8)
        expected = engine.generate(asked).images[0].astype(int)
    assert np.abs(np.asarray(Image.open(out)).astype(int) - expected).max() <= 1


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no network": (("--condition", "{edges}"), "reads no conditioning picture"),
    "no picture": (("--controlnet", "{canny}", "--condition", "nowhere.png"), "cannot read nowhere.png"),
    "a scale alone": (("--controlnet", "{canny}", "--condition-scale", "1"), "condition_scale needs a condition"),
    "a negative scale": (
        ("--controlnet", "{canny}", "--condition", "{edges}", "--condition-scale=-1"),
        "condition_scale must be a number from 0 to 10",
    ),
    "no folder": (("--controlnet", "nowhere"), "there is no ControlNet nowhere"),
    "another class": (("--controlnet", "{student}/vae"), "holds a AutoencoderKL"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_line(name: str, made: Path) -> None:
    options, says = BAD[name]
    places = {"canny": made / "canny", "edges": made / "edges.png", "student": made / "student"}
    assert says in fails(*generate(made, *(option.format(**places) for option in options)))


def test_the_embedded_model_takes_none(made: Path) -> None:
    line = fails("generate", "a fox", "--controlnet", made / "canny")
    assert "--controlnet goes with --model" in line


@pytest.mark.slow
@pytest.mark.weekly  # the exporter's and the server's tests do it, each its half
def test_export_and_generate_from_the_artifact(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    short = ("--batch", "1", "--steps", "1", "--no-image-encoder")
    done = run("export", made / "student", out, "--controlnet", made / "canny", *short)
    assert done.returncode == 0 and done.stdout == f"{out}\n", done
    assert json.loads((out / "manifest.json").read_text())["control"] == "ControlNetModel"
    asked = ("generate", "a cat", "--model", out, "--condition", made / "edges.png", "-o", tmp_path / "cat.png")
    assert run(*asked).returncode == 0
    verified = run("inspect", out, "--run")
    assert verified.returncode == 0 and "FAIL" not in verified.stdout and "ok  " in verified.stdout
    assert "control: ControlNetModel" in verified.stdout
    assert "was exported with its networks" in fails(*asked, "--controlnet", made / "canny")
