"""A backend whose calls wait until the test lets them go, and requests for it."""

import threading

import numpy as np

from imagine_flash.engine import Engine, GenerateRequest


class Gate:
    """Around a real backend: holds each call of a stage until it is opened, and says what was asked."""

    def __init__(self, engine: Engine, stage: str = "denoise") -> None:
        self.calls: list[int] = []
        self.entered, self.open = threading.Event(), threading.Event()
        inner = getattr(engine.backend, stage)

        def held(*args):
            self.calls.append(len(args[0]) if stage != "encode" else len(next(iter(args[0].values()))))
            self.entered.set()
            assert self.open.wait(20), "the test never opened the gate"
            return inner(*args)

        setattr(engine.backend, stage, held)


def ask(prompt: str = "a cat", **values) -> GenerateRequest:
    return GenerateRequest(**{"prompt": prompt, "steps": 3, "seed": 7, **values})


def likeness(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())
