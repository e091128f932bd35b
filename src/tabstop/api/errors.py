"""Errors → HTTP, in a route's own form or in OpenAI's: {"error": {"message", "type", "param", "code"}}.

Messages come from errors.py and are safe to show; what is not a TabstopError shows as a bare 500 and goes to the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from tabstop.api import ErrorForm
from tabstop.errors import InputError, PayloadTooLargeError, RequestTimeoutError, TabstopError

RETRY_LATER = (429, 503)


def error_object(error: TabstopError) -> dict[str, Any]:
    """OpenAI's, as a body."""
    shown = {"message": error.message, "type": error.openai_type, "param": error.param, "code": error.code}
    return {"error": shown}


def error_response(error: TabstopError, scope: Scope) -> Response:
    """The response of a request that failed before anything was sent."""
    headers = {}
    if error.status in RETRY_LATER:
        headers["retry-after"] = str(error.retry_after or 1)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, PayloadTooLargeError | RequestTimeoutError):
        headers["connection"] = "close"  # the rest of the body is not read
    forms: Mapping[str, ErrorForm] = scope["app"].state.error_forms
    form: ErrorForm = forms.get(scope["path"], error_object)
    return Response(msgspec.json.encode(form(error)), error.status, headers, "application/json")


def routing_response(error: HTTPException) -> Response:
    """The response of the router's own refusals: unknown path, wrong method."""
    messages = {
        404: ("not_found", "there is nothing at this path; see /openapi.json for what there is"),
        405: ("method_not_allowed", "this path does not take this method; see the Allow header"),
    }
    code, message = messages.get(error.status_code, ("invalid_request", HTTPStatus(error.status_code).phrase))
    body = {"error": {"message": message, "type": InputError.openai_type, "param": None, "code": code}}
    return Response(msgspec.json.encode(body), error.status_code, error.headers, "application/json")
