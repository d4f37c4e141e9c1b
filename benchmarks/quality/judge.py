"""The judge: a small classifier that reads objects, relation and background off a picture of an emoji scene.

It measures prompt fidelity exactly, as far as its own accuracy goes, and its penultimate layer is the feature space of the Frechet
distance that this project calls FD (judge): never FID, whose features are Inception's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from ...core.errors import ArtifactError
from ...distill.data.captions import Scene
from ...distill.data.emoji import EmojiScenes
from ...distill.data.rendering import rendered, to_signed
from ...distill.data.vocabulary import AXES, BACKGROUND_NAMES, OBJECT_NAMES, PATTERN_NAMES
from ...distill.fit import fit
from ...distill.recipe import Fit, Frozen
from ...distill.reproducible import Part, fingerprint, part_of, rows_of, seeded
from ...distill.run import Task
from ...folders.files import atomic_file

FEATURES = 128
FEWEST = 2 * (FEATURES + 1)  # pictures that a covariance of the features needs
TOTAL_VARIANCE = (
    16_000.0  # about that of the first judge, which had no scale: its distances and later ones are of one size
)
LAYOUTS = ("single", *AXES)
_HEADS = {
    "layout": len(LAYOUTS),
    "first": len(OBJECT_NAMES),
    "second": len(OBJECT_NAMES) + 1,  # the last class: there is none
    "background": len(BACKGROUND_NAMES),
    "pattern": len(PATTERN_NAMES),
}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x + self.body(x))


class Judge(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> features (B, 128) and one row of logits per head."""

    def __init__(self, classes: dict[str, int] = _HEADS) -> None:
        """classes: of each head; an older judge may know the first so many kinds only, and no patterns."""
        super().__init__()
        self.classes = classes
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            _Residual(32),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.SiLU(),
            _Residual(64),
            nn.Conv2d(64, 96, 4, stride=2, padding=1),
            nn.SiLU(),
            _Residual(96),
            nn.Conv2d(96, 48, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(48 * 64, FEATURES),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, count) for name, count in classes.items()})
        self.reference_mean: torch.Tensor
        self.reference_covariance: torch.Tensor
        self.feature_scale: torch.Tensor
        self.register_buffer("feature_scale", torch.ones(()))
        self.register_buffer("reference_mean", torch.zeros(FEATURES))
        self.register_buffer("reference_covariance", torch.eye(FEATURES))

    def refer_to(self, batches: Iterable[np.ndarray]) -> None:
        """Keep mean and covariance of the features of real pictures: what FD (judge) is measured against.

        Features are scaled so that their variances add up to TOTAL_VARIANCE: a distance means the same to every judge.
        """
        self.feature_scale.fill_(1.0)
        features = np.concatenate([self.read(images)[0] for images in batches])
        scale = (TOTAL_VARIANCE / np.trace(np.cov(features, rowvar=False))) ** 0.5
        self.feature_scale.fill_(float(scale))
        self.reference_mean.copy_(torch.from_numpy(scale * features.mean(0)))
        self.reference_covariance.copy_(torch.from_numpy(scale**2 * np.cov(features, rowvar=False)))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        features = self.trunk(images)
        return features, {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: np.ndarray, batch: int = 256) -> tuple[np.ndarray, list[Scene]]:
        """(N, 64, 64, 3) uint8 -> features (N, 128) float64 and the scenes that it sees."""
        features, scenes = [], []
        device = self.feature_scale.device
        for first in range(0, len(images), batch):
            found, logits = self(to_signed(images[first : first + batch]).to(device))
            features.append(found.cpu().double().numpy() * float(self.feature_scale))
            scenes += _scenes(
                {name: values.argmax(1).tolist() for name, values in logits.items()}, self.classes["second"] - 1
            )
        return np.concatenate(features), scenes


def _scenes(classes: dict[str, list[int]], none: int) -> list[Scene]:
    scenes, found = [], {"pattern": [0] * len(classes["first"]), **classes}
    for layout, first, second, background, pattern in zip(*(found[name] for name in _HEADS), strict=True):
        pair = layout > 0 and second < none
        scenes.append(
            Scene(
                objects=(OBJECT_NAMES[first], OBJECT_NAMES[second]) if pair else (OBJECT_NAMES[first],),
                axis=LAYOUTS[layout] if pair else None,
                background=BACKGROUND_NAMES[background],
                pattern=PATTERN_NAMES[pattern],
            )
        )
    return scenes


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Class indices (B,) of each head."""
    none = len(OBJECT_NAMES)
    return {
        "layout": torch.tensor([0 if s.axis is None else LAYOUTS.index(s.axis) for s in scenes]),
        "first": torch.tensor([OBJECT_NAMES.index(s.objects[0]) for s in scenes]),
        "second": torch.tensor([OBJECT_NAMES.index(s.objects[1]) if len(s.objects) > 1 else none for s in scenes]),
        "background": torch.tensor([BACKGROUND_NAMES.index(s.background) for s in scenes]),
        "pattern": torch.tensor([PATTERN_NAMES.index(s.pattern) for s in scenes]),
    }


class _JudgeLoss(nn.Module):
    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: torch.Tensor, **targets: torch.Tensor) -> torch.Tensor:
        _, logits = self.judge(images)
        return torch.stack([functional.cross_entropy(logits[name], targets[name]) for name in _HEADS]).sum()


@dataclass
class JudgeTask(Task):
    """Fits the judge on the stream of scenes, all combinations included, with a little noise on the pictures."""

    scenes: EmojiScenes
    held_out: EmojiScenes
    settings: Fit
    name: str = "judge"
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.settings, self.scenes.seed)
        torch.manual_seed(0)
        self.judge = Judge()
        self.module: nn.Module = _JudgeLoss(self.judge)

    def batch(self, step: int, part: Part) -> dict[str, Any]:
        size = self.settings.batch
        first, draw = step * 64 * size, seeded(4, step, 0)
        own = range(size)[rows_of(size, part)]
        examples = [(self.held_out if i % 8 == 0 else self.scenes)[first + i] for i in own]
        images = to_signed(np.stack([e.image for e in examples]))
        strength = 0.08 * torch.rand(size, 1, 1, 1, generator=draw)
        noise = strength * torch.randn(size, *images.shape[1:], generator=draw)
        return {"images": images + part_of(noise, size, part), **labels([e.scene for e in examples])}


def accuracy(judge: Judge, scenes: EmojiScenes, count: int, start: int = 0) -> dict[str, float]:
    """Share of rendered scenes that the judge reads rightly, per attribute and all together."""
    examples = [scenes[start + i] for i in range(count)]
    _, seen = judge.read(np.stack([e.image for e in examples]))
    pairs = [(e.scene, s) for e, s in zip(examples, seen, strict=True)]
    return {
        "object": float(np.mean([a.objects == b.objects for a, b in pairs])),
        "relation": float(np.mean([a.axis == b.axis for a, b in pairs])),
        "background": float(np.mean([a.background == b.background for a, b in pairs])),
        "pattern": float(np.mean([a.pattern == b.pattern for a, b in pairs])),
        "all": float(np.mean([a == b for a, b in pairs])),
    }


class JudgeRecipe(Frozen):
    """`train-judge`: how the judge is fitted, and how many scenes it is tested on and compares with."""

    seed: Annotated[int, Field(ge=0)] = 11
    test_scenes: Annotated[int, Field(ge=4)] = 4000  # seen ones; and a quarter as many held-out ones
    reference_scenes: Annotated[int, Field(ge=FEWEST)] = 40_000  # what FD (judge) is measured against
    fit: Fit


def train_judge(
    recipe: JudgeRecipe, out: Path, *, font: Path | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Train the judge, test it on scenes of another seed, write `out` (safetensors, with the test's result inside)."""
    seed, settings = recipe.seed, recipe.fit
    task = JudgeTask(EmojiScenes(seed=seed, font=font), EmojiScenes(seed=seed, held_out=True, font=font), settings)
    figures = fit(task, settings, out.with_name(out.name + ".run"), console)
    task.judge.half().float()  # as it will be loaded
    console = console or Console(stderr=True)
    console.print(f"reading {recipe.test_scenes} scenes that it has not seen")
    measured = {
        "seen": accuracy(task.judge, EmojiScenes(seed=seed + 1, font=font), recipe.test_scenes),
        "held_out": accuracy(task.judge, EmojiScenes(seed=seed + 1, held_out=True, font=font), recipe.test_scenes // 4),
    }
    judge = task.judge
    reference, batch = EmojiScenes(seed=seed + 2, font=font), min(500, recipe.reference_scenes)
    batches = rendered(reference, recipe.reference_scenes, batch=batch)
    judge.refer_to(track(batches, "reference scenes", recipe.reference_scenes // batch, console=console))
    state = judge.state_dict()
    weights = {
        name: (v if name.startswith(("reference", "feature_scale")) else v.half()).contiguous()
        for name, v in state.items()
    }
    metadata = {f"{split}_{name}": f"{value:.5f}" for split, row in measured.items() for name, value in row.items()}
    with atomic_file(out) as temporary:
        save_file(weights, str(temporary), metadata=metadata)
    return {**figures, "accuracy": measured}


def load_judge(path: Path) -> tuple[Judge, dict[str, str]]:
    """The judge of a file that train_judge wrote, and its own test accuracy as written there."""
    if not path.is_file():
        raise ArtifactError(f"no judge at {path}; make one with imagine-flash train-judge")
    try:
        with safe_open(str(path), "pt") as file:
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        judge = Judge({n: len(weights[f"heads.{n}.weight"]) for n in _HEADS if f"heads.{n}.weight" in weights})
        judge.load_state_dict({"feature_scale": torch.ones(()), **weights})
    except (SafetensorError, RuntimeError, OSError, KeyError) as error:
        raise ArtifactError(f"{path} is not a judge of this version ({str(error).splitlines()[0]})") from None
    return judge.eval(), metadata
