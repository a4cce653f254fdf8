"""The Hugging Face hub, through huggingface_hub: where a file is, whether it can be reached, whole snapshots.

Imports huggingface_hub inside functions: catalog look-ups must stay quick.
"""

import logging
import os
import sys
from pathlib import Path

from paceline.server.errors import DownloadError, ModelNotFoundError
from paceline.server.models import download

logger = logging.getLogger(__name__)

#: What a decoder needs: configuration, weights, tokenizer. Pickled weights are never fetched.
SNAPSHOT_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
#: What the arithmetic of capacity needs.
CONFIG_PATTERNS = ["config.json"]
#: Second copies of the same weights in other layouts.
IGNORED_PATTERNS = ["consolidated*", "original/*", "onnx/*", "openvino/*"]


def endpoint() -> str:
    """Base URL of the hub in use (``HF_ENDPOINT``)."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def unreachable() -> str | None:
    """Why the hub cannot be used now, None if it answers; takes a few seconds at most."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return download.probe(endpoint())


def file_url(repo: str, filename: str) -> str:
    """Address of one file of a repository's main branch."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, filename, endpoint=endpoint())


def headers() -> dict[str, str]:
    """Request headers, the user's hub token included if there is one."""
    from huggingface_hub import get_token

    token = get_token()
    return {"User-Agent": "paceline"} | ({"Authorization": f"Bearer {token}"} if token else {})


def local_snapshot(repo: str, revision: str | None) -> Path | None:
    """A snapshot that is on this disk already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def snapshot(repo: str, revision: str | None, patterns: list[str] = SNAPSHOT_PATTERNS) -> Path:
    """Folder of a repository's configuration, safetensors and tokenizer, downloaded as far as it must be.

    When the hub cannot be reached, a snapshot on this disk is used, and a log line says so.

    Args:
        patterns: files that are wanted.
    """
    name = f"hf:{repo}" + (f"@{revision}" if revision else "")
    if (reason := unreachable()) is not None:
        found = local_snapshot(repo, revision)
        if found is None:
            raise DownloadError(f"{name} is not on this disk and the hub cannot be reached ({reason})")
        logger.warning("the hub cannot be reached (%s): using the copy of %s on this disk", reason, name)
        return found
    return _download_snapshot(repo, revision, name, patterns)


def _download_snapshot(repo: str, revision: str | None, name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    logger.info("fetching %s", name)
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            endpoint=endpoint(),
            allow_patterns=patterns,
            ignore_patterns=IGNORED_PATTERNS,
        )
    except GatedRepoError as error:
        raise DownloadError(
            f"{name} asks for its licence to be accepted: do so on the hub, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{name}: the repository has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name}: no such repository on the hub (a private one needs HF_TOKEN)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise DownloadError(f"{name}: {' '.join(str(error).split())}") from error
    logger.info("%s is complete", name)
    return Path(folder)
