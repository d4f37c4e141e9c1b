"""Random LoRAs of the tiny pipelines, as diffusers or peft save them; a module like pipelines.py."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ATTENTION = ("to_q", "to_v")


def write_lora(
    folder: Path,
    pipeline: Any,
    targets: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
    scale: float = 1.0,
    **options: Any,
) -> Path:
    """A LoRA of rank 2 of these layers of these components, as diffusers saves it, or as peft where diffusers saves none of this
    class. options: of peft's LoraConfig. The pipeline is not as it was, afterwards."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    factors, configs = {}, {}
    for component, names in targets.items():
        config = LoraConfig(r=2, lora_alpha=4, target_modules=list(names), init_lora_weights=False, **options)
        module = inject_adapter_in_model(config, getattr(pipeline, component))
        found = get_peft_model_state_dict(module).items()
        factors[component] = {name: values * (scale if "lora_B" in name else 1.0) for name, values in found}
        configs[component] = config
    if hasattr(pipeline, "save_lora_weights"):
        layers: dict[str, Any] = {f"{component}_lora_layers": values for component, values in factors.items()}
        metadata: dict[str, Any] = {
            f"{component}_lora_adapter_metadata": {
                "r": 2,
                "lora_alpha": 4,
                "target_modules": list(targets[component]),
                **options,
            }
            for component in targets
        }
        pipeline.save_lora_weights(folder, **layers, **metadata)
        return folder
    for component, values in factors.items():
        (folder / component).mkdir(parents=True)
        named = {f"base_model.model.{name}": one for name, one in values.items()}
        save_file(named, folder / component / "adapter_model.safetensors")
        configs[component].save_pretrained(str(folder / component))
    return folder
