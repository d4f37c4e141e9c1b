"""Two folders of pictures compared by the features of a real, tiny, random CLIP."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagine_flash.benchmarks.quality.features import Features
from imagine_flash.benchmarks.quality.folders import compare_folders
from imagine_flash.core.errors import ArtifactError
from imagine_flash.tests.architectures import save_clip
from imagine_flash.tests.commands import fails, run
from imagine_flash.tests.pipelines import CAPTIONS, build_tokenizer

SIZE, COUNT = 8, 40


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "clip", SIZE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Noise, and the same noise a little changed; captions with the first."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    pixels = draw.integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    for name, each in (("teacher", pixels), ("student", pixels // 2 + 60)):
        (root / name).mkdir()
        for i, picture in enumerate(each):
            Image.fromarray(picture.astype(np.uint8)).save(root / name / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)]} for i in range(COUNT)]
    (root / "teacher" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root / "teacher", root / "student"


def test_the_same_pictures_are_no_distance_apart(clip: Path, folders: tuple[Path, Path]) -> None:
    record = compare_folders(folders[0], folders[0], Features(clip), real=folders[0])
    for same in (record["student"], *record["to_real"].values()):
        assert abs(same["fd"]) < 1e-6
    assert record["student"]["similarity"] == 1.0
    assert all(same["precision"] == same["recall"] == 1.0 for same in record["to_real"].values())
    assert record["scores"]["all"]["difference"] == 0.0 and record["scores"]["all"]["interval"] == [0.0, 0.0]


def test_scores_are_transformers_own(clip: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel

    record = compare_folders(*folders, Features(clip), real=folders[0], out=tmp_path / "c")
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)
    pictures: Any = [Image.open(folders[1] / f"{i}.png") for i in range(COUNT)]
    texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(COUNT)]
    tokens = build_tokenizer()(texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"])
    expected = 100 * (out.image_embeds * out.text_embeds).sum(1).mean().item()
    assert record["scores"]["of"] == "CLIP score" and record["scores"]["all"]["pictures"] == COUNT
    assert record["scores"]["all"]["student"] == pytest.approx(expected, abs=2e-3)
    assert record["student"]["fd"] == record["to_real"]["student"]["fd"] > 0
    assert record["student"]["kd"] > record["to_real"]["student"]["kd"], (
        "there the pairs of a prompt count as near ones"
    )
    assert json.loads((tmp_path / "c.json").read_text()) == record


def test_a_scorer_of_ones_own_by_category(
    clip: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists as T2I-CompBench has them; the oracle is the mean of the pixels themselves."""
    monkeypatch.chdir(tmp_path)
    Path("own_scorer.py").write_text(
        "import numpy\ndef light(pictures, captions):\n    return [numpy.mean(p) for p in pictures]\n"
    )
    Path("lists").mkdir()
    Path("lists/color_val.txt").write_text(f"{CAPTIONS[0]}\n\n{CAPTIONS[3]}\n")
    Path("lists/spatial.txt").write_text(f"{CAPTIONS[1]}\nnobody drew this\n")
    Path("lists/numeracy_val.txt").write_text("nobody drew this\n")
    how = ("--features", clip, "--scorer", "own_scorer:light", "--categories", "lists", "-o", "c")
    done = run("compare", *folders, *how)
    assert done.returncode == 0 and "own_scorer:light, color (16 pictures): teacher" in done.stdout, done.stderr
    scores = json.loads(Path("c.json").read_text())["scores"]
    assert list(scores) == ["of", "all", "color", "spatial"]
    light = {
        path: np.array([np.asarray(Image.open(path / f"{i}.png")).mean() for i in range(COUNT)]) for path in folders
    }
    rows = np.arange(COUNT) % len(CAPTIONS)
    for name, chosen in (("all", rows >= 0), ("color", (rows == 0) | (rows == 3)), ("spatial", rows == 1)):
        teacher, student = (light[path][chosen] for path in folders)
        assert scores[name]["pictures"] == chosen.sum()
        assert scores[name]["teacher"] == pytest.approx(teacher.mean(), abs=1e-3)
        assert scores[name]["difference"] == pytest.approx((student - teacher).mean(), abs=1e-3)
        low, high = scores[name]["interval"]
        assert low < scores[name]["difference"] < high


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scorer", "light"], "a scorer is MODULE:FUNCTION, such as my_scorer:score, got 'light'"),
        (["--scorer", "nowhere_at_all:light"], "cannot import the scorer 'nowhere_at_all:light': ModuleNotFoundError"),
        (["--scorer", "bad_scorer:dark"], "cannot import the scorer 'bad_scorer:dark': AttributeError"),
        (["--scorer", "bad_scorer:one"], "the scorer 'bad_scorer:one' is no function but int"),
        (["--scorer", "bad_scorer:few"], "must give a finite number for each of 32 pictures, got [1.0]"),
        (["--scorer", "bad_scorer:breaks"], "the scorer failed: ZeroDivisionError: division by zero"),
        (["--categories", "nowhere"], "nowhere holds no lists of prompts; write CATEGORY.txt"),
        (["--categories", "lists"], "no caption, such as 'a fox on a pink background', stands in the lists of color"),
    ],
)
def test_bad_scorers_and_lists_are_one_line(
    options: list[str],
    says: str,
    clip: Path,
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad_scorer.py").write_text("def few(p, c): return [1]\ndef breaks(p, c): return 1 / 0\none = 1\n")
    Path("lists").mkdir()
    Path("lists/color.txt").write_text("nobody drew this\n")
    assert says in fails("compare", *folders, "--features", clip, "-o", "c", *options)
    assert not Path("c.json").exists()


def test_the_command_and_what_it_refuses(clip: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("compare", *folders, "--features", clip, "-o", tmp_path / "c")
    assert done.returncode == 0 and "CLIP score: teacher" in done.stdout and (tmp_path / "c.json").is_file()
    assert "is no folder of pictures" in fails(
        "compare", folders[0], tmp_path, "--features", clip, "-o", tmp_path / "d"
    )
    assert "it has no config.json" in fails("compare", *folders, "--features", tmp_path, "-o", tmp_path / "d")
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "0.png").write_bytes((folders[0] / "0.png").read_bytes())
    assert "have 1 pictures of one name" in fails(
        "compare", folders[0], tmp_path / "few", "--features", clip, "-o", tmp_path / "d"
    )
    (tmp_path / "bad").mkdir()
    for i in range(4):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"no picture")
    assert "bad/0' cannot be read" in fails(
        "compare", folders[0], tmp_path / "bad", "--features", clip, "-o", tmp_path / "d"
    )
    assert not (tmp_path / "d.json").exists()
    with pytest.raises(ArtifactError, match="gives no features"):
        (tmp_path / "config.json").write_text("{}")
        Features(tmp_path)
