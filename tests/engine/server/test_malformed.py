"""What a server does with malformed requests and frames: refuse each, and go on serving.

An answer of 200 is the server's fault, as is 5xx, or silence where an answer is due.
"""

import json
from collections import Counter

import httpx
import pytest

from imagine_flash.engine.server.schemas import ImageRequest
from imagine_flash.tests.engine.server.malformed import KINDS, malformed
from imagine_flash.tests.engine.server.refusals import outcome


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.weekly])])
def test_each_is_refused_and_good_requests_are_answered_between(server, count: int) -> None:
    outcomes: Counter[str] = Counter()
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for number, sent in enumerate(malformed(count, seed=0), 1):
            outcomes[outcome(server.port, sent)] += 1
            if number % 100 == 0:
                answer = http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1, "seed": number})
                assert answer.status_code == 200
    assert server.process.poll() is None and "Traceback" not in server.log.read_text()
    assert {"400", "413", "closed 1002", "error message"} < outcomes.keys(), outcomes


def test_the_same_seed_makes_the_same_malformed_requests() -> None:
    assert list(malformed(60, 3)) == list(malformed(60, 3)) != list(malformed(60, 4))


def test_no_json_of_a_malformed_request_could_be_drawn() -> None:
    """9e18 once was a "huge number", and is a seed like any other."""
    for sent in list(malformed(60 * len(KINDS), 5))[:: len(KINDS)]:
        body = sent.data.partition(b"\r\n\r\n")[2]
        try:
            found = ImageRequest.model_validate(json.loads(body))
        except (ValueError, RecursionError):
            continue
        assert sent.what == "impossible value", sent
        assert found.size not in (None, "64x64") or found.steps == 999 or not found.prompt.strip()
