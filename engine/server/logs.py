"""The log on standard error: one line of JSON for each request, and for whatever else is said."""

from __future__ import annotations

import json
import logging
import time

SERVER = "imagine_flash.server"
NOT_WORTH_A_LINE = (
    "ASGI callable returned without completing handshake"  # uvicorn, of a handshake that was refused with 4xx
)


class Lines(logging.Formatter):
    """A record as one line of JSON; what is JSON already, the requests' lines, stays as it is."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == SERVER and text.startswith("{"):
            return text
        line = {"time": now(), "level": record.levelname.lower(), "logger": record.name, "message": text}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure() -> None:
    """For the process that serves."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    handler.addFilter(_worth_a_line)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger(SERVER).setLevel(logging.INFO)


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _worth_a_line(record: logging.LogRecord) -> bool:
    """uvicorn's own traceback of a client's broken UTF-8 is left out: it is no error of the server."""
    if "Invalid UTF-8" in str(record.msg):
        record.exc_info, record.levelname = None, "WARNING"
    return NOT_WORTH_A_LINE not in str(record.msg)
