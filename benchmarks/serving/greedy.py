"""One client asks for 64 pictures in a loop: what that does to another, who asks for one at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock, Thread

from ..harness import case_of
from ..pictures import drawn_by_torch
from ..schema import Case
from .bench import Bench
from .clients import GENERATIONS, NO_ANSWER_AFTER, Answer, HttpClient, serving

ALONE, BESIDE = "alone", "beside a greedy client"
GREEDY, MODEST = "greedy-client-of-bench", "modest-client-of-bench"  # their keys
MANY, BLOCK = 64, 10  # pictures of the greedy client at once; of the other in a row
LEAD = 0.1  # seconds


def beside_a_greedy_client(bench: Bench, rounds: int) -> Case:
    """Seconds of one picture in the most steps, alone and while somebody with another key has 64 drawn again and again; ten of one
    kind and ten of the other in turn."""
    request, _ = drawn_by_torch(bench.folder, bench.engine.artifact)[max(bench.engine.steps)]
    with ExitStack() as opened:
        options = ("--api-key-file", str(opened.enter_context(keys_of(GREEDY, MODEST))))
        # room for what both ask for: a greedy client that is refused takes nothing from anybody
        server = opened.enter_context(serving(bench.folder, bench.engine.backend.name, *options, max_queue=4 * MANY))
        seconds: dict[str, list[float]] = {ALONE: [], BESIDE: []}
        answers: dict[str, list[Answer]] = {ALONE: [], BESIDE: []}
        client = opened.enter_context(HttpClient(server.port, MODEST))
        greedy = opened.enter_context(GreedyClient(server.port))
        client.draw(request)
        for first in range(0, rounds, BLOCK):
            for name in (ALONE, BESIDE):
                if name == BESIDE:
                    greedy.begin()
                for _ in range(min(BLOCK, rounds - first)):
                    started = time.perf_counter()
                    answers[name].append(client.draw(request))
                    seconds[name].append(time.perf_counter() - started)
                greedy.pause()
    checks = {name: bench.check([one.pixels() for one in own[:3]], [request] * 3) for name, own in answers.items()}
    about = bench.about("a greedy client", steps=max(bench.engine.steps), pictures=MANY)
    case = case_of(seconds, baseline=ALONE, checks=checks, case=about)
    return case.with_extra({BESIDE: {"greedy pictures": greedy.pictures, "greedy refused": greedy.refused}})


@contextmanager
def keys_of(*keys: str) -> Iterator[Path]:
    """A file of them."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.write_text("\n".join(keys))
        yield file


class GreedyClient:
    """Asks for many pictures at once, again and again, from `begin` to `pause`. pictures, refused: what came of it."""

    def __init__(self, port: int) -> None:
        self.pictures = self.refused = 0
        self._connection = HTTPConnection("127.0.0.1", port, timeout=NO_ANSWER_AFTER)
        self._wanted, self._over, self._asking = Event(), Event(), Lock()
        self._thread = Thread(target=self._run)

    def begin(self) -> None:
        """Returns when its pictures are being drawn."""
        self._wanted.set()
        time.sleep(LEAD)

    def pause(self) -> None:
        """Returns when nothing of it is drawn any more."""
        self._wanted.clear()
        with self._asking:
            pass

    def _run(self) -> None:
        while not self._over.is_set():
            self._wanted.wait(LEAD)
            with self._asking:
                if self._wanted.is_set():
                    self._ask()

    def _ask(self) -> None:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {GREEDY}"}
        self._connection.request("POST", GENERATIONS, json.dumps({"prompt": "a fox", "n": MANY}), headers)
        answer = self._connection.getresponse()
        answer.read()
        drawn = MANY if answer.status == 200 else 0
        self.pictures, self.refused = self.pictures + drawn, self.refused + MANY - drawn

    def __enter__(self) -> GreedyClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wanted.clear()
        self._over.set()
        self._thread.join()
        self._connection.close()
