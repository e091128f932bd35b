"""The exception tree: what can be wrong from the outside, how HTTP says it, and what the user should do.

An assert is our bug; an exception of this tree is the user's input or the machine's state. Every message says what was
wrong, what is allowed and what to do; it never echoes prompts, keys, addresses or tracebacks.

TabstopError
├── InputError (400)
│   ├── ContextLengthError (400)      prompt (+ max_tokens) longer than the model's context
│   ├── UnknownModelError (404)
│   ├── NotSupportedError (400)       a real feature that this server or model does not have
│   ├── PayloadTooLargeError (413)
│   ├── HeaderTooLargeError (431)
│   └── RequestTimeoutError (408)     the client took too long to send its request
├── AuthenticationError (401) · ForbiddenError (403)
├── OverloadedError (429)             queue full or a limit reached; retry later
│   └── RateLimitError (429)          a ceiling of the key
├── UnavailableError (503)            starting, draining
│   └── EngineDeadError (503)         the engine process is gone
├── DeadlineError (504)
├── InternalError (500)
└── StartupError                      printed as one line by the CLI, exit code 2
    ├── CheckpointError               wrong path, missing or unexpected tensor, pickle, damaged file
    ├── UnsupportedModelError         unknown architecture or config value
    ├── MemoryShortageError           weights or KV cache do not fit
    └── ConfigError                   an option is out of range or contradicts another
"""

from __future__ import annotations


class TabstopError(Exception):
    """Base of all errors that a user can cause or must know of."""

    status = 500  # HTTP
    code = "internal_error"  # stable, machine-readable; also crosses the engine's process border
    openai_type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InputError(TabstopError):
    status = 400
    code = "invalid_request"
    openai_type = "invalid_request_error"


class ContextLengthError(InputError):
    code = "context_length_exceeded"


class UnknownModelError(InputError):
    status = 404
    code = "model_not_found"


class NotSupportedError(InputError):
    code = "not_supported"


class PayloadTooLargeError(InputError):
    status = 413
    code = "payload_too_large"


class HeaderTooLargeError(InputError):
    status = 431
    code = "header_too_large"


class RequestTimeoutError(InputError):
    status = 408
    code = "request_timeout"


class AuthenticationError(TabstopError):
    status = 401
    code = "invalid_api_key"
    openai_type = "authentication_error"


class ForbiddenError(TabstopError):
    status = 403
    code = "forbidden"
    openai_type = "permission_error"


class OverloadedError(TabstopError):
    status = 429
    code = "overloaded"
    openai_type = "rate_limit_error"


class RateLimitError(OverloadedError):
    code = "rate_limit_exceeded"


class UnavailableError(TabstopError):
    status = 503
    code = "unavailable"
    openai_type = "service_unavailable_error"


class EngineDeadError(UnavailableError):
    code = "engine_dead"


class DeadlineError(TabstopError):
    status = 504
    code = "deadline_exceeded"
    openai_type = "timeout_error"


class InternalError(TabstopError):
    pass


class StartupError(TabstopError):
    """The server or the offline LLM cannot start: one readable line, exit code 2."""

    code = "startup_error"


class CheckpointError(StartupError):
    pass


class UnsupportedModelError(StartupError):
    pass


class MemoryShortageError(StartupError):
    pass


class ConfigError(StartupError):
    pass


def _subclasses(cls: type[TabstopError]) -> list[type[TabstopError]]:
    return [cls, *(s for direct in cls.__subclasses__() for s in _subclasses(direct))]


def from_code(code: str, message: str) -> TabstopError:
    """The error class whose `code` crossed the process border; InternalError for an unknown one."""
    return next((cls for cls in _subclasses(TabstopError) if cls.code == code), InternalError)(message)
