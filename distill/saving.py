"""Writing a model as a diffusers folder that stock diffusers draws with."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler
from torch import nn

from ..core.diffusers_samplers import plan_of
from ..core.sampler import DETERMINISTIC, Sampler
from ..folders.files import atomic_folder
from ..pipelines.architectures import architecture_of
from ..pipelines.stages import quiet
from .lora import save_adapters
from .models import Model, pipeline_in
from .processes import processes

LCM_GRID = 50  # times, of which LCMScheduler takes every so many


def save_pipeline(
    model: Model,
    out: Path,
    *,
    extra: Mapping[str, str] = {},
    replaces: Sequence[str] = (),
    scheduler: Mapping[str, Any] = {},
    sampler: Sampler = DETERMINISTIC,
    stored: Path | None = None,
) -> None:
    """Write the model's diffusers folder in half precision, in one atomic rename, from the first process.

    extra: further files by name. replaces: an old folder with one of these files gives way. scheduler: keys of its config
    that ImagineFlashScheduler reads; stock classes pass over them. sampler: what decides the stock class, and is kept there
    too. stored: the folder that all but the network is read from again, where memory holds it rounded.
    """
    if not processes().is_main_process:
        return
    rest_of = model.pipeline if stored is None else pipeline_in(stored, torch.float16)
    parts = {**rest_of.components, architecture_of(model.stages.pipeline).network: model.network}
    with quiet(), atomic_folder(out, replaces=replaces) as temporary:
        rest = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and part is not model.network}
        half = {name: copy.deepcopy(part).cpu().to(torch.float16) for name, part in rest.items()}
        half[architecture_of(model.stages.pipeline).network] = _half(model.network)
        parts |= half | {"scheduler": stock_scheduler(model, sampler, scheduler.get("plans", {}))}
        type(model.pipeline)(**parts, **settings_of(model.pipeline)).save_pretrained(str(temporary))
        for path in temporary.rglob("config.json"):
            _without_origin(path)
        config = temporary / "scheduler" / "scheduler_config.json"
        how = {} if sampler == DETERMINISTIC else {"sampler": sampler.model_dump(exclude_defaults=True)}
        values = json.loads(config.read_text(encoding="utf-8")) | dict(scheduler) | how
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, text in extra.items():
            (temporary / name).write_text(text, encoding="utf-8")


def _half(network: Any) -> Any:
    """A copy in half precision on the CPU; of its config and weights, since one that was shared out cannot be copied."""
    weights = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    with init_empty_weights():
        fresh = type(network).from_config(network.config)
    fresh.load_state_dict({n: v.half() if v.is_floating_point() else v for n, v in weights.items()}, assign=True)
    return fresh


def _without_origin(config: Path) -> None:
    """Take out the path that diffusers read a component from: it is of one machine, and models are published."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_lora(model: Model, out: Path, *, extra: Mapping[str, str], replaces: Sequence[str] = ()) -> None:
    """Write the folder of a student that is adapters alone, in one atomic rename, from the first process."""
    if not processes().is_main_process:
        return
    with quiet(), atomic_folder(out, replaces=replaces) as temporary:
        save_adapters(model, temporary)
        for name, text in extra.items():
            (temporary / name).write_text(text, encoding="utf-8")


def stock_scheduler(model: Model, sampler: Sampler, plans: Mapping[str, Sequence[int]]) -> Any:
    """diffusers' own scheduler on the model's schedule whose steps are the sampler's; at trailing times, but of a flow.

    A re-noising student's takes every so many of a grid's times: of the longest plan's where these are trailing, or of LCM's own.
    Those of a flow know no such times: they draw a plan only where the pipeline is given it as `sigmas` (docs/diffusers.md).
    """
    config, flow = dict(model.pipeline.scheduler.config), model.denoiser.schedule.kind == "flow"
    if sampler.kind == "renoise":
        if flow:
            return FlowMatchLCMScheduler.from_config(config)
        longest = max(map(int, plans), default=4)
        grid = LCM_GRID if longest <= LCM_GRID and _draws(config, LCM_GRID, plans) else longest
        return LCMScheduler.from_config(config, original_inference_steps=grid, clip_sample=False)
    if flow:
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    return DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)


def _draws(config: Mapping[str, Any], grid: int, plans: Mapping[str, Sequence[int]]) -> bool:
    """Whether an LCMScheduler on a grid of so many steps visits each plan's times."""
    known = {**config, "_class_name": "LCMScheduler", "original_inference_steps": grid}
    return all(plan_of(known, int(steps)).timesteps == tuple(plan) for steps, plan in plans.items())


def settings_of(pipeline: Any) -> dict[str, Any]:
    """The arguments of the pipeline's class that are no components, such as `requires_safety_checker`."""
    names = inspect.signature(type(pipeline).__init__).parameters.keys() - pipeline.components.keys()
    return {name: pipeline.config[name] for name in names if name in pipeline.config}
