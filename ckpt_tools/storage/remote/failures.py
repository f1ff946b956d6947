"""Owns what happens when a request to a store fails: another attempt, or one message with the next step.

Transient failures (429, 5xx, broken connections, answers that end early or are too slow) are tried again with
growing pauses. A refusal is an error at once.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from ckpt_tools.errors import CkptError, DamagedCheckpoint, StoreFailed

T = TypeVar("T")

CHANGED = "Wait until the training run has finished its save, then run the command again."
# A store that has never answered gets less time, because its address is probably wrong.
_FIRST_SECONDS = 10.0
_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 15.0
_STATUS = re.compile(r"status code: (\d{3})\b")
_CODE = re.compile(r"<Code>(\w+)</Code>|\"reason\": ?\"(\w+)\"")
_SECRETS = re.compile(r"\?[^\s\"')]+|(?<=//)[^/\s@]+@")
_CODES = {
    "ExpiredToken": "the credentials have expired",
    "TokenRefreshRequired": "the credentials have expired",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "InvalidAccessKeyId": "the store does not know the access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "NoSuchBucket": "there is no such bucket",
    "PermanentRedirect": "the bucket is in another region",
    "AuthorizationHeaderMalformed": "the bucket is in another region",
    "IllegalLocationConstraintException": "the bucket is in another region",
    "AccessDenied": "the store denies access",
}
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    "hf": "HF_TOKEN, or run hf auth login",
}
# Without credentials, the library asks the machine for its own.
_NO_CREDENTIALS = ("169.254.169.254", "metadata.google.internal", "Missing credentials")
# S3 redirects to another region without saying where; the library then drops status and body.
_REDIRECTED = "redirect without LOCATION"
_REGIONS = {"s3": "Set AWS_REGION to the region of the bucket."}


class Patience:
    """How long requests to one store are tried again.

    Args:
        seconds: for one request, once the store has answered any.
    """

    def __init__(self, seconds: float = 1800.0) -> None:
        self.seconds = seconds
        self.has_answered = False
        self.attempts = 0
        self.repeated = 0

    def call(self, request: Callable[[], T], address: Callable[[], str]) -> T:
        """The answer to a request, after as many attempts as it takes.

        Args:
            request: makes one attempt.
            address: what is asked for.

        Raises:
            FileNotFoundError: the store has no such object.
            DamagedCheckpoint: the object was changed since it was listed.
            StoreFailed: the store refuses, or does not answer in time.
        """
        started, pause = time.monotonic(), _SHORTEST_PAUSE
        while True:
            self.attempts += 1
            try:
                answer = request()
            except (CkptError, FileNotFoundError):
                self.has_answered = True
                raise
            except Exception as error:
                if not _is_of_a_store(error):
                    raise
                refusal = _refusal(error, address())
                if refusal is not None:
                    raise refusal from None
                allowed = self.seconds if self.has_answered else min(_FIRST_SECONDS, self.seconds)
                if time.monotonic() - started + pause > allowed:
                    raise _unreachable(error, address(), allowed) from None
            else:
                self.has_answered = True
                return answer
            self.repeated += 1
            # Of many requests that fail together, each waits for another time.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)


def changed(
    address: str, fact: str = "the object was changed while it was read"
) -> DamagedCheckpoint:
    """The error for an object that is not what was listed."""
    return DamagedCheckpoint(fact, path=address, hint=CHANGED)


class Incomplete(OSError):
    """An answer that ended early."""


def _is_of_a_store(error: Exception) -> bool:
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, TimeoutError)) or module in (
        *("obstore", "huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests"),
    )


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a failed request, if it had an answer."""
    response = getattr(error, "response", None)
    if response is not None and getattr(response, "status_code", None) is not None:
        return int(response.status_code)
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def _refusal(error: Exception, address: str) -> CkptError | None:
    """The error that another attempt would meet again; None if it may succeed."""
    kind, text, status = type(error).__name__, str(error), status_of(error)
    scheme = address.partition(":")[0]
    named = _CODE.search(text)
    code = _CODES.get(named[1] or named[2]) if named else None
    if any(sign in text for sign in _NO_CREDENTIALS):
        where = _VARIABLES.get(scheme, "the credentials of the store")
        return StoreFailed("no credentials were found", path=address, hint=f"Set {where}. {_see()}")
    if kind == "OfflineModeIsEnabled":
        return StoreFailed(
            "HF_HUB_OFFLINE forbids requests to the Hub", path=address, hint="Unset HF_HUB_OFFLINE."
        )
    if kind == "PreconditionError" or status == 412:
        return changed(address)
    elsewhere = status in (301, 307) or (scheme == "s3" and _REDIRECTED in text)
    if elsewhere or code == "the bucket is in another region":
        return StoreFailed(
            "the bucket is in another region", path=address, hint=_REGIONS.get(scheme, _see())
        )
    if code == "there is no such bucket":
        return StoreFailed(code, path=address, hint="Check the spelling of the address.")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403) or code:
        fact = code or "the store denies access"
        if scheme in _VARIABLES:
            hint = f"Check the credentials and what they permit: {_VARIABLES[scheme]}."
        else:
            hint = "Only public files can be read from a web server."
        return StoreFailed(fact, path=address, hint=f"{hint} {_see()}")
    if isinstance(error, Incomplete) or status is None or status == 429 or status >= 500:
        return None
    if status in (408, 409, 416):
        return changed(address) if status == 416 else None
    return StoreFailed(f"the store answers with status {status}", path=address, hint=_see())


def _unreachable(error: Exception, address: str, seconds: float) -> StoreFailed:
    return StoreFailed(
        f"the store did not answer within {seconds:g} seconds ({_first_line(str(error))})",
        path=address,
        hint="Check the network, and the endpoint in the environment. With --resume, a conversion continues "
        "where it stopped.",
    )


def _see() -> str:
    return "docs/remote.md lists the environment variables and files."


def _first_line(text: str) -> str:
    """What a library says of a failure, without what may hold credentials."""
    line = _SECRETS.sub("", text.strip().partition("\n")[0])
    return line if len(line) <= 200 else f"{line[:200]}..."
