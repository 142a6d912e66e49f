"""Remote sources as fsspec reads them: which package, which errors, which tries."""

from __future__ import annotations

BACKOFF_S = 0.5
"""Longest wait after the first failed try; it doubles with every further one, up to BACKOFF_MAX_S."""
BACKOFF_MAX_S = 30.0
BLOCK = 8 << 20
"""Bytes asked for in one read."""
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
FAILURES = {
    "aiohttp": ["aiohttp.ClientError"],
    "s3fs": ["aiohttp.ClientError", "botocore.exceptions.BotoCoreError", "http.client.HTTPException"],
    "gcsfs": ["aiohttp.ClientError", "gcsfs.retry.HttpError", "google.auth.exceptions.GoogleAuthError"],
}
"""What a backend raises besides OSError (which holds connection errors and timeouts)."""
TRANSIENT = (408, 425, 429)
"""HTTP states below 500 that another try can cure."""


class BadBody(Exception):
    """What arrived is not the shard: too short, too long, or other bytes."""


def http_status(error: Exception) -> int | None:
    """The HTTP status that a backend's error stands for: aiohttp `status`, gcsfs `code`, botocore a dictionary."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        state = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        state = getattr(error, "status", None) or getattr(error, "code", None)
    return int(state) if str(state).isdigit() else None


def describe(error: Exception, state: int | None) -> str:
    """What happened, in words; without the request's URL, which may be signed."""
    if state is not None:
        return f"HTTP {state}"
    if isinstance(error, TimeoutError):
        return "nothing came within stream.timeout_s"
    return " ".join(f"{type(error).__name__} {error}".split())
