"""What a user may say of a model."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from ..core.checked import Checked
from ..core.errors import ArtifactError
from ..core.prediction import check_prediction_type
from ..core.sampler import Kind
from .catalogue import entry_called

MOST_GUIDANCE = 50


class ModelOptions(Checked):
    """What a user says of a model that says too little, or something else, of itself. ArtifactError in one line.

    entry: a name of the catalogue that the folder is read as. steps: the numbers of steps that there shall be plans for; any_steps:
    also those that it was not trained for. timesteps: of one plan, the noisiest first. sampler: instead of the scheduler's.
    tiny_decoder: a folder or hub id of an AutoencoderTiny that takes the decoder's place, or "none"; prefer_tiny: without one,
    that of the catalogue where it can be had. controlnet: a folder or hub id of a ControlNet or T2I-adapter, which reads a
    conditioning picture.
    """

    refusal = ArtifactError

    entry: str | None = None
    steps: tuple[int, ...] | None = None
    any_steps: bool = False
    timesteps: tuple[int | float, ...] | None = None
    sampler: Kind | None = None
    prediction: str | None = None
    guidance: float | None = None
    tiny_decoder: str | None = None
    prefer_tiny: bool = False
    controlnet: str | None = None

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if self.entry is not None:
            entry_called(self.entry)
        if self.prediction is not None:
            check_prediction_type(self.prediction)
        if self.guidance is not None and not 0 <= self.guidance <= MOST_GUIDANCE:
            raise ValueError(f"guidance must be a number from 0 to {MOST_GUIDANCE}, got {self.guidance:g}")
        return self


def parse_timesteps(text: str | None) -> tuple[int | float, ...] | None:
    """ "999,749.5" -> (999, 749.5). Raises ArtifactError."""
    if text is None:
        return None
    try:
        return tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError:
        raise ArtifactError(f"timesteps are numbers such as 999,749,499,249, got {text!r}") from None
