"""The embedded model, or the artifact in ./artifact, as a Cog predictor."""

from pathlib import Path as LocalPath
from tempfile import TemporaryDirectory

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
        self.folder = TemporaryDirectory()

    def predict(
        self,
        prompt: str = Input(description="What to draw."),
        steps: int | None = Input(description="Network evaluations; by default the model's most.", default=None, ge=1),
        seed: int = Input(
            description="The same seed draws the same picture; -1 takes a random one.", default=-1, ge=-1
        ),
        count: int = Input(description="Pictures.", default=1, ge=1, le=16),
    ) -> list[Path]:
        """Draw a prompt. The files are there until the next prediction, which Cog asks for once it has read them."""
        request = GenerateRequest(prompt=prompt, steps=steps, seed=None if seed == -1 else seed, count=count)
        images, files = self.engine.generate(request).images, []
        for old in LocalPath(self.folder.name).iterdir():
            old.unlink()
        for i, pixels in enumerate(images):
            files.append(Path(self.folder.name, f"{i}.png"))
            Image.fromarray(pixels).save(files[-1])
        return files
