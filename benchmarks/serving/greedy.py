"""One client asks for 64 pictures in a loop: what that does to another, who asks for one at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

from ..harness import case_of
from ..pictures import drawn_by_torch
from ..schema import Case
from .bench import Bench
from .clients import GENERATIONS, NO_ANSWER_AFTER, Answer, HttpClient, serving

ALONE, BESIDE = "alone", "beside a greedy client"
GREEDY, MODEST = "greedy-client-of-bench", "modest-client-of-bench"  # their keys


def beside_a_greedy_client(bench: Bench, rounds: int) -> Case:
    """Seconds of one picture in the most steps, alone and while somebody with another key has 64 drawn again and again."""
    request, _ = drawn_by_torch(bench.folder, bench.engine.artifact)[max(bench.engine.steps)]
    with ExitStack() as opened:
        options = ("--api-key-file", str(opened.enter_context(keys_of(GREEDY, MODEST))))
        server = opened.enter_context(serving(bench.folder, bench.engine.backend.name, *options, max_queue=64))
        seconds: dict[str, list[float]] = {ALONE: [], BESIDE: []}
        answers: dict[str, list[Answer]] = {ALONE: [], BESIDE: []}
        with HttpClient(server.port, MODEST) as client:
            client.draw(request)
            for name in (ALONE, BESIDE):
                over = Event()
                other = Thread(target=ask_for_much, args=(server.port, over))
                if name == BESIDE:
                    other.start()
                    time.sleep(0.5)
                for _ in range(rounds):
                    started = time.perf_counter()
                    answers[name].append(client.draw(request))
                    seconds[name].append(time.perf_counter() - started)
                over.set()
                if name == BESIDE:
                    other.join()
    checks = {name: bench.check([one.pixels() for one in own[:3]], [request] * 3) for name, own in answers.items()}
    about = bench.about("a greedy client", steps=max(bench.engine.steps), pictures=64)
    return case_of(seconds, baseline=ALONE, checks=checks, case=about)


@contextmanager
def keys_of(*keys: str) -> Iterator[Path]:
    """A file of them."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.write_text("\n".join(keys))
        yield file


def ask_for_much(port: int, over: Event) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=NO_ANSWER_AFTER)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {GREEDY}"}
    while not over.is_set():
        connection.request("POST", GENERATIONS, json.dumps({"prompt": "a fox", "n": 64}), headers)
        if (answer := connection.getresponse()).read() and answer.status == 429:
            time.sleep(0.05)
    connection.close()
