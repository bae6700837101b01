"""Upload an export to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from wadi.backbones.hub import is_hub_id
from wadi.errors import WadiError, first_line
from wadi.io.quiet import errors_only


def check_can_push(repo: str) -> None:
    """Raise `WadiError` if ``repo`` is no name of a repository, there is no token, or the Hub may not be used."""
    from huggingface_hub import get_token, is_offline_mode

    if not is_hub_id(repo):
        raise WadiError(f"--push-to-hub is {repo!r:.100}. Give the name of a repository: OWNER/NAME.")
    if is_offline_mode():
        raise WadiError(f"--push-to-hub {repo} was given, but HF_HUB_OFFLINE is set. Unset it, or leave out --push-to-hub.")
    if get_token() is None:
        raise WadiError(
            f"--push-to-hub {repo} needs a token that can write: log in with `hf auth login`, or set HF_TOKEN. Nothing was "
            "exported."
        )


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload the files of ``folder`` in one commit, and return the address of the repository.

    A repository that does not exist is created: private, or by the default of its owner. In one that exists, files of the same
    names are replaced and others stay.

    Raises:
        WadiError: if the upload fails, or ``private`` is set and the repository exists and is public. ``folder`` is not
            changed, and the message has the command that uploads it again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with errors_only():
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise WadiError("it exists and is public, and --private was given")
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export written by wadi")
    except Exception as error:  # of the network, the server, or files that changed meanwhile
        raise WadiError(
            f"The export is complete in {str(folder)!r}, but could not be uploaded to {repo}: {first_line(error)}. Upload it "
            f"again: hf upload {repo} {str(folder)!r}"
        ) from error
    return str(url)
