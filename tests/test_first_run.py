"""A model by its name, from a cache laid out as the hub's, without network: the first run exports it, the second starts there."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from imagine_flash.cli.first_run import ready
from imagine_flash.folders.files import STUDENT_FILE
from imagine_flash.models.options import ModelOptions
from imagine_flash.tests import architectures, pipelines
from imagine_flash.tests.checkpoints import write_checkpoint
from imagine_flash.tests.commands import fails, run
from imagine_flash.tests.hub import publish


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stabilityai/sd-turbo, and the tiny decoder that the catalogue names for it, as small random networks."""
    import diffusers

    made, hub = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("hub")
    pipeline = pipelines.build_pipeline()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    pipeline.save_pretrained(made / "turbo")
    publish(hub, "stabilityai/sd-turbo", made / "turbo")
    pipelines.build_vae("tiny", 16).save_pretrained(made / "taesd")
    publish(hub, "madebyollin/taesd", made / "taesd")
    for part in ("unet", "text_encoder", "vae"):  # as many repositories are: half precision alone
        for path in (made / "turbo" / part).glob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
    publish(hub, "somebody/half", made / "turbo")
    (made / "turbo" / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(
        made / "turbo" / "unet" / "diffusion_pytorch_model.bin"
    )
    publish(hub, "somebody/pickles", made / "turbo")
    return hub


@pytest.fixture(autouse=True)
def caches(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("IMAGINE_FLASH_CACHE", str(tmp_path / "cache"))


def test_a_student_of_ours_on_the_hub_is_drawn_as_its_folder_is(hub: Path, tiny_student: Path) -> None:
    """The folder ran in torch, the hub id of the same student was exported first."""
    publish(hub, "somebody/student", tiny_student)
    found = ready("somebody/student", ModelOptions(), "auto")
    assert found is not None and found.is_relative_to(hub) and (found / STUDENT_FILE).is_file()


@pytest.mark.slow
def test_the_first_run_exports_and_the_second_starts_there(tmp_path: Path) -> None:
    out, again = tmp_path / "first.png", tmp_path / "second.png"
    asked = ["generate", "a cat", "--model", "stabilityai/sd-turbo", "--seed", "7"]
    first = run(*asked, "-o", out)
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith("sd-turbo: decodes with madebyollin/taesd, a tiny one\n")
    assert "plans, sampler, guidance from the catalogue's sd-turbo" in first.stderr
    assert f"exporting sd-turbo once into {tmp_path}/cache/exports/" in first.stderr and "(1 steps" in first.stdout
    second = run(*asked, "-o", again)
    assert "exporting" not in second.stderr and again.read_bytes() == out.read_bytes()
    listed = json.loads(run("cache", "list", "--json").stdout)
    export = next(one for one in listed if one["kind"] == "exports")
    assert (export["name"], export["source"]) == ("sd-turbo", "stabilityai/sd-turbo") and export["bytes"] > 100_000
    assert re.search(r"sd-turbo +│ exports +│ stabilityai/sd-turbo", run("cache", "list").stdout)
    gone = run("cache", "remove", "stabilityai/sd-turbo").stdout
    assert f"removed {export['path']}" in gone and not Path(export["path"]).exists()
    assert not any(one["kind"] == "exports" for one in json.loads(run("cache", "list", "--json").stdout))


def test_guidance_and_steps_that_it_was_not_trained_for(tmp_path: Path) -> None:
    """--quality: the model's own decoder. By torch, which needs no export."""
    asked = ["generate", "a cat", "--model", "sd-turbo", "--backend", "torch", "-o", tmp_path / "cat.png"]
    done = run(*asked, "--quality", "--guidance", "3")
    assert done.stderr.startswith("sd-turbo: decodes with the model's own\n")
    assert "note: sd-turbo was made for guidance 1, which is none; drawn with 3" in done.stderr
    assert "note:" not in run(*asked, "--guidance", "1").stderr
    assert "trained for no other; --any-steps draws anyway" in fails(*asked, "--steps", "6")
    done = run(*asked, "--steps", "6", "--any-steps")
    assert done.returncode == 0 and "plans from option steps, which it was not trained for" in done.stderr


def test_half_precision_alone_is_what_is_drawn_with(tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    asked = ["generate", "a cat", "--model", "somebody/half", "--steps", "1", "--backend", "torch", "-o", out]
    assert run(*asked).returncode == 0
    done = run(*asked, "--as", "sdxl-turbo")
    assert (
        "weights from somebody/half" in done.stderr
        and "sampler, guidance from the catalogue's sdxl-turbo" in done.stderr
    )


def test_what_is_missing_is_said(hub: Path, tmp_path: Path) -> None:
    from imagine_flash.folders.cache import check_room

    asked = ["generate", "a cat", "--steps", "1", "-o", tmp_path / "cat.png", "--model"]
    assert "holds its weights as a pickle alone" in fails(*asked, "somebody/pickles")
    assert f"copy it to {hub}/models--somebody--else, or give the path" in fails(*asked, "somebody/else")
    (hub / "models--somebody--half/snapshots" / ("a" * 40) / "vae/diffusion_pytorch_model.fp16.safetensors").unlink()
    said = fails(*asked, "somebody/half")
    assert (
        "is not whole: it has no vae/diffusion_pytorch_model.safetensors; " in said
        and "without put the files there" in said
    )
    with pytest.raises(
        Exception, match=r"an export takes about 1024\.0 EiB|an export takes about .* GiB at .* are free"
    ):
        check_room(tmp_path / "out" / "artifact", 2**60, "an export")


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20 // 8))
    said = fails("generate", "a cat", "--model", "sd-turbo", "-o", tmp_path / "cat.png")
    assert "the export of sd-turbo takes about" in said and "imagine-flash cache prune" in said
    assert not list((tmp_path / "cache" / "exports").rglob("*.onnx"))


def test_less_memory_than_needed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from imagine_flash.models import machine

    monkeypatch.setattr(machine, "memory_of_this_machine", lambda: 16 * 2**30)
    assert machine.advice(1.29e9) is None
    assert "--backend torch --precision bf16 draws without an export and holds 6.5 GiB" in (
        machine.advice(3.47e9) or ""
    )
    assert "see what fits: imagine-flash models" in (machine.advice(13.7e9) or "")


def test_a_tiny_decoder_is_named_or_refused(hub: Path, tmp_path: Path) -> None:
    asked = ["generate", "a cat", "--backend", "torch", "--seed", "7", "-o", tmp_path / "cat.png"]
    done = run(*asked, "--model", "sd-turbo", "--tiny-decoder", "none")
    assert done.stderr.startswith("sd-turbo: decodes with the model's own\n")
    assert "needs config.json and a .safetensors" in fails(*asked, "--model", "sd-turbo", "--tiny-decoder", tmp_path)
    assert "no folder here" in fails(*asked, "--model", "sd-turbo", "--tiny-decoder", "somebody/nothing")
    assert "goes with --model" in fails(*asked, "--tiny-decoder", "madebyollin/taesd")
    architectures.told_guidance(pipelines.build_pipeline()).save_pretrained(tmp_path / "told")
    done = run(*asked, "--model", tmp_path / "told", "--as", "lcm-dreamshaper-v7", "--steps", "1")
    assert "decodes with madebyollin/taesd" in done.stderr and "note: " not in done.stderr


def test_a_whole_pipeline_in_one_file(hub: Path, tmp_path: Path) -> None:
    """Read by diffusers' from_single_file with the configs of a folder, or of the catalogue's hub id."""
    file, out, other = tmp_path / "mine.safetensors", tmp_path / "cat.png", tmp_path / "folder.png"
    write_checkpoint(pipelines.build_pipeline(), file)
    folder = hub / "models--stabilityai--sd-turbo/snapshots" / ("a" * 40)
    asked = ["generate", "a cat", "--seed", "7", "--backend", "torch", "--steps", "1", "--model", file, "-o", out]
    done = run(*asked, "--base", folder)
    assert done.returncode == 0, done.stderr
    run(*asked[:-3], folder, "-o", other)
    one, another = (np.asarray(Image.open(path)).astype(int) for path in (out, other))
    assert np.abs(one - another).max() <= 3, "half precision"
    done = run(*asked, "--as", "sd-turbo")
    assert done.returncode == 0 and "decodes with madebyollin/taesd" in done.stderr
    assert "does not say which pipeline it is: add --base" in fails(*asked)
    assert "does not load as a StableDiffusionPipeline" in fails(*asked[:-3], _cut(file), "-o", out, "--base", folder)
    assert "goes with a single .safetensors file" in fails(*asked[:-3], folder, "-o", out, "--base", folder)


def _cut(file: Path) -> Path:
    """A file that ends in the middle."""
    damaged = file.with_name("cut.safetensors")
    damaged.write_bytes(file.read_bytes()[:20_000])
    return damaged


def test_of_a_repository_with_several_models_the_one_of_so_many_steps_is_taken(hub: Path, tmp_path: Path) -> None:
    """`generate --steps 2` took the first, which draws in four, and then refused the steps."""
    base, lightning = tmp_path / "base", tmp_path / "lightning"
    pipelines.build_pipeline().save_pretrained(base)
    publish(hub, "stabilityai/stable-diffusion-xl-base-1.0", base)
    lightning.mkdir()
    for steps in (2, 4):
        file = lightning / f"sdxl_lightning_{steps}step_unet.safetensors"
        file.write_bytes((base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    publish(hub, "ByteDance/SDXL-Lightning", lightning)
    asked = [
        "generate",
        "a cat",
        "--model",
        "ByteDance/SDXL-Lightning",
        "--backend",
        "torch",
        "-o",
        tmp_path / "cat.png",
    ]
    two, four = run(*asked, "--steps", "2"), run(*asked)
    assert "from the catalogue's sdxl-lightning-2step" in two.stderr and "(2 steps" in two.stdout, two.stderr
    assert "from the catalogue's sdxl-lightning-4step" in four.stderr and "(4 steps" in four.stdout, four.stderr


def test_a_name_of_the_catalogue_is_exported_for_replicas_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve --ray` said that sd-turbo does not exist. Ray itself is not started here."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from imagine_flash.engine.replicas import run as replicas

    served: list[Path] = []
    monkeypatch.setattr(replicas, "run", lambda settings, ready: served.append(settings.model))
    done = run("serve", "--ray", "--model", "sd-turbo", "--backend", "torch", "--port", "0")
    assert done.returncode == 0, done.stderr
    assert (served[0] / "imagine_flash.json").is_file()
    monkeypatch.setattr(replicas, "cluster", lambda: "10.0.0.1:6379")
    said = fails("serve", "--ray", "--model", "sd-turbo", "--port", "0")
    assert "run imagine-flash export sd-turbo OUT, and give OUT" in said and len(served) == 1
