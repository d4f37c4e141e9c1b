"""Blind votes: what the page is told, what is kept, and what the votes say."""

import io
import json
import socket
from pathlib import Path
from threading import Thread

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from imagine_flash.benchmarks.arena.app import create_app
from imagine_flash.benchmarks.arena.pairs import pairs_of, pictures_drawn
from imagine_flash.benchmarks.arena.votes import Vote, add_vote, read_votes, summary
from imagine_flash.benchmarks.picture_folders import Shown, pictures_in
from imagine_flash.core.errors import ImagineFlashError
from imagine_flash.engine import Engine
from imagine_flash.tests.commands import CHROMIUM, fails, run

COUNT = 12


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (2, 2), level).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A: black pictures with captions; B: white ones, and one more that A lacks."""
    for name, level, count in (("a", 0, COUNT), ("b", 255, COUNT + 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.png").write_bytes(png(level))
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"caption {i}"}) for i in range(COUNT)]
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path / "a", tmp_path / "b"


def test_a_person_sees_every_pair_once_and_sides_are_by_chance(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = pairs_of(*map(pictures_in, folders))
    assert len(pairs) == COUNT and pairs[0].caption == "caption 0"
    votes, black, orders = tmp_path / "votes.jsonl", png(0), []
    client = TestClient(create_app(pairs, votes))
    for person in ("ann", "bob"):
        seen = []
        while (found := client.get("/next", params={"annotator": person}).json())["pair"] is not None:
            assert found["judged"] == len(seen) and found["total"] == COUNT
            seen.append(found["pair"])
            sides = {s: client.get(f"/picture/{seen[-1]}/{s}", params={"annotator": person}) for s in ("left", "right")}
            darker = next(side for side, answer in sides.items() if answer.content == black)
            assert sides["left"].content != sides["right"].content
            ballot = {"annotator": person, "pair": seen[-1], "shown": found["shown"], "side": darker, "seconds": 0.5}
            assert client.post("/vote", json=ballot).status_code == 204
        assert sorted(seen) == list(range(COUNT))
        orders.append(seen)
    assert orders[0] != orders[1]
    kept = read_votes(votes)
    assert len(kept) == 2 * COUNT and {vote.choice for vote in kept} == {"A"}, "whoever likes the dark ones likes A"
    assert {vote.left for vote in kept} == {"A", "B"}
    said = client.get("/results").json()
    assert (
        said["wins"] == 2 * COUNT and said["preference"] == 1.0 and said["agreement"] == 1.0 and said["kappa"] is None
    )
    again = TestClient(create_app(pairs, votes))  # after a restart nobody judges twice
    assert again.get("/next", params={"annotator": "ann"}).json()["pair"] is None


def test_the_page_and_what_it_refuses(folders: tuple[Path, Path], tmp_path: Path) -> None:
    client = TestClient(create_app(pairs_of(*map(pictures_in, folders)), tmp_path / "votes.jsonl"))
    assert "Which do you like better" in client.get("/").text and client.get("/app.js").status_code == 200
    shown = client.get("/next", params={"annotator": "ann"}).json()["shown"]
    good = {"annotator": "ann", "pair": 0, "shown": shown, "side": "tie", "seconds": 1.0}
    for change in ({"annotator": "a b"}, {"side": "A"}, {"seconds": -1}, {"seconds": "NaN"}, {"more": 1}):
        assert client.post("/vote", json={**good, **change}).status_code == 422, change
    assert client.post("/vote", json={**good, "pair": COUNT}).status_code == 404
    assert client.get("/picture/99/left", params={"annotator": "ann"}).status_code == 404
    assert client.get("/next", params={"annotator": "../x"}).status_code == 422
    assert not (tmp_path / "votes.jsonl").exists() and client.get("/results").json() == {"votes": 0}


def vote(key: int, choice: str, annotator: str = "ann", left: str = "A") -> Vote:
    said = {"key": str(key), "caption": "", "choice": choice, "left": left, "annotator": annotator, "seconds": 1.0}
    return Vote.model_validate(said)


def test_the_share_its_interval_and_fleiss_kappa() -> None:
    half = summary([vote(i, "A" if i % 2 else "B", left="A" if i % 4 < 2 else "B") for i in range(400)])
    assert half.preference == 0.5 and half.left == 0.5
    low, high = half.interval
    assert (high - low) / 2 == pytest.approx(1.96 * (0.25 / 400) ** 0.5, rel=0.1)  # a binomial's
    # two people, four pairs: they agree on A, on B, and differ twice: chance is 1/2, so kappa is 0
    pairs = [("A", "A"), ("B", "B"), ("A", "B"), ("B", "A")]
    both = summary(
        [vote(i, c, who) for i, pair in enumerate(pairs) for c, who in zip(pair, ("ann", "bob"), strict=True)]
    )
    assert both.agreement == 0.5 and both.kappa == 0.0 and both.annotators == 2
    assert summary([vote(0, "tie")]).preference == 0.5


@pytest.mark.parametrize(("count", "low"), [(1, 0.0), (3, 0.4), (20, 0.83)])
def test_few_unanimous_votes_are_not_certain(count: int, low: float) -> None:
    """The interval of one vote was 100.0% to 100.0%."""
    found = summary([vote(i, "A") for i in range(count)])
    assert found.preference == 1.0 and found.interval == (pytest.approx(low, abs=0.05), 1.0)


def test_a_vote_after_a_restart_is_asked_for_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The sides are drawn anew at a start: half of such votes were for the other picture."""
    pairs, file = pairs_of(*map(pictures_in, folders)), tmp_path / "votes.jsonl"
    before, after = (TestClient(create_app(pairs, file)) for _ in range(2))
    shown = before.get("/next", params={"annotator": "ann"}).json()
    ballot = {"annotator": "ann", "pair": shown["pair"], "shown": shown["shown"], "side": "left", "seconds": 1.0}
    refused = after.post("/vote", json=ballot)
    assert refused.status_code == 409 and "started again" in refused.text and not file.exists()
    assert before.post("/vote", json=ballot).status_code == 204


def test_votes_on_other_pictures_are_not_pooled(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A file of another comparison was counted as this one's, and who had voted there was asked nothing."""
    a, b = folders
    file = tmp_path / "votes.jsonl"
    pairs = pairs_of(pictures_in(a), pictures_in(b))
    client = TestClient(create_app(pairs, file))
    shown = client.get("/next", params={"annotator": "ann"}).json()
    ballot = {"annotator": "ann", "pair": shown["pair"], "shown": shown["shown"], "side": "tie", "seconds": 1.0}
    client.post("/vote", json=ballot)
    create_app(pairs, file)
    with pytest.raises(ImagineFlashError, match=r"holds votes on other pictures.*--votes names a new file"):
        create_app(pairs_of(pictures_in(b), pictures_in(a)), file)
    file.write_text(vote(0, "A").model_dump_json() + "\n", encoding="utf-8")
    assert "holds votes on other pictures" in fails("arena", a, b, "--votes", file, "--port", "0")


def test_pictures_that_are_no_pairs_are_refused(folders: tuple[Path, Path]) -> None:
    a, b = map(pictures_in, folders)
    with pytest.raises(ImagineFlashError, match="the pictures '3' are of two captions, 'caption 3' and 'another'"):
        pairs_of(a, {**b, "3": Shown("another", b["3"].data)})
    with pytest.raises(ImagineFlashError, match="B's picture '4' cannot be read"):
        pairs_of(a, {**b, "4": Shown("", b["4"].data[:45])})


def test_captions_hold_any_character_and_files_that_are_not_utf8_are_named(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A line separator within a caption ended the line; another encoding was a traceback."""
    caption, file = "a fox\u2028on\x85pink", tmp_path / "votes.jsonl"
    add_vote(file, vote(0, "A").model_copy(update={"caption": caption}))
    assert [one.caption for one in read_votes(file)] == [caption]
    rows = json.dumps({"file_name": "0.png", "text": caption}, ensure_ascii=False)
    (folders[0] / "metadata.jsonl").write_text(rows, encoding="utf-8")
    assert pictures_in(folders[0])["0"].caption == caption
    for path in (file, folders[0] / "metadata.jsonl"):
        path.write_bytes(b'{"text": "caf\xe9"}')
        said = fails("arena", *folders, "--votes", file, *(["--results"] if path == file else ["--port", "0"]))
        assert f"{path.name} is not UTF-8; save it as UTF-8" in said
        path.unlink()


def test_a_model_draws_its_side() -> None:
    with Engine.load(backend="onnxruntime", threads=1) as engine:
        shown = dict(pictures_drawn(engine, ["a cat", "a fox on pink"], 1))
    assert list(shown) == ["0001", "0002"] and shown["0002"].caption == "a fox on pink"
    assert Image.open(io.BytesIO(shown["0001"].data)).size == engine.sizes[0][::-1]


def test_the_command(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    votes = tmp_path / "votes.jsonl"
    votes.write_text("".join(vote(i, "A").model_dump_json() + "\n" for i in range(3)), encoding="utf-8")
    done = run("arena", a, b, "--votes", votes, "--results")
    assert done.returncode == 0 and "A better 3, neither 0, B better 0: 3 votes of 1 people" in done.stdout
    (tmp_path / "empty").mkdir()
    assert "nope does not exist here; a model needs --prompts" in fails(
        "arena", tmp_path / "nope", b, "--votes", votes, "--port", "0"
    )
    assert "none.jsonl does not exist" in fails("arena", a, b, "--votes", tmp_path / "none.jsonl", "--results")
    assert "holds no pictures; a model needs --prompts" in fails(
        "arena", a, tmp_path / "empty", "--votes", votes, "--port", "0"
    )
    for option, value, says in (  # these were tracebacks, and the last one blamed --port
        ("--port", "99999", "--port must be 0 to 65535, got 99999"),
        ("--port", "-1", "--port must be 0 to 65535, got -1"),
        ("--host", "foo", "--host must be an address such as 127.0.0.1"),
    ):
        assert says in fails("arena", a, b, "--votes", tmp_path / "new.jsonl", option, value)
    votes.write_text('{"key": 1}\n', encoding="utf-8")
    assert "line 1 is no vote" in fails("arena", a, b, "--votes", votes)
    (b / "0.png").rename(b / "x.png")
    with pytest.raises(ImagineFlashError, match="no picture of the same name"):
        pairs_of({}, pictures_in(b))


def test_it_listens_again_at_the_port_where_it_just_ended(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    """It said that the address is in use, for the minute that the system remembers a connection."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            before.accept()[0].close()  # who ends a connection remembers it
            assert client.recv(1) == b""
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    done = run("arena", *folders, "--votes", tmp_path / "votes.jsonl", "--port", str(port))
    assert done.returncode == 0 and done.stdout == f"http://127.0.0.1:{port}\n", done.stderr


@pytest.mark.slow
def test_a_vote_that_fails_may_be_given_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The page answered no key after it; a space on a button was a tie."""
    import uvicorn

    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    file = tmp_path / "votes.jsonl"
    app = create_app(pairs_of(*map(pictures_in, folders)), file)
    with socket.create_server(("127.0.0.1", 0)) as listening, playwright.sync_playwright() as started:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, count = browser.new_page(), 0
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        page.fill("#name", "ann")
        page.press("#name", "Enter")
        page.route("**/vote", lambda route: route.abort(), times=1)
        for key, problem in (("ArrowLeft", "Failed to fetch"), ("ArrowLeft", ""), ("ArrowRight", ""), (" ", "")):
            playwright.expect(page.locator("#count")).to_have_text(f"{count} of {COUNT}")
            page.wait_for_selector("#vote[aria-busy=false]")
            page.keyboard.press(key)
            playwright.expect(page.locator("#problem")).to_have_text(problem)
            count += not problem
        playwright.expect(page.locator("#count")).to_have_text(f"{count} of {COUNT}")
        page.wait_for_selector("#vote[aria-busy=false]")
        page.focus("[data-side=left]")
        page.keyboard.press(" ")
        playwright.expect(page.locator("#count")).to_have_text(f"{count + 1} of {COUNT}")
        browser.close()
        server.should_exit = True
        thread.join()
    sides = [
        "tie" if one.choice == "tie" else "left" if one.choice == one.left else "right" for one in read_votes(file)
    ]
    assert sides == ["left", "right", "tie", "left"]
