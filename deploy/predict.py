"""The embedded model, or the artifact in ./artifact, as a Cog predictor."""

from pathlib import Path as LocalPath
from tempfile import mkdtemp

from cog import BasePredictor, Input, Path
from PIL import Image

from imagine_flash.engine import Engine, GenerateRequest

ARTIFACT = LocalPath("artifact")


class Predictor(BasePredictor):
    """One engine per container."""

    def setup(self) -> None:
        """Load and warm the model."""
        self.engine = Engine.load(ARTIFACT if ARTIFACT.is_dir() else None)
        self.engine.warm_up()

    def predict(
        self,
        prompt: str = Input(description="What to draw."),
        steps: int = Input(description="Network evaluations.", default=3, ge=1, le=3),
        seed: int = Input(description="The same seed draws the same picture; -1 takes a random one.", default=-1),
        count: int = Input(description="Pictures.", default=1, ge=1, le=16),
    ) -> list[Path]:
        """Draw a prompt."""
        request = GenerateRequest(prompt=prompt, steps=steps, seed=None if seed < 0 else seed, count=count)
        folder, files = LocalPath(mkdtemp()), []
        for i, pixels in enumerate(self.engine.generate(request).images):
            files.append(Path(folder / f"{i}.png"))
            Image.fromarray(pixels).save(files[-1])
        return files
