"""An artifact goes to the hub and comes back: huggingface_hub's own client, and a server that keeps what it commits."""

# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from imagine_flash.core.errors import ArtifactError
from imagine_flash.engine import Engine
from imagine_flash.folders.publish import WRITTEN, model_card
from imagine_flash.folders.reading import read_artifact_manifest

COMMIT = "b" * 40


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload and of a download, as far as they are needed. It keeps files by name in `files`, on the server."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.server.refusal:
            return self.answer({"error": "no"}, self.server.refusal)
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/owner/fox", "id": "owner/fox"})
        if "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            )
        if "/commit/" not in self.path:  # the card's metadata
            return self.answer({"errors": [], "warnings": []})
        self.server.branches.append(self.path.rpartition("/")[2])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[line["value"]["path"]]
        return self.answer(
            {
                "commitUrl": f"http://127.0.0.1:{self.server.server_port}/owner/fox/commit/{COMMIT}",
                "commitOid": COMMIT,
                "success": True,
            }
        )

    def do_HEAD(self):
        self.send_file(with_body=False)

    def do_GET(self):
        if not self.path.startswith("/api/"):
            return self.send_file(with_body=True)
        if "/revision/nowhere" in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if "/tree/" in self.path:
            known = self.server.files.items()
            return self.answer([{"type": "file", "path": n, "size": len(d), "oid": COMMIT} for n, d in known])
        files = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
        return self.answer({"id": "owner/fox", "sha": COMMIT, "siblings": files, "private": False, "tags": []})

    def send_file(self, with_body):
        data = self.server.files.get(self.path.split("/resolve/")[-1].partition("/")[2])
        self.send_response(404 if data is None else 200)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hash(data) & (2**63 - 1):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if with_body and data:
            self.wfile.write(data)

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.refusal, server.branches = {}, None, 0, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(hub, tmp_path):
    """A command of ours whose hub is this one."""
    known = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_x"}
    known |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(*arguments, module=("-m", "imagine_flash")):
        call = [sys.executable, *module, *map(str, arguments)]
        return subprocess.run(call, capture_output=True, text=True, env=os.environ | known, cwd=tmp_path)

    return run


def test_an_artifact_goes_to_the_hub_and_comes_back(hub, command, tiny_artifact, tmp_path):
    done = command("push", tiny_artifact, "owner/fox", "--private")
    assert (done.returncode, done.stdout) == (0, f"http://127.0.0.1:{hub.server_port}/owner/fox\n"), done.stderr
    assert hub.created["name"] == "fox" and (hub.created.get("private") or hub.created.get("visibility") == "private")
    manifest = read_artifact_manifest(tiny_artifact)
    assert set(hub.files) == {*manifest.files, "manifest.json", "README.md"}
    assert all((tiny_artifact / name).read_bytes() == hub.files[name] for name in manifest.files)
    drawn = [
        command("generate", "a fox", "--seed", 3, "--model", model, "-o", out)
        for model, out in (("owner/fox", "hub.png"), (tiny_artifact, "here.png"))
    ]
    assert [one.returncode for one in drawn] == [0, 0], [one.stderr for one in drawn]
    assert (tmp_path / "hub.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_a_card_that_somebody_wrote_stays(hub, command, tiny_artifact):
    hub.files["README.md"] = b"mine"
    assert command("push", tiny_artifact, "owner/fox").returncode == 0
    assert hub.files["README.md"] == b"mine" and "weights.bin" in hub.files


def test_what_an_older_artifact_had_goes_and_what_others_put_there_stays(hub, command, tiny_artifact, tmp_path):
    """It happened that a sampler of an older artifact stayed, which is not listed in the new manifest, so that none could load."""
    old = ("sampler_7.onnx", "sampler_2_from_embeddings_128x64.onnx", "tokenizer_2.json", "references/128x64_2.png")
    old += ("openvino/decoder.xml", "tensorrt/denoiser.onnx", "triton_repository/text_to_image/config.pbtxt")
    others = (".gitattributes", "README.md", "LICENSE", "photo.png", "references/mine.png", "text_encoder/model.onnx")
    hub.files |= dict.fromkeys((*old, *others), b"old")
    assert command("push", tiny_artifact, "owner/fox").returncode == 0
    assert {*old, *others} <= hub.files.keys(), "without a manifest.json it was no artifact"
    done = command("push", tiny_artifact, "owner/fox")
    assert done.returncode == 0, done.stderr
    manifest = read_artifact_manifest(tiny_artifact)
    assert set(hub.files) == {*manifest.files, "manifest.json", *others}
    assert all(WRITTEN.fullmatch(file) for file in manifest.files), "what an export writes is known to be that"


@pytest.mark.parametrize(
    ("status", "name", "message"),
    [
        (401, "owner/fox", "error: the hub lets nobody unknown write owner/fox: log in with: hf auth login"),
        (500, "owner/fox", "error: the hub refused owner/fox: "),
        (0, "fox", "error: a model of the hub is called OWNER/NAME, got 'fox'"),
    ],
)
def test_what_the_hub_does_not_take_is_one_line(hub, command, tiny_artifact, status, name, message):
    hub.refusal = status
    done = command("push", tiny_artifact, name)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
    assert not hub.files and not done.stdout


def test_a_hub_that_is_not_there_is_one_line(hub, command, tiny_artifact):
    """Errors of the hub's HTTP library are no OSErrors."""
    hub.server_close()
    hub.shutdown()
    done = command("push", tiny_artifact, "owner/fox")
    assert done.returncode == 2 and not done.stdout, done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot upload to owner/fox: "), done.stderr
    assert "Traceback" not in done.stderr


def test_the_card_says_what_the_manifest_says(tiny_artifact):
    manifest = read_artifact_manifest(tiny_artifact)
    told = {"sources": {"weights": "owner/base"}, "vocabulary": {"objects": ["fox", "cat"]}}
    card = ModelCard(model_card(manifest.model_copy(update=told), "owner/fox"))
    assert card.data.library_name == "imagine-flash" and card.data.base_model == "owner/base"
    assert card.data.pipeline_tag == "text-to-image" and "onnx" in card.data.tags
    plan = f"3: {', '.join(f'{t:g}' for t in manifest.plans[3])}"
    for part in ("1 or 2 or 3 network evaluations", plan, "64x64", '"owner/fox"', "- objects: fox, cat"):
        assert part in card.text, part
    own = model_card(manifest.model_copy(update={"sources": {"weights": "/home/me/secret"}}), "owner/fox")
    assert "/home/me" not in own and "base_model" not in own


def test_a_branch_is_pushed_to_and_loaded_from(hub, command, tiny_artifact):
    assert command("push", tiny_artifact, "owner/fox", "--revision", "draft").returncode == 0
    code = (
        "import sys; from imagine_flash import Engine; e = Engine.from_pretrained(sys.argv[1], revision=sys.argv[2]); "
    )
    code += "print(e.push_to_hub('owner/other', revision='copy'))"
    done = command("-c", code, "owner/fox", "draft", module=())
    assert done.returncode == 0 and done.stdout.endswith("/owner/fox\n"), done.stderr
    assert hub.branches == ["draft", "copy"]
    done = command("-c", code, "owner/fox", "nowhere", module=())
    assert "ArtifactError: owner/fox has no revision 'nowhere' on the hub" in done.stderr


def test_a_folder_has_no_revision(tiny_artifact):
    with pytest.raises(ArtifactError, match=r"is no hub id \(owner/name\), so it has no revision 'v1'"):
        Engine.from_pretrained(tiny_artifact, revision="v1")
