"""Pictures with captions of one's own: real files of every kind that is read, sizes, and a whole command."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.distill.data.captioned import PictureSource
from imagine_flash.distill.data.columns import loaded, rows_of
from imagine_flash.distill.data.pictures import bucket_sizes, picture_set
from imagine_flash.distill.methods import distill_recipe
from imagine_flash.distill.models import Model, load_model, model_of
from imagine_flash.distill.reproducible import Part
from imagine_flash.distill.task import DistillTask
from imagine_flash.tests.architectures import BUILDERS, build_pixart
from imagine_flash.tests.commands import run
from imagine_flash.tests.distill.picture_sets import (
    COLOURS,
    FIT,
    RECIPE,
    image_folder,
    picture,
    saved_dataset,
    web_dataset,
)
from imagine_flash.tests.pipelines import CAPTIONS


@pytest.fixture(scope="module")
def model(teacher: Path) -> Model:
    return load_model(teacher)


@pytest.fixture
def quiet() -> Iterator[Console]:
    with open("/dev/null", "w") as nowhere:
        yield Console(file=nowhere)


def captions_of(place: Path | str, columns: tuple[str, str] | None = None) -> list[str]:
    return [each.caption for each in PictureSource(place=str(place), columns=columns)]


KINDS = ("metadata.jsonl", "metadata.csv", "metadata.parquet", ".txt", "tars", "tar pattern", "saved", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_set_gives_the_same_pictures(kind: str, model: Model, quiet: Console, tmp_path: Path) -> None:
    if kind.startswith("tar"):
        place = str(web_dataset(tmp_path / "set")) + ("/*.tar" if kind == "tar pattern" else "")
    elif kind in ("saved", "parquet"):
        place = str(saved_dataset(tmp_path / "set", kind))
    else:
        place = str(image_folder(tmp_path / "set", kind))
    found = picture_set(model, PictureSource(place=place), tmp_path / "kept", most=100, console=quiet)
    assert found.captions == list(CAPTIONS)
    (latents,) = found.latents
    squares = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in COLOURS])
    expected = model.stages.image_encoder(torch.from_numpy(squares))
    tolerance = 0.2 if kind.startswith("tar") else 2e-3  # JPEG and WebP are not exact
    torch.testing.assert_close(latents.float(), expected, atol=tolerance, rtol=1e-2)


def test_the_whole_command_stopped_and_resumed(teacher: Path, tmp_path: Path) -> None:
    """Two updates with the discriminator in buckets; one, a stop, and the second; the weights are the same."""
    from diffusers import StableDiffusionPipeline

    folder = image_folder(tmp_path / "set", "metadata.jsonl")
    (folder / "1.png").write_bytes(picture(1, (64, 128)))
    for steps, out in ((2, "whole"), (1, "resumed"), (2, "resumed")):
        recipe = tmp_path / "recipe.json"
        recipe.write_text(json.dumps({**RECIPE, "fit": {**FIT, "steps": steps}}))
        done = run("distill", teacher, tmp_path / out, "--recipe", recipe, "--pictures", folder, "--buckets")
        assert done.returncode == 0, done.stderr
        assert ("pictures: 4 of 64x64, 1 of 48x80" in done.stderr) == ((steps, out) != (2, "resumed")), done.stderr
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "resumed" / weights).read_bytes()
    assert StableDiffusionPipeline.from_pretrained(str(tmp_path / "whole")).unet.config.sample_size == 8


def test_a_batch_is_of_one_size_and_each_picture_as_often(model: Model) -> None:
    """Every row's picture is that of its prompt, in several parts as in one, and the size is drawn by how many have it."""
    groups = [torch.full((3, 4, 8, 8), 0.0), torch.full((2, 4, 6, 10), 0.0)]
    for i, latents in enumerate((*groups[0], *groups[1])):
        latents.fill_(i)
    recipe = distill_recipe({"method": "lcm", "fit": {**FIT, "batch": 4}})
    task = DistillTask(recipe, model.of_any_size(), list(CAPTIONS), "", pictures=groups)
    drawn = torch.zeros(5)
    for step in range(400):
        rows, pictures = task._rows(step, 4, torch.Generator().manual_seed(step))
        assert pictures is not None and torch.equal(pictures[:, 0, 0, 0], rows.float())
        assert tuple(pictures.shape[1:]) == ((4, 8, 8) if int(rows[0]) < 3 else (4, 6, 10))
        drawn += rows.bincount(minlength=5)
    assert (drawn / drawn.sum()).sub(0.2).abs().max() < 0.03
    step = next(i for i in range(20) if task.batch(i, Part())["x0"].shape[-1] == 10)
    whole, parts = task.batch(step, Part()), [task.batch(step, Part(i, 2)) for i in range(2)]
    for name in ("x0", "noise"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert task.module(**whole).isfinite()


@pytest.mark.parametrize("kind", [*BUILDERS, "pixart-told-its-size"])
def test_a_network_is_told_the_size_of_what_it_gets(kind: str) -> None:
    pipeline = BUILDERS[kind]() if kind in BUILDERS else build_pixart(128)
    model = model_of(pipeline)
    text, generator = model.embed(["a cat"]), torch.Generator().manual_seed(0)
    sizes = bucket_sizes(model)
    assert model.stages.default_size in sizes and len(sizes) > 2
    for size in [(64, 96), (96, 64)]:
        x = torch.randn(1, *model.stages.latent_shape(size), generator=generator)
        told = model.stages.denoiser(size)(x, torch.tensor([499.0]), *text)
        for other in (model.of_any_size(), model.of_any_size().trainable_copy()):
            torch.testing.assert_close(other.denoiser.network(x, torch.tensor([499.0]), *text), told)


def test_bucket_sizes_of_a_model_of_512(model: Model) -> None:
    """Never larger than the teacher's, what the UNet can halve and double, and close to every shape up to 1:2."""
    large = replace(model, stages=replace(model.stages, default_size=(512, 512), any_multiple=64))
    sizes = bucket_sizes(large)
    assert (512, 512) in sizes and (640, 384) in sizes and all(h % 64 == w % 64 == 0 for h, w in sizes)
    assert all(0.65 * 512**2 < h * w <= 512**2 and 0.5 <= h / w <= 2 for h, w in sizes)
    assert sizes == sorted({(w, h) for h, w in sizes})


def test_pictures_are_turned_flattened_and_cropped_in_the_middle(model: Model, quiet: Console, tmp_path: Path) -> None:
    """A photograph that a camera marked as turned; and transparency, which is white."""
    folder = image_folder(tmp_path / "set", "none", ())
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255  # its middle, white
    turned = Image.fromarray(wide.transpose(1, 0, 2))
    exif = turned.getexif()
    exif[274] = 6  # 90 degrees clockwise
    turned.save(folder / "0.png", exif=exif)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "1.png")
    Image.new("L", (640, 640), 255).save(folder / "2.png")
    for i in range(3):
        (folder / f"{i}.txt").write_text("white")
    (latents,) = picture_set(model, PictureSource(place=str(folder)), tmp_path / "kept", most=9, console=quiet).latents
    white = model.stages.image_encoder(torch.full((1, 64, 64, 3), 255, dtype=torch.uint8))
    for each in latents:
        torch.testing.assert_close(each[None].float(), white, atol=2e-3, rtol=1e-2)


def test_pictures_are_encoded_again_only_where_something_changed(model: Model, quiet: Console, tmp_path: Path) -> None:
    folder, kept = image_folder(tmp_path / "set", ".txt"), tmp_path / "kept"

    def digest(**more: Any) -> str:
        return picture_set(model, PictureSource(place=str(folder), **more), kept, most=9, console=quiet).digest

    first, written = digest(), kept.stat().st_mtime_ns
    assert digest() == first and kept.stat().st_mtime_ns == written
    assert digest(buckets=True) == first and kept.stat().st_mtime_ns > written  # the same pictures, looked at again
    (folder / "0.txt").write_text("something else")
    assert digest() != first


def test_what_cannot_be_used_is_left_out_and_said(model: Model, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", "metadata.jsonl")
    (folder / "1.png").write_bytes(b"this is no picture")
    (folder / "2.png").write_bytes(picture(2)[:60])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[3]["text"] = None
    rows[4]["file_name"] = "gone.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = Console(file=io.StringIO(), width=1000)
    found = picture_set(model, PictureSource(place=str(folder)), tmp_path / "kept", most=9, console=said)
    assert found.captions == [CAPTIONS[0]] and len(found.latents[0]) == 1
    text = said.file.getvalue()  # type: ignore[attr-defined]
    assert f"left out: 3 cannot be read: {folder}/1.png (no picture), {folder}/2.png" in text
    assert f"{folder}/gone.png (no such file or directory)" in text
    assert f"left out: 1 have no readable caption: {folder}/3.png" in text


def test_teachers_in_half_precision_encode_pictures(teacher: Path, quiet: Console, tmp_path: Path) -> None:
    """It happened that the hash of bfloat16 weights went through NumPy, which has no such type; and float16 may overflow."""
    source = PictureSource(place=str(image_folder(tmp_path / "set", ".txt")))
    half = load_model(teacher, torch.bfloat16)
    assert len(picture_set(half, source, tmp_path / "kept", most=9, console=quiet).captions) == len(CAPTIONS)
    half.pipeline.vae.encoder.conv_in.weight.data.fill_(torch.inf)
    with pytest.raises(ImagineFlashError, match="take teacher_dtype: bfloat16 or float32"):
        picture_set(half, source, tmp_path / "kept", most=9, console=quiet)


def test_what_a_set_of_the_hub_may_hold(tmp_path: Path) -> None:
    """Tars are read by our own reader alone; pictures may stand in files of the hub's that rows name."""
    datasets, fsspec = pytest.importorskip("datasets"), pytest.importorskip("fsspec")
    with pytest.raises(ImagineFlashError, match="is a set of tars; fetch them"):
        loaded(str(web_dataset(tmp_path / "tars")))
    memory = type(fsspec.filesystem("memory"))
    known = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", memory, clobber=True)  # a hub in memory
    try:
        memory.store.clear()
        with fsspec.open("hf://set/0.png", "wb") as file:
            file.write(picture(0))
        images = [{"bytes": None, "path": f"hf://set/{i}.png"} for i in range(2)]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
        texts = [["a fox", "an animal"], ["a cat"]]
        made = datasets.Dataset.from_dict({"image": images, "text": texts}, features=features)
        rows = [(data, caption) for _, data, caption in rows_of(made, "set", None)]
    finally:
        fsspec.register_implementation("hf", known, clobber=True)
    assert rows == [(picture(0), "a fox"), (b"", "a cat")]


def test_a_hub_set_without_network_or_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImagineFlashError, match="cannot read the dataset nobody/nothing: "):
        captions_of("nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImagineFlashError, match=r"needs datasets: pip install 'imagine-flash\[data\]'"):
        captions_of("nobody/nothing")


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_pictures_may_be_links(kind: str, tmp_path: Path) -> None:
    """They were followed first, and then refused since they lead elsewhere."""
    real, folder = image_folder(tmp_path / "real", kind), image_folder(tmp_path / "set", "none", ())
    (folder / "metadata").symlink_to(real / kind)
    (folder / "metadata").rename(folder / kind)
    for i in range(len(CAPTIONS)):
        (folder / f"{i}.png").symlink_to(real / f"{i}.png")
    found = list(PictureSource(place=str(folder)))
    assert [each.caption for each in found] == list(CAPTIONS)
    assert [Path(str(each.picture)).read_bytes() for each in found] == [picture(i) for i in range(len(CAPTIONS))]


def test_another_scale_or_last_layer_of_the_autoencoder_encodes_again(
    teacher: Path, quiet: Console, tmp_path: Path
) -> None:
    """Latents kept for an autoencoder of the same encoder served another scaling factor, and their scale was wrong."""
    source = PictureSource(place=str(image_folder(tmp_path / "set", ".txt")))

    def first(model: Model) -> torch.Tensor:
        return picture_set(model, source, tmp_path / "kept", most=9, console=quiet).latents[0].float()

    shutil.copytree(teacher, tmp_path / "teacher")
    config = tmp_path / "teacher" / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "scaling_factor": 2 * values["scaling_factor"]}))
    before, scaled = first(load_model(teacher)), load_model(tmp_path / "teacher")
    torch.testing.assert_close(first(scaled), 2 * before, atol=2e-3, rtol=1e-2)
    scaled.pipeline.vae.quant_conv = torch.nn.Conv2d(8, 8, 1, bias=False)
    torch.nn.init.dirac_(scaled.pipeline.vae.quant_conv.weight)
    scaled.pipeline.vae.quant_conv.weight.data.mul_(0.5)
    torch.testing.assert_close(first(scaled), before, atol=2e-3, rtol=1e-2)
