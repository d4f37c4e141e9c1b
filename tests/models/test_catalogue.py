"""The catalogue: every entry can be sampled, is found by name and hub id, and says where its facts come from."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imagine_flash.core.errors import ArtifactError
from imagine_flash.core.prediction import PREDICTION_TYPES
from imagine_flash.core.schedule import NoiseSchedule, is_flow, prediction_type_of
from imagine_flash.core.update import update_table
from imagine_flash.models.catalogue import as_markdown, catalogue, entry_called, find
from imagine_flash.pipelines.architectures import ARCHITECTURES

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
BASE = SD | {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "steps_offset": 1}


@pytest.mark.parametrize("name", catalogue())
def test_every_entry_can_be_sampled(name: str) -> None:
    entry = catalogue()[name]
    config = {"shift": 3.0} if is_flow(entry.scheduler) else BASE
    scheduler = entry.scheduler_of(config)
    assert prediction_type_of(scheduler) in PREDICTION_TYPES
    for steps, plan in entry.plans(config).items():
        table = update_table(
            NoiseSchedule.from_scheduler_config(scheduler),
            entry.plan(config, steps),
            prediction_type_of(scheduler),
            noise_correction=False,
            sampler=entry.sampler_of(config),
        )
        assert len(table) == len(plan) == steps
    assert all(source.startswith("https://") for source in entry.sources) and not entry.verified
    assert entry.pipeline in ARCHITECTURES


def test_entries_are_found_by_name_and_by_hub_id_and_steps() -> None:
    assert entry_called("sd-turbo") is entry_called("stabilityai/sd-turbo")
    found = find("ByteDance/SDXL-Lightning", 2)
    assert found is not None and found.name == "sdxl-lightning-2step"
    found = find("ByteDance/SDXL-Lightning/sdxl_lightning_8step_lora.safetensors")
    assert found is not None and found.name == "sdxl-lightning-8step-lora"
    assert find("somebody/else") is None
    with pytest.raises(ArtifactError, match="did you mean 'sd-turbo'"):
        entry_called("sd-turbos")


def test_plans_are_those_of_the_cards() -> None:
    plans = {name: entry.plans(BASE) for name, entry in catalogue().items() if not is_flow(entry.scheduler)}
    assert plans["sd-turbo"][1] == [999] and plans["dmd2-sdxl-lora"] == {4: [999, 749, 499, 249]}
    assert plans["hyper-sdxl-1step"] == {1: [800]} and plans["lcm-lora-sdxl"][4] == [999, 759, 499, 259]
    assert catalogue()["flux.1-schnell"].plans({})[4] == [999, 749, 499, 249]


def test_the_command_lists_them() -> None:
    from imagine_flash.cli import app

    listed = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert [one["name"] for one in listed] == list(catalogue()) and listed[0]["fits"] in (True, False, None)
    table = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["models"]).stdout.splitlines()
    (row,) = (line for line in table if line.startswith("lcm-dreamshaper-v7 "))
    assert row.split()[:3] == ["lcm-dreamshaper-v7", "1-8", "768x768"] and row.split()[-1] == "mit"
    assert any(line.startswith("hyper-sdxl-lora") and " 1,2,4,8 " in line for line in table)


def test_the_documentation_has_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert as_markdown() in page, "put models.catalogue.as_markdown() into docs/models.md"
