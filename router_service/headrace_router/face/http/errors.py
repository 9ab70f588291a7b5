"""Errors as HTTP says them: the status of each, and OpenAI's body."""

from __future__ import annotations

import json
import math
from http import HTTPStatus

from headrace_core.errors import HeadraceError, InvalidRequestError, OverloadedError, UnavailableError

_BY_STATUS = {
    "INVALID_ARGUMENT": HTTPStatus.BAD_REQUEST,
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "UNAUTHENTICATED": HTTPStatus.UNAUTHORIZED,
    "PERMISSION_DENIED": HTTPStatus.FORBIDDEN,
    "RESOURCE_EXHAUSTED": HTTPStatus.TOO_MANY_REQUESTS,
    "UNAVAILABLE": HTTPStatus.SERVICE_UNAVAILABLE,
    "DEADLINE_EXCEEDED": HTTPStatus.GATEWAY_TIMEOUT,
}
"""By the status of gRPC; what is not here is 500."""
_BY_REASON = {
    "BAD_SAMPLING": HTTPStatus.UNPROCESSABLE_ENTITY,
    "BAD_TOKEN": HTTPStatus.UNPROCESSABLE_ENTITY,
    "MESSAGE_TIMEOUT": HTTPStatus.REQUEST_TIMEOUT,
}
_CODES = {
    "UNKNOWN_MODEL": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "BAD_API_KEY": "invalid_api_key",
    "RATE_LIMITED": "rate_limit_exceeded",
}
"""OpenAI's own words, which clients look for; every other reason is its own code."""
_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_UNAVAILABLE_RETRY_S = 1.0

Headers = list[tuple[str, str]]


class HttpError(InvalidRequestError):
    """A request that HTTP has a status of its own for, or one of whose fields can be named."""

    def __init__(
        self,
        message: str,
        *,
        http_status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__("BAD_REQUEST", message, param=param)
        self.http_status = http_status
        self.headers = headers or []


def status_of(error: HeadraceError) -> HTTPStatus:
    """Return the HTTP status of an answer that `error` is all of."""
    if isinstance(error, HttpError):
        return error.http_status
    by_status = _BY_STATUS.get(error.status, HTTPStatus.INTERNAL_SERVER_ERROR)
    return _BY_REASON.get(error.reason, by_status)


def body_of(error: HeadraceError) -> str:
    """Return OpenAI's JSON for `error`."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error")
    said = {
        "message": str(error),
        "type": kind,
        "param": error.param,
        "code": _CODES.get(error.reason, error.reason),
    }
    return json.dumps({"error": said}, separators=(",", ":"))


def headers_of(error: HeadraceError) -> Headers:
    """Return the headers that say more of `error`: its reason, when to come again."""
    headers = [("headrace-reason", error.reason)]
    if isinstance(error, HttpError):
        headers += error.headers
    retry_s = 0.0
    if isinstance(error, OverloadedError):
        retry_s = error.retry_after_s or 0.0
    elif isinstance(error, UnavailableError):
        retry_s = _UNAVAILABLE_RETRY_S
    if retry_s:
        headers += [("retry-after", str(math.ceil(retry_s))), ("retry-after-ms", str(round(1000 * retry_s)))]
    if status_of(error) == HTTPStatus.UNAUTHORIZED:
        headers.append(("www-authenticate", "Bearer"))
    return headers
