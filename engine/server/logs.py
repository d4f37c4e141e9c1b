"""The log on standard error: one line for each request, and for whatever else is said; JSON, or text for people."""

from __future__ import annotations

import logging

from asgi_correlation_id import CorrelationIdFilter
from pythonjsonlogger.json import JsonFormatter

SERVER = "imagine_flash.server"
CLIENTS_FAULTS = (
    "ASGI callable returned without completing handshake",  # uvicorn, of a handshake that was refused with 4xx
    "Invalid HTTP request received",  # uvicorn, without the address: `connections` says it with it
    "Generated new request ID",  # asgi-correlation-id, of an id that is none
)


def configure(level: str = "info", style: str = "json") -> None:
    """For the process that serves; style: json or text."""
    handler = logging.StreamHandler()
    if style == "json":
        fields = ["asctime", "levelname", "name", "message", "correlation_id"]
        names = {
            "asctime": "time",
            "levelname": "level",
            "name": "logger",
            "correlation_id": "request_id",
            "exc_info": "traceback",
        }
        handler.setFormatter(JsonFormatter(fields, datefmt="%Y-%m-%dT%H:%M:%S%z", rename_fields=names))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s [%(correlation_id)s]"))
    handler.addFilter(CorrelationIdFilter(default_value="-"))
    handler.addFilter(_is_of_interest)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(SERVER).setLevel(level.upper())


def _is_of_interest(record: logging.LogRecord) -> bool:
    """uvicorn's own traceback of a client's broken UTF-8 is left out: it is no error of the server."""
    if "Invalid UTF-8" in str(record.msg):
        record.exc_info, record.levelname = None, "WARNING"
    return not any(fault in str(record.msg) for fault in CLIENTS_FAULTS)
