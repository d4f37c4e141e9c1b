"""Errors as the OpenAI API words them, so that its clients raise the exceptions people know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from ...core.errors import BusyError, EngineError, ExpiredError, ImagineFlashError, LoadingError
from .clients import QuotaError
from .model import ServedModel, retry_headers

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class Error(BaseModel):
    """What is wrong; param: the value to blame; code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer of 400 and above holds, for the OpenAPI document."""

    error: Error


def error_body(message: str, *, code: str | None, status: int, param: str | None = None) -> dict[str, Any]:
    """{"error": {message, type, param, code}}."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: ImagineFlashError) -> tuple[int, str]:
    """The HTTP status and code of an engine's error."""
    if isinstance(error, BusyError):
        return 429, "rate_limit_exceeded" if isinstance(error, QuotaError) else "busy"
    if isinstance(error, ExpiredError):
        return 504, "timeout"
    if isinstance(error, EngineError):
        return 503, "loading" if isinstance(error, LoadingError) else "engine_failed"
    return 400, "invalid_value"


def one_line(problem: Mapping[str, Any]) -> tuple[str, str | None]:
    """The message and the parameter of one of pydantic's errors about a request."""
    kind, given = str(problem["type"]), problem.get("input")
    if kind == "json_invalid":
        return f"the body is no JSON: {problem['ctx']['error']}", None
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    if param is None:
        return "send a JSON object, with the content-type application/json", None
    if "UploadFile" in str(problem["msg"]):
        return f"{param}: send a file", param
    if kind == "extra_forbidden":
        return f"{param}: there is no such field", param
    got = "" if kind == "missing" else f", got {str(given)[:100]!r}"
    return f"{param}: {str(problem['msg']).removeprefix('Value error, ')}{got}", param


def handle_errors(app: FastAPI, model: ServedModel) -> None:
    """Answers for what routes raise."""

    @app.exception_handler(ImagineFlashError)
    async def ours(request: Request, error: ImagineFlashError) -> JSONResponse:
        status, code = status_of(error)
        headers = {}
        if status in (429, 503):
            after = error.after if isinstance(error, QuotaError) else model.retry_after() if status == 429 else 1.0
            headers = retry_headers(after)
        return JSONResponse(error_body(str(error), code=code, status=status, param=error.param), status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = one_line(error.errors()[0])
        kind = request.headers.get("content-type", "")
        if isinstance(error.body, FormData) and not kind.startswith(FORMS):
            message, param = f"send a form, with the content-type multipart/form-data, got {kind[:100] or 'none'}", None
        return JSONResponse(error_body(message, code=error.errors()[0]["type"], status=400, param=param), 400)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 426: "upgrade_required", 503: "busy"}
        message = str(error.detail)
        if error.status_code in (404, 405) and message in ("Not Found", "Method Not Allowed"):
            message = f"there is no {request.method} {request.url.path[:100]}; /docs lists what there is"
        body = error_body(message, code=codes.get(error.status_code), status=error.status_code)
        return JSONResponse(body, error.status_code, error.headers)
