"""Refusals in the form of OpenAI's API: a status, and a body that names the cause and the field.

`refusal_of` translates Shoal's own errors: full is 429 and an empty stage 503, both with the time to wait.
"""

from __future__ import annotations

import math

from shoal.protocol.errors import AccessError, Busy, MessageInvalid, ShoalError, StageEmpty, UsageError

STAGE_EMPTY_S = 5.0  # for another replica to take the stage
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
}


class Refusal(Exception):
    """One answer that is no answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }
        self.headers = {} if retry_after_s is None else {"retry-after": str(math.ceil(retry_after_s))}


def refusal_of(error: ShoalError) -> Refusal:
    """What a caller hears of an error of ours."""
    match error:
        case Busy():
            wait_s = max(error.retry_after_s, 1.0)
            return Refusal(429, str(error), code="busy", retry_after_s=wait_s)
        case StageEmpty():
            return Refusal(503, str(error), code="stage_empty", retry_after_s=STAGE_EMPTY_S)
        case MessageInvalid() | UsageError():
            return Refusal(400, str(error), code="invalid_value")
        case AccessError():
            return Refusal(503, f"the swarm refuses this gateway: {error}", code="gateway_refused")
        case _:
            return Refusal(503, str(error), code="swarm_error", retry_after_s=STAGE_EMPTY_S)
