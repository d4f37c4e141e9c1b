"""Does the export of a large model fit? Time and memory of `imagine-flash export` on full-size networks of random weights.

    python -m imagine_flash.benchmarks.full_size.export sd-turbo docs/results/export_sd_turbo.json

Neither depends on the values of the weights. The tokenizer is the embedded model's; its ids are a small part of CLIP's.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ...core.plan import StepPlan
from ...folders.files import atomic_file, hash_folder
from ...folders.manifests import StudentManifest
from ...folders.reading import write_manifest
from ..environment import git_of, hardware_of, installed_versions

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "assets/emoji/student/tokenizer"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CLIP_VOCABULARY = 49408


def build_sd_turbo() -> dict[str, Any]:
    """Stable Diffusion Turbo's networks: a UNet of 866 M parameters, OpenCLIP's text encoder of 340 M."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    )
    text = _clip(hidden=1024, layers=23, heads=16, projection=None)
    return {"class": "StableDiffusionPipeline", "unet": unet, "text_encoder": text, "vae": _vae(0.18215)}


def build_sdxl() -> dict[str, Any]:
    """Stable Diffusion XL's networks: a UNet of 2.6 G parameters, text encoders of 123 M and 695 M."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return {
        "class": "StableDiffusionXLPipeline",
        "unet": unet,
        "vae": _vae(0.13025),
        "text_encoder": _clip(hidden=768, layers=12, heads=12, projection=None),
        "text_encoder_2": _clip(hidden=1280, layers=32, heads=20, projection=1280),
    }


SHAPES = {"sd-turbo": build_sd_turbo, "sdxl": build_sdxl}


def write_student(kind: str, folder: Path) -> int:
    """Writes a student folder of that shape, float16, component by component; returns its number of parameters."""
    from diffusers import EulerDiscreteScheduler

    with torch.device("meta"):
        parts = SHAPES[kind]()
    index: dict[str, Any] = {"_class_name": parts.pop("class"), "_diffusers_version": "0.42.1"}
    total = 0
    for name, module in parts.items():
        total += sum(p.numel() for p in module.parameters())
        filled: Any = _random_weights(module.to_empty(device="cpu")).half()
        filled.save_pretrained(folder / name)
        index[name] = [module.__module__.split(".")[0], type(module).__name__]
    EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    for suffix in ("", "_2") if "text_encoder_2" in parts else ("",):
        copy = folder / f"tokenizer{suffix}"
        shutil.copytree(TOKENIZER, copy)
        config = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
        (copy / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}), encoding="utf-8")
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    plans = {1: list(StepPlan.trailing(1).timesteps)}
    write_manifest(folder, StudentManifest(plans=plans, noise_correction=True, recipe={}, teacher_sha256="0" * 64))
    return total


def measure(kind: str, out: Path, *, size: str) -> dict[str, Any]:
    """Writes the student and exports it, each in a process of its own, so that the one leaves no memory to the other.

    The record says the export's time, its largest resident memory and what was written.
    """
    with tempfile.TemporaryDirectory(prefix="imagine-flash-full-size-") as scratch:
        student, artifact = Path(scratch) / "student", Path(scratch) / "artifact"
        student.mkdir()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
            parameters = writer.submit(write_student, kind, student).result()
        arguments = ["export", str(student), str(artifact), "--batch", "1", "--sizes", size, "--name", kind]
        command = [sys.executable, "-c", "from imagine_flash.cli import main; main()", *arguments]
        started = time.perf_counter()
        export = subprocess.Popen(command)
        _, status, usage = os.wait4(export.pid, 0)
        seconds = time.perf_counter() - started
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(code)
        manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
        record = {
            "name": f"export of {kind} at {size}, batch 1, 1 step, float32 graphs",
            "parameters": parameters,
            "seconds": round(seconds, 1),
            "peak_resident_gib": round(usage.ru_maxrss / 2**20, 2),
            "bytes": {path.name: path.stat().st_size for path in sorted(artifact.iterdir()) if path.is_file()},
            "student_sha256": hash_folder(student),
            "parity": manifest["parity"],
            "nodes": {name: graph["nodes"] for name, graph in manifest["graphs"].items()},
            "hardware": hardware_of("cpu").model_dump(),
            "versions": installed_versions(),
            "git": git.model_dump() if (git := git_of(ROOT)) else None,
        }
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _clip(*, hidden: int, layers: int, heads: int, projection: int | None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=projection or hidden,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=scaling_factor,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Matrices of variance 1 / fan-in, norms of one, biases of zero: signals keep their size through the network."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(float(name.endswith("weight")))
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module


def main() -> None:
    """python -m imagine_flash.benchmarks.full_size.export KIND OUT.json [SIZE]"""
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in SHAPES:
        raise SystemExit(
            f"give one of {', '.join(SHAPES)}, the record to write and, if you like, a size such as 512x512"
        )
    record = measure(sys.argv[1], Path(sys.argv[2]), size=sys.argv[3] if len(sys.argv) == 4 else "512x512")
    print(f"{record['seconds']} s, at most {record['peak_resident_gib']} GiB")


if __name__ == "__main__":
    main()
