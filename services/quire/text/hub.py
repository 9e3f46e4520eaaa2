"""Fetching a model's files from the Hugging Face hub, and why that cannot be."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Answers below 500 that may be others later."""

REPLY_S = 30.0
"""For the hub to connect, or to send more, where its client would wait for ever."""


class ModelNotFound(FileNotFoundError, ValueError):
    """The model is neither a folder nor a repository that may be read; the message says what to
    change."""


class HubUnreachable(ConnectionError):
    """The hub does not give the model now, and may later with nothing changed here."""


def download(model: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """Folder of a repository's `files` in the hub's cache. Raises ModelNotFound, HubUnreachable."""
    # imported here: a second of start-up that local folders need not pay
    from huggingface_hub import errors, get_session, snapshot_download

    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise ModelNotFound(f"access to {model} must be granted: set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFound(
            f"{model} is neither a local folder nor a repository on the hub (if it is private, "
            "set HF_TOKEN)"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise _not_in_cache(model, error) from None
    except errors.HfHubHTTPError as error:
        raise _refused(model, error) from None
    except (errors.HFValidationError, FileNotFoundError, PermissionError) as error:
        raise ModelNotFound(f"{model} could not be fetched: {_first_line(error)}") from None
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined] # of its HTTP client
        raise HubUnreachable(f"{model} cannot be fetched now: {_first_line(error)}") from None


def _limit(request: Any) -> None:
    """No request waits for ever. As the client calls it before each."""
    limits = request.extensions["timeout"]
    limits |= {kind: REPLY_S for kind, limit in limits.items() if limit is None}


def _not_in_cache(model: str, error: LocalEntryNotFoundError) -> OSError:
    """What kept the hub from being asked."""
    from huggingface_hub import errors

    match error.__cause__:
        case None | errors.OfflineModeIsEnabled():
            return ModelNotFound(
                f"{model} is not in the local hub cache, and HF_HUB_OFFLINE keeps it from being "
                "fetched: unset it, or fill the cache"
            )
        case errors.HfHubHTTPError() as cause:
            return _refused(model, cause)
        case cause:
            return HubUnreachable(
                f"{model} is not in the local hub cache, and the hub cannot be reached: "
                + _first_line(cause)
            )


def _refused(model: str, error: HfHubHTTPError) -> OSError:
    """By what the hub answered."""
    status = error.response.status_code
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _PASSING:
        return HubUnreachable(f"{model} cannot be fetched now: the hub answers {status}")
    return ModelNotFound(f"{model} could not be fetched: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
