"""LoRA files of every format, against W + weight alpha / rank B A computed by hand; and those that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from imagine_flash.core.errors import ArtifactError
from imagine_flash.pipelines.lora import Lora, fuse, lora_files, parse_lora
from imagine_flash.tests import pipelines
from imagine_flash.tests.hub import publish

RANK, ALPHA = 2, 6
UNET = [f"up_blocks.0.attentions.0.transformer_blocks.0.attn1.{part}" for part in ("to_q", "to_v")]
TEXT = [f"encoder.layers.0.self_attn.{part}" for part in ("q_proj", "out_proj")]


@pytest.fixture(scope="module")
def factors():
    """Module -> (A, B) of the tiny UNet, and of the text encoder below its name."""
    pipeline, found = pipelines.build_pipeline(), {}
    generator = torch.Generator().manual_seed(0)
    for component, names in (("unet", UNET), ("text_encoder", TEXT)):
        for name in names:
            rows, columns = weight_of(pipeline, component, name).shape
            a, b = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
            found[component, name] = (0.1 * a, 0.1 * b)
    return found


def weight_of(pipeline, component, name):
    names = dict(getattr(pipeline, component).named_modules())
    return (names.get(name) or names[f"text_model.{name}"]).weight


def named(factors, pattern, component="unet") -> dict[str, torch.Tensor]:
    return {
        pattern.format(name=name, kind=kind, kohya=name.replace(".", "_"), side="up" if kind == "B" else "down"): values
        for (part, name), pair in factors.items()
        if part == component
        for kind, values in zip("AB", pair, strict=True)
    }


def diffusers_file(folder: Path, factors) -> tuple[Path, float]:
    tensors = named(factors, "unet.{name}.lora_{kind}.weight")
    tensors |= named(factors, "text_encoder.text_model.{name}.lora_linear_layer.{side}.weight", "text_encoder")
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors", 1.0


def diffusers_metadata(folder: Path, factors) -> tuple[Path, float]:
    """diffusers (0.35 on) keeps alpha in the header."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v"]).to_dict()
    kept = {f"unet.{key}": config[key] for key in ("r", "lora_alpha", "target_modules")}
    kept["unet.target_modules"] = sorted(kept["unet.target_modules"])
    save_file(
        named(factors, "unet.{name}.lora_{kind}.weight"),
        folder / "pytorch_lora_weights.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(kept), "format": "pt"},
    )
    return folder, ALPHA / RANK


def kohya_file(folder: Path, factors) -> tuple[Path, float]:
    tensors = named(factors, "lora_unet_{kohya}.lora_{side}.weight")
    tensors |= named(factors, "lora_te_text_model_{kohya}.lora_{side}.weight", "text_encoder")
    tensors |= {f"{name.split('.')[0]}.alpha": torch.tensor(float(ALPHA)) for name in list(tensors)}
    save_file(tensors, folder / "kohya.safetensors")
    return folder, ALPHA / RANK


def peft_folder(folder: Path, factors, **options) -> tuple[Path, float]:
    """What PeftModel.save_pretrained leaves, in a folder a component."""
    for component in ("unet", "text_encoder"):
        prefix = "base_model.model." + ("text_model." if component == "text_encoder" else "")
        (folder / component).mkdir()
        save_file(
            named(factors, prefix + "{name}.lora_{kind}.weight", component),
            folder / component / "adapter_model.safetensors",
        )
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v", "q_proj", "out_proj"], **options)
        config.save_pretrained(str(folder / component))
    return folder, ALPHA / (RANK**0.5 if options.get("use_rslora") else RANK)


def peft_rslora(folder: Path, factors) -> tuple[Path, float]:
    return peft_folder(folder, factors, use_rslora=True)


def peft_file(folder: Path, factors) -> tuple[Path, float]:
    """The file of the denoiser alone, its config beside it."""
    without_config(folder, factors)
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v"]).save_pretrained(str(folder))
    return folder / "adapter_model.safetensors", ALPHA / RANK


def bare_names(folder: Path, factors) -> tuple[Path, float]:
    """Of unet.save_lora_adapter."""
    save_file(named(factors, "{name}.lora_{kind}.weight"), folder / "unet.safetensors")
    return folder, 1.0


FORMATS = [diffusers_file, diffusers_metadata, kohya_file, peft_folder, peft_rslora, peft_file, bare_names]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_format_is_added_with_its_weight(tmp_path, factors, write):
    path, scale = write(tmp_path, factors)
    pipeline, before = pipelines.build_pipeline(), pipelines.build_pipeline()
    fuse(pipeline, "unet", Lora(str(path), 0.5))
    has_text = write in (diffusers_file, kohya_file, peft_folder, peft_rslora)
    for (component, name), (a, b) in factors.items():
        expected = weight_of(before, component, name)
        if component == "unet" or has_text:
            expected = expected + 0.5 * scale * b @ a
        torch.testing.assert_close(weight_of(pipeline, component, name), expected)
    others = dict(pipeline.unet.named_parameters())
    touched = {f"{name}.weight" for name in UNET}
    for name, values in before.unet.named_parameters():
        assert name in touched or torch.equal(values, others[name]), "no other weight, and every name as before"


def test_several_add_up(tmp_path, factors):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    pipeline, before = pipelines.build_pipeline(), pipelines.build_pipeline()
    for folder, write, weight in (("one", kohya_file, 0.5), ("two", peft_folder, -0.25)):
        fuse(pipeline, "unet", Lora(str(write(tmp_path / folder, factors)[0]), weight))
    for (component, name), (a, b) in factors.items():
        expected = weight_of(before, component, name) + 0.25 * ALPHA / RANK * b @ a
        torch.testing.assert_close(weight_of(pipeline, component, name), expected)


def another_prefix(folder, factors):
    save_file(named(factors, "transformer.{name}.lora_{kind}.weight"), folder / "style.safetensors")


def another_width(folder, factors):
    wide = {
        name: torch.cat([values, values], dim=1 if "lora_A" in name else 0)
        for name, values in named(factors, "unet.{name}.lora_{kind}.weight").items()
    }
    save_file(wide, folder / "style.safetensors")


def some_of_another(folder, factors):
    tensors = named(factors, "unet.{name}.lora_{kind}.weight")
    tensors |= named(factors, "text_encoder_2.text_model.{name}.lora_{kind}.weight", "text_encoder")
    save_file(tensors, folder / "style.safetensors")


def all_zero(folder, factors):
    tensors = named(factors, "unet.{name}.lora_{kind}.weight")
    save_file({n: v * ("lora_A" in n) for n, v in tensors.items()}, folder / "style.safetensors")


def a_pickle(folder, factors):
    torch.save(named(factors, "unet.{name}.lora_{kind}.weight"), folder / "pytorch_lora_weights.bin")


def two_files(folder, factors):
    diffusers_file(folder, factors)
    kohya_file(folder, factors)


def another_kind(folder, factors):
    peft_file(folder, factors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))


def without_config(folder, factors):
    save_file(named(factors, "base_model.model.{name}.lora_{kind}.weight"), folder / "adapter_model.safetensors")


def not_a_lora(folder, factors):
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (another_prefix, r"does not fit this StableDiffusionPipeline: none of its 4 tensors have a place there"),
        (another_width, r"does not fit this StableDiffusionPipeline: .*size mismatch"),
        (some_of_another, r"only 4 of its 8 tensors have a place there; was it made for another model\?"),
        (all_zero, r"changes no weight: its own, or the weight 1, are zero"),
        (a_pickle, r"pytorch_lora_weights\.bin is a pickle.*save it again as \.safetensors"),
        (two_files, r"holds kohya\.safetensors, style\.safetensors; give the path of one of them"),
        (without_config, r"does not say how strong it is: peft keeps that in adapter_config\.json; put it beside"),
        (another_kind, r"is a LOHA of peft; only LORA is read"),
        (not_a_lora, r"does not fit this StableDiffusionPipeline: Invalid LoRA checkpoint"),
        (lambda folder, factors: None, r"holds no \.safetensors file, so it is no LoRA"),
        (lambda folder, factors: folder.rmdir(), r"there is no LoRA .*give a \.safetensors file, a folder or a hub id"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, factors, write, message):
    folder = tmp_path / "lora"
    folder.mkdir()
    write(folder, factors)
    with pytest.raises(ArtifactError, match=message) as raised:
        fuse(pipelines.build_pipeline(), "unet", Lora(str(folder)))
    assert "\n" not in str(raised.value)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[str]:
    """The names of what was fetched of somebody/styles, a repository of many LoRAs."""
    import huggingface_hub

    names = [
        *(f"style-{i}.safetensors" for i in range(10)),
        "peft/adapter_config.json",
        "peft/style.safetensors",
        "a.bin",
    ]
    fetched = []

    def snapshot_download(name, *, allow_patterns, **_):
        assert allow_patterns is not None, "the whole repository was fetched, and then refused"
        fetched.extend(file for file in names if file in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


def test_of_the_hub_one_file_is_fetched(hub, tmp_path):
    assert lora_files("somebody/styles/style-3.safetensors") == {"": tmp_path / "style-3.safetensors"}
    assert lora_files("somebody/styles/peft/style.safetensors") == {"": tmp_path / "peft/style.safetensors"}
    assert hub == ["style-3.safetensors", "peft/adapter_config.json", "peft/style.safetensors"]
    for name, says in {
        "somebody/styles": r"styles holds style-0\.safetensors, .* and 2 more; name one: somebody/styles/FILE",
        "somebody/styles/b.safetensors": r"has no b\.safetensors; its files are peft/style\.safetensors, style-0",
        "somebody/styles/a.bin": r"a\.bin is a pickle",
    }.items():
        with pytest.raises(ArtifactError, match=says):
            lora_files(name)
    assert len(hub) == 3


def test_without_network_the_cache_is_looked_into(tmp_path, factors, monkeypatch):
    import huggingface_hub.constants

    (tmp_path / "made").mkdir()
    diffusers_file(tmp_path / "made", factors)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    there = publish(tmp_path / "hub", "somebody/style", tmp_path / "made") / "style.safetensors"
    assert lora_files("somebody/style") == lora_files("somebody/style/style.safetensors") == {"": there}
    with pytest.raises(ArtifactError, match="somebody/else is no folder here and could not be fetched"):
        lora_files("somebody/else/style.safetensors")

    class ConnectError(Exception):
        """Of the hub's HTTP library, no OSError."""

    def unreachable(name: str) -> None:
        raise ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    assert lora_files("somebody/style") == {"": there}


def test_a_weight_follows_the_name():
    assert parse_lora("a/b.safetensors:0.8") == Lora("a/b.safetensors", 0.8)
    assert (
        parse_lora("owner/name") == Lora("owner/name") and parse_lora("C:\\x.safetensors").name == "C:\\x.safetensors"
    )
    with pytest.raises(ArtifactError, match=r"a LoRA is PATH or PATH:WEIGHT such as .*got 'x:1\.2\.3'"):
        parse_lora("x:1.2.3")


def test_a_network_that_diffusers_has_no_loader_for(tmp_path):
    """PixArt's LoRAs are peft's."""
    from imagine_flash.tests.architectures import build_pixart

    pipeline, before = build_pixart(), build_pixart()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"], init_lora_weights=False)
    trained = inject_adapter_in_model(config, build_pixart().transformer)
    tensors = {f"base_model.model.{name}": values for name, values in get_peft_model_state_dict(trained).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(str(tmp_path))
    fuse(pipeline, "transformer", Lora(str(tmp_path)))
    name = "transformer_blocks.1.attn2.to_q"
    a, b = (tensors[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
    expected = weight_of(before, "transformer", name) + ALPHA / RANK * b @ a
    torch.testing.assert_close(weight_of(pipeline, "transformer", name), expected)
