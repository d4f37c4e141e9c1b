"""An artifact on the Hugging Face hub: the files that its manifest lists, and a model card made of it."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from ..core.errors import ArtifactError, missing_extra
from .files import ARTIFACT_FILE
from .hub import HUB_ID
from .manifests import ArtifactManifest
from .reading import read_artifact_manifest
from .sizes import sizes_text
from .triton_model import NAME

CARD = "README.md"
_GRAPH = r"(text_encoder|denoiser|decoder|(image|condition)_encoder|sampler_\d+(_from_embeddings)?)(_\d+x\d+)?"
WRITTEN = re.compile(  # what exports are made of
    rf"weights\.bin|networks\.json|tokenizer(_\d+)?\.json|(tensorrt/)?{_GRAPH}\.onnx|tensorrt/build\.json|"
    rf"openvino/{_GRAPH}\.(xml|bin)|triton_repository/({_GRAPH}|{NAME})/.+|references/\d+x\d+_(\d+|condition)\.png"
)


def push_to_hub(folder: Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads an artifact, after checking every file's hash, as the model `name` ("owner/name") in one commit; returns its
    address. The repository is made where there is none; a README.md that is there already stays, as other people's files do.
    Those of an older artifact that this one has not go, since nothing unlisted is loaded.

    private: of a repository that is made. revision: a branch, which must exist; None is main. Raises ArtifactError,
    MissingExtraError.
    """
    _check_name(name)
    try:
        hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
    except ImportError:
        raise missing_extra("huggingface_hub", "cpu") from None
    manifest = read_artifact_manifest(folder)
    api = hub.HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        add = hub.CommitOperationAdd
        changes = [add(file, str(folder / file)) for file in (*manifest.files, ARTIFACT_FILE)]
        there = set(api.list_repo_files(name, revision=revision))
        if CARD not in there:
            changes.append(add(CARD, model_card(manifest, name).encode()))
        if ARTIFACT_FILE in there:
            old = sorted(file for file in there - manifest.files.keys() if WRITTEN.fullmatch(file))
            changes += [hub.CommitOperationDelete(file) for file in old]
        api.create_commit(name, changes, commit_message=f"Upload {manifest.name}", revision=revision)
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (None, 401, 403):
            raise ArtifactError(
                f"the hub lets nobody unknown write {name}: log in with: hf auth login, as somebody who may write there"
            ) from None
        raise ArtifactError(f"the hub refused {name}: {_first_line(error)}") from None
    except Exception as error:  # errors of the network are those of the HTTP library that the hub's uses
        raise ArtifactError(f"cannot upload to {name}: {_first_line(error)}; nothing was changed there") from None
    return address


def _check_name(name: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise ArtifactError(f"a model of the hub is called OWNER/NAME, got {name!r}")


def model_card(manifest: ArtifactManifest, name: str) -> str:
    """Markdown with the hub's metadata; what it says stands in the manifest. name: what the model is called on the hub.
    Raises ArtifactError for a name that none could have."""
    _check_name(name)
    hub = import_module("huggingface_hub")
    base = manifest.sources.get("weights", "")
    base = base if HUB_ID.fullmatch(base) else ""  # a path of the machine that exported it is nobody's business
    formats = ["onnx", *manifest.formats]
    data = hub.ModelCardData(
        library_name="imagine-flash",
        pipeline_tag="text-to-image",
        tags=["imagine-flash", *formats],
        base_model=base or None,
    )
    steps = sorted(manifest.plans)
    lines = [
        f"---\n{data.to_yaml()}\n---\n\n# {manifest.name}\n",
        f"Draws pictures from text in {' or '.join(map(str, steps))} network evaluations, exported by Imagine Flash.\n",
        "```python\nfrom imagine_flash.engine import Engine, GenerateRequest\n",
        f'with Engine.from_pretrained("{name}") as engine:',
        f'    engine.generate(GenerateRequest(prompt="...", steps={manifest.default_plan})).save("picture.png")\n```\n',
        f"    imagine-flash generate PROMPT --model {name}\n",
        "| | |\n|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(manifest, base).items()),
        "\n## Against torch, at export\n",
        "| graph | PSNR of the pictures, dB | largest error of the tensors |\n|---|---:|---:|",
        *(_row(graph, errors) for graph, errors in manifest.parity.items()),
    ]
    if manifest.vocabulary:
        lines.append("\n## What it draws\n")
        lines += [f"- {group}: {', '.join(words)}" for group, words in manifest.vocabulary.items()]
    return "\n".join(lines) + "\n"


def _facts(manifest: ArtifactManifest, base: str) -> dict[str, str]:
    plans = "; ".join(f"{n}: {', '.join(f'{t:g}' for t in plan)}" for n, plan in sorted(manifest.plans.items()))
    facts = {
        "pipeline": f"diffusers' {manifest.pipeline}",
        "made of": base,
        "LoRA": ", ".join(f"{lora.name} ({lora.weight:g})" for lora in manifest.loras),
        "timesteps by steps": plans,
        "sampler": manifest.sampler.kind + (", noise correction" if manifest.noise_correction else ""),
        "guidance": f"{manifest.guidance.default:g}",
        "sizes": sizes_text(manifest.sizes, manifest.any_size),
        "precision of the graphs": manifest.precision,
        "made with": ", ".join(f"{package} {version}" for package, version in manifest.created_with.items()),
    }
    return {key: value for key, value in facts.items() if value}


def _row(graph: str, errors: dict[str, float]) -> str:
    tensors = [v for kind, v in errors.items() if not kind.endswith("_rms") and kind not in ("images", "psnr")]
    likeness = f"{errors['psnr']:.1f}" if "psnr" in errors else ""
    return f"| {graph} | {likeness} | {f'{max(tensors):.2g}' if tensors else ''} |"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
