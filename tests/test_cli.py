"""The commands as a user types them: what they write, and one clear line with exit code 2 for what is wrong."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagine_flash.cli.generate import read_picture_file
from imagine_flash.cli.listening import is_loopback
from imagine_flash.engine.pictures.reader import read_picture
from imagine_flash.folders.files import hash_folder
from imagine_flash.folders.reading import digest_of
from imagine_flash.tests.commands import fails, run, start


def test_generate_writes_a_picture_and_says_how_long_it_took(tiny_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    asked = ["generate", "a cat on zebra", "--model", tiny_artifact, "--seed", "7", "--steps", "2", "-o", out]
    done = start(*asked, text=True)
    assert done.returncode == 0, done.stderr
    assert "denoise" in done.stderr and " ms" in done.stderr and "no word for zebra" in done.stderr
    assert done.stdout == f"{out} (2 steps, seed 7)\n"
    picture = Image.open(out)
    assert picture.size == (64, 64) and picture.info["parameters"] == "a cat on zebra\nSteps: 2, Seed: 7"
    again = tmp_path / "again.png"
    run("generate", "a cat on zebra", "--model", tiny_artifact, "--seed", "7", "--steps", "2", "-o", again)
    assert again.read_bytes() == out.read_bytes()


def test_results_go_to_standard_output_and_the_rest_does_not(tiny_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    asked = ["generate", "a rockett", "--model", tiny_artifact, "--seed", "7", "-o", out]
    done = run(*asked, "--json")
    found = json.loads(done.stdout)
    assert found["files"] == [str(out)] and found["seed"] == 7 and found["steps"] == 3
    assert found["replaced_words"] == {"rockett": "rocket"} and found["unknown_words"] == []
    assert "note: read 'rockett' as 'rocket'" in done.stderr
    done = run(*asked, "--quiet")
    assert done.stdout == f"{out} (3 steps, seed 7)\n" and "note:" not in done.stderr and " ms" not in done.stderr
    assert run("cache", "list").stderr, "it is of one command, also where one process runs several"
    piped = start(*asked[:-1], "-", check=True).stdout
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(piped))), np.asarray(Image.open(out)))
    assert "leave out --json" in fails(*asked[:-1], "-", "--json")


def test_help_version_and_the_module(tmp_path: Path) -> None:
    from importlib.metadata import version

    bare, short, long = run(), run("-h"), start("--help", text=True)
    assert bare.returncode == short.returncode == long.returncode == 0
    assert bare.stdout.split() == short.stdout.split() and bare.stdout.count("--version") == 1
    assert long.stdout.split()[-20:] == bare.stdout.split()[-20:]
    for group in ("bench", "cache"):
        alone = run(group)
        assert alone.returncode == 0 and "Usage:" in alone.stdout and not alone.stderr
    assert run("--version").stdout == f"imagine-flash {version('imagine-flash')}\n"


def test_an_interrupt_is_one_line(tiny_artifact: Path, tmp_path: Path) -> None:
    """At any moment, also while the libraries are imported: never a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a process started here would inherit
        pytest.skip("interrupts are ignored here, as in a shell's background job")
    for delay in (0.05, 0.3, 0.6):
        process = subprocess.Popen(
            [sys.executable, "-m", "imagine_flash", "serve", "--model", str(tiny_artifact), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
        assert "Traceback" not in said or "imagine_flash/" not in said, said  # Python's own start may be interrupted


def test_several_pictures_are_numbered(tiny_artifact: Path, tmp_path: Path) -> None:
    done = run("generate", "a cat", "--model", tiny_artifact, "--count", "3", "-o", tmp_path / "c.jpg")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c-1.jpg", "c-2.jpg", "c-3.jpg"]


def test_generate_starts_from_a_picture_of_any_size(tiny_artifact: Path, tmp_path: Path) -> None:
    start, mask, out = tmp_path / "start.jpg", tmp_path / "mask.png", tmp_path / "edited.png"
    Image.new("RGB", (300, 200), "orange").save(start)
    Image.fromarray(np.repeat([[0, 255]], 64, axis=0).repeat(32, axis=1).astype(np.uint8)).save(mask)
    run("generate", "a cat", "--model", tiny_artifact, "--image", start, "--mask", mask, "--seed", "7", "-o", out)
    drawn = np.asarray(Image.open(out)).astype(int)
    assert drawn.shape == (64, 64, 3) and np.abs(drawn[:, :32] - [255, 165, 0]).max() <= 3 and drawn[:, 32:].std() > 5
    done = run("generate", "a cat", "--model", tiny_artifact, "--image", start, "--strength", "0.4", "-o", out)
    assert "(3 steps" in done.stdout and np.asarray(Image.open(out)).std() > 0


@pytest.mark.parametrize("kind", ["image", "condition", "mask"])
def test_a_picture_file_is_read_as_the_server_reads_it(kind: str, tmp_path: Path) -> None:
    """16 bits of grey, as depth maps have, were cut off at 255; transparency became black."""
    depth, clear = tmp_path / "depth.png", tmp_path / "clear.png"
    Image.fromarray(np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)).save(depth)
    Image.new("RGBA", (64, 64), (10, 20, 30, 0)).save(clear)
    for path in (depth, clear):
        read = read_picture_file(path, kind, (32, 64))
        assert read.shape[:2] == (32, 64)
        levels = np.asarray(255 * read if kind == "mask" else read).round().astype(np.uint8)
        assert levels.tobytes() == read_picture(path.read_bytes(), kind, (64, 32), 2**24)
    assert 100 < read_picture_file(depth, "image", (64, 64)).mean() < 155
    assert (read_picture_file(clear, "image", (64, 64)) == 255).all() and (
        read_picture_file(clear, "mask", (64, 64)) == 1
    ).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "prompt must be"),
        (["a cat", "--steps", "0"], "got 0"),
        (["a cat", "--steps", "4"], "steps must be 1, 2 or 3, got 4"),
        (["a cat", "--steps", "two"], "'two'"),
        (["a cat", "--seed", "-1"], "got -1"),
        (["a cat", "--seed", "99999999999999999999999"], "seed must be a whole number from 0 to"),
        (["a cat", "--seed", str(2**63 - 1), "--count", "2"], f"seed must be at most {2**63 - 2} for 2 pictures"),
        (["a cat", "--count", "0"], "got 0"),
        (["a cat", "--count", "10000"], "from 1 to 64, got 10000"),
        (["a cat", "-o", "{tmp}/missing/x.png"], "is not a folder; make it first"),
        (["a cat", "-o", "{tmp}/file/x.png"], "is not a folder"),
        (["a cat", "-o", "{tmp}/x.gif"], "must be one of .png"),
        (["a cat", "-o", "."], "cannot write '.': its ending must be one of .png"),
        (["a cat", "--lora", "f.safetensors:abc"], "got 'f.safetensors:abc': the weight 'abc' is no number"),
        (["a cat", "-o", "/proc/x.png"], "/proc"),
        (["a cat", "--model", "{tmp}/nowhere"], "nowhere"),
        (["a cat", "--model", "{tmp}/file"], "folder"),
        (["a cat", "--model", "{tmp}/empty"], "empty"),
        (["a cat", "--bogus"], "--bogus"),
        (["a cat", "--backend", "onxruntime"], "no backend 'onxruntime'; did you mean 'onnxruntime'?"),
        (["a cat", "--precision", "fp4"], "no precision 'fp4'"),
        (["a cat", "--device", "gpu"], "'gpu'"),
        (["a cat", "--image", "{tmp}/none.png"], "none.png: No such file"),
        (["a cat", "--image", "{tmp}/file"], "file: it is no PNG, JPEG or WebP that can be read"),
        (["a cat", "--mask", "{tmp}/file"], "file: it is no PNG, JPEG or WebP that can be read"),
        (["a cat", "--strength", "0.5"], "mask and strength need an image"),
        (["a cat", "--image", "{picture}", "--strength", "2"], "strength must be a number above 0, at most 1, got 2.0"),
        (["a cat", "--image", "{picture}", "--strength", "half"], "'half'"),
    ],
)
def test_generate_refuses(arguments: list[str], says: str, tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    given = [a.format(tmp=tmp_path, picture=tiny_artifact / "references/64x64_1.png") for a in arguments]
    if "--model" not in given:
        given += ["--model", str(tiny_artifact)]
    if "-o" not in given:
        given += ["-o", str(tmp_path / "x.png")]
    assert says in fails("generate", *given)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "damage", ["truncated", "tampered", "a flipped bit in a graph", "missing weights", "newer", "missing graph"]
)
def test_generate_refuses_a_damaged_model(damage: str, tiny_artifact: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_artifact, model)
    weights, manifest = model / "weights.bin", model / "manifest.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
        says = "weights.bin"
    elif damage == "tampered":
        data = bytearray(weights.read_bytes())
        data[100] ^= 1
        weights.write_bytes(bytes(data))
        says = "weights.bin"
    elif damage == "a flipped bit in a graph":
        graph = bytearray((model / "denoiser.onnx").read_bytes())
        graph[len(graph) // 2] ^= 1
        (model / "denoiser.onnx").write_bytes(bytes(graph))
        says = "denoiser.onnx differs from the sha256"
    elif damage == "missing weights":
        weights.unlink()
        says = "weights.bin is missing"
    elif damage == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
        says = "upgrade"
    else:
        (model / "decoder.onnx").unlink()
        says = "decoder.onnx"
    assert says in fails("generate", "a cat", "--model", model, "-o", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    assert says in fails("inspect", model)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "{tmp}/nowhere", "{tmp}/out"], "nowhere"),
        (["export", "{artifact}", "{tmp}/out"], "artifact"),
        (["export", "{student}", "/proc/missing/out"], "cannot make the folder /proc/missing"),
        (
            ["export", "{student}", "{tmp}/out", "--sizes", "60x64"],
            "a size must be a multiple of 8 for this student, got 60x64",
        ),
        (["export", "{student}", "{tmp}/out", "--sizes", "big"], "a size is WIDTHxHEIGHT such as 512x512, got 'big'"),
        (
            ["export", "{student}", "{tmp}/out", "--any-size", "big"],
            "any size is a range of sides such as 256-1024, got",
        ),
        (["export", "{student}", "{tmp}/out", "--any-size", "40-96"], "in multiples of 16 for this student, got 40-96"),
        (["export", "{student}", "{tmp}/out", "--max-error", "nan"], "--max-error must be a number above 0, got nan"),
        (["export", "{student}", "{tmp}/out", "--min-psnr", "-5"], "--min-psnr must be a number above 0, got -5"),
        (["cache", "prune", "--days", "abc"], "got 'abc'"),
        (["serve", "--port", "abc"], "got 'abc'"),
        (["export", "{student}", "{tmp}/out", "--batch", "4-1"], "batch must run upwards"),
        (["export", "{student}", "{tmp}/out", "--precision", "fp8"], "got 'fp8'"),
        (["export", "{student}", "{tmp}/out", "--format", "coreml"], "got 'coreml'"),
        (["export", "{student}", "{tmp}/out", "--format", "openvino", "--precision", "bf16"], "takes precision fp32"),
        (["export", "{student}", "{tmp}/out", "--steps", "4"], "steps must be 1, 2 or 3, got 4"),
        (["export", "{student}", "{tmp}/out", "--check-prompts", "{tmp}/none.txt"], "cannot read the prompts"),
        (["export", "{student}", "{tmp}/out", "--guidance", "3"], "--guidance 3.0: {student} says itself"),
        (["export", "{student}", "{tmp}/out", "--guidance", "-3"], "guidance must be a number from 0 to 50, got -3"),
        (["export", "{student}", "{tmp}/out", "--guidance", "nan"], "guidance must be a number from 0 to 50, got nan"),
        (["export", "{student}", "{tmp}/out", "--tiny-decoder", "{tmp}/none"], "is no AutoencoderTiny"),
        (["inspect", "{tmp}"], "empty"),
        (["inspect", "{student}", "--run"], "is a student; --run draws with an artifact"),
        (["build-tensorrt", "{tmp}"], "empty"),
        (["build-tensorrt", "{artifact}"], "tensorrt"),
        (["distill", "{tmp}/nowhere", "{tmp}/out"], "no folder"),
        (["distill", "{tmp}", "{tmp}/out", "--recipe", "imagine_falsh"], "did you mean 'imagine_flash'"),
        (["distill", "{tmp}", "{tmp}/out", "--prompts", "{tmp}/none.txt"], "one prompt a line"),
        (["distill", "{student}", "{tmp}/out", "--plan-memory", "--device", "gpu"], "cuda or cuda:N, got 'gpu'"),
        (
            ["distill", "{student}", "{tmp}/out", "--plan-memory", "--pictures", "/nope", "--recipe", "add"],
            "no pictures at /nope",
        ),
        (
            ["distill", "{student}", "{tmp}/out", "--plan-memory", "--prompts", "/nope"],
            "cannot read prompts from /nope",
        ),
        (["distill", "{student}", "{tmp}/out", "--plan-memory", "--start", "/nope"], "there is no folder /nope"),
        (["distill", "{student}", "{tmp}/out", "--plan-memory", "--font", "/nope"], "no emoji font at /nope"),
        (["distill", "{student}", "{tmp}/out", "--plan-memory", "--track", "tensorbord"], "no tracker 'tensorbord'"),
        (["compare", "{tmp}", "{tmp}", "-o", "{tmp}/c"], "is no folder of pictures"),
        (["study", "/nope.yaml", "-o", "{tmp}/s"], "no study at /nope.yaml"),
        (["train-teacher", "/proc/missing/out"], "cannot make the folder /proc/missing"),
        (["train-teacher", "{tmp}/out", "--recipe", "imagine_flash"], "unknown key"),
        (["train-teacher", "{tmp}/out", "--recipe", "teacher_epsilon"], "give its folder by --start"),
        (["train-teacher", "{tmp}/out", "--font", "{tmp}/none.ttf"], "fonts-noto-color-emoji"),
        (["train-judge", "{tmp}/out", "--font", "{tmp}/none.ttf"], "fonts-noto-color-emoji"),
        (["train-judge", "{tmp}/out", "--recipe", "imagine_flash"], "unknown key"),
        (["train-judge", "{tmp}/out", "--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["evaluate", "{tmp}", "{tmp}", "--judge", "{tmp}/none", "-o", "{tmp}/e"], "train-judge"),
        (
            ["evaluate", "{tmp}", "{tmp}", "--judge", "{tmp}/none", "-o", "{tmp}/e", "--device", "cuda:99"],
            "no 'cuda:99'",
        ),
        (
            ["evaluate", "--guidance", "nan", "-o", "{tmp}/e"],
            "--guidance must be a number above 0, at most 50, got nan",
        ),
        (["evaluate", "--guidance", "-1", "-o", "{tmp}/e"], "--guidance must be a number above 0, at most 50, got -1"),
        (["push", "{artifact}", "noowner", "--dry-run"], "a model of the hub is called OWNER/NAME, got 'noowner'"),
        (["evaluate", "{tmp}", "{tmp}", "--recipe", "judge", "-o", "{tmp}/e"], "unknown key"),
    ],
)
def test_the_other_commands_refuse(
    arguments: list[str], says: str, tiny_artifact: Path, tiny_student: Path, tmp_path: Path
) -> None:
    places = {"tmp": tmp_path, "artifact": tiny_artifact, "student": tiny_student}
    assert says.format(**places) in fails(*(a.format(**places) for a in arguments))
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_progress_bar_is_not_on_standard_output(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was: a picture piped there by the first `generate` of a model was broken, and a path had an empty line before it."""
    from imagine_flash.cli import common

    done = run("build-tensorrt", tiny_artifact)
    assert done.returncode == 2 and done.stdout == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")  # as on a terminal
        for quiet in (False, True):
            patch.setattr(common, "_quiet", quiet)
            with common.progress_bar() as tell:
                tell("export", 2)
                tell("check", 2)
            said = capsys.readouterr()
            assert said.out == "" and ("check" in said.err) != quiet


OWN = "says itself how it is sampled; leave the option out, it is for models without imagine_flash.json"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--timesteps", "900,400,100", "--any-steps"], f"--timesteps 900,400,100: {{}} {OWN}"),
        (["--sampler", "renoise"], f"--sampler renoise: {{}} {OWN}"),
        (["--prediction", "epsilon"], f"--prediction epsilon: {{}} {OWN}"),
        (["--as", "sd-turbo"], f"--as sd-turbo: {{}} {OWN}"),
        (["--as", "sd-trubo"], "the catalogue has no 'sd-trubo'; did you mean 'sd-turbo'?"),
        (["--prediction", "epsilom"], "got 'epsilom'; did you mean 'epsilon'?"),
        (["--any-steps"], f"--any-steps: {{}} {OWN}"),
        (["--base", "/nope"], "--base"),
    ],
)
@pytest.mark.parametrize("model", ["embedded", "artifact", "student", "export"])
def test_what_a_model_of_ours_says_itself_is_not_asked(
    model: str, arguments: list[str], says: str, tiny_artifact: Path, tiny_student: Path, tmp_path: Path
) -> None:
    """All of it was ignored, and the usual picture drawn."""
    folder = tiny_artifact if model == "artifact" else tiny_student
    given = ["generate", "a fox", "--steps", "3", "-o", tmp_path / "fox.png"]
    given += [] if model == "embedded" else ["--model", folder]
    given = ["export", folder, tmp_path / "out"] if model == "export" else given
    assert says.format("the embedded model" if model == "embedded" else folder) in fails(*given, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_training_makes_the_folder_that_it_writes_to(tmp_path):
    """It trained for 14 seconds and then found that there was none. What it needs beside is missing here, so it ends at once."""
    fails("train-teacher", tmp_path / "runs" / "teacher", "--font", tmp_path / "none.ttf")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and not list((tmp_path / "runs").iterdir())


def test_inspect_says_what_is_there(tiny_artifact: Path, tiny_student: Path) -> None:
    said = run("inspect", tiny_artifact).stdout
    assert "sampler_3.onnx" in said and "against torch" in said
    assert "noise_correction" in run("inspect", tiny_student).stdout
    for folder, file in ((tiny_artifact, "manifest.json"), (tiny_student, "imagine_flash.json")):
        assert json.loads(run("inspect", folder, "--json").stdout) == json.loads((folder / file).read_text())
    assert "give one of them" in fails("inspect", tiny_artifact, "--run", "--json")


def test_addresses_of_this_machine_need_no_keys() -> None:
    """An IPv4 one written as IPv6 was taken for one of a network. The server looks at the same."""
    assert all(map(is_loopback, ("localhost", "a.localhost", "127.0.0.1", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "::ffff:0.0.0.0", "192.0.2.1")))


def test_what_an_encoding_lacks_is_replaced() -> None:
    """Emoji among the known words were a traceback where output has the encoding of Windows."""
    done = start("inspect", env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert b"name: emoji-scenes" in done.stdout and b"?" in done.stdout


def test_what_a_model_draws_is_said_by_the_command_that_a_note_names(tiny_artifact: Path, tmp_path: Path) -> None:
    for model in (None, tiny_artifact):
        given = [] if model is None else ["--model", model]
        noted = run("generate", "a zzebrraa", *given, "-o", tmp_path / "x.png").stderr
        command = noted.partition("what it knows: imagine-flash ")[2].splitlines()[0].split()
        assert command == ["inspect", *map(str, given[1:])]
        done = run(*command)
        assert done.returncode == 0 and " words: " in done.stdout
    assert "name: emoji-scenes\n" in run("inspect").stdout


def test_inspect_draws_the_reference_pictures(tiny_artifact: Path, tmp_path: Path) -> None:
    done = run("inspect", tiny_artifact, "--run")
    assert done.returncode == 0 and done.stdout.count("ok   ") == 3, done.stdout
    model = tmp_path / "model"
    shutil.copytree(tiny_artifact, model)
    shutil.copy(model / "references/64x64_1.png", model / "references/64x64_3.png")
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["files"]["references/64x64_3.png"] = manifest["files"]["references/64x64_1.png"]
    manifest["sha256"] = digest_of(manifest)
    (model / "manifest.json").write_text(json.dumps(manifest))
    done = run("inspect", model, "--run")
    assert done.returncode == 3 and "1 of the reference pictures of" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_failing_export_exits_with_3_shows_the_pictures_and_leaves_the_old_artifact(
    tiny_student: Path, tiny_artifact: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_artifact, tmp_path / "out")
    before = hash_folder(tmp_path / "out")
    short = ("--steps", "1", "--batch", "1", "--no-image-encoder")
    done = run("export", tiny_student, tmp_path / "out", "--min-psnr", "99", *short)
    assert done.returncode == 3 and not done.stdout, done
    assert "have a PSNR of" in done.stderr and "seed" in done.stderr and "Traceback" not in done.stderr
    assert "nothing was written to" in done.stderr and hash_folder(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.parity"]
    shown = {path.suffix for path in (tmp_path / "out.parity").iterdir()}
    assert shown == {".json", ".png"}
    found = json.loads((tmp_path / "out.parity/report.json").read_text(encoding="utf-8"))
    assert found["errors"]["denoiser"]["m"] < 1e-4 and "PSNR" in " ".join(found["failures"])


def test_a_bf16_artifact_says_what_it_is_for(tiny_artifact: Path) -> None:
    from imagine_flash.cli.exporting import _next_of
    from imagine_flash.folders.reading import read_artifact_manifest

    manifest = read_artifact_manifest(tiny_artifact)
    assert _next_of(manifest, tiny_artifact) == f"imagine-flash generate PROMPT --model {tiny_artifact}"
    half = manifest.model_copy(update={"precision": "bf16"})
    assert "TensorRT or a GPU: no CPU runs bf16 graphs" in _next_of(half, tiny_artifact)


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom imagine_flash.cli import main\nsys.argv = ['imagine-flash', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'onnxruntime', 'numpy', 'PIL'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_folders_are_looked_at_before_a_library_is_loaded(tmp_path: Path) -> None:
    """`compare` loaded CLIP first; `study` waited for torch."""
    code = (
        "import sys\nfrom imagine_flash.cli import main\nsys.argv = ['imagine-flash', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert ended.code == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for arguments in (["compare", tmp_path, tmp_path], ["study", tmp_path / "none.yaml"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0 and done.stderr.startswith("error: "), done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train-judge", "/proc/x"], "cannot use /proc/x.run: no such file or directory"),  # was a traceback
        (
            ["serve", "--lora", "a=nowhere"],
            "lora a: there is no nowhere; give a .safetensors file, a folder or a hub id",
        ),
    ],
    ids=lambda values: str(values)[:20],
)
def test_what_is_not_there_is_said_before_anything_else(arguments: list[str], says: str) -> None:
    if arguments[1].startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("needs Linux")
    done = run(*arguments)
    assert done.returncode == 2 and says in done.stderr and not done.stdout, (
        done
    )  # no URL of a server that cannot start
    assert "Traceback" not in done.stderr
