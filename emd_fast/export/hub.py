"""Uploads exported folders to the Hugging Face hub, with their model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from emd_fast.export import card
from emd_fast.io.reading import reason
from emd_fast.train.trainer import EMDTrainer

T = TypeVar("T")


def write_card(folder: Path, name: str, trainer: EMDTrainer, metrics: Mapping[str, Any] | None) -> None:
    """Puts the name on the hub, and figures of the run, into the model card of an exported folder.

    Args:
        metrics: as for `card.for_hub`.
    """
    path = folder / "README.md"
    facts = trainer.teacher_facts["sha256"], trainer.steps_done
    text = path.read_text() if path.exists() else card.of_no_pipeline(trainer.teacher, *facts)
    path.write_text(card.for_hub(text, name, metrics))


class HubError(RuntimeError):
    """The hub cannot be reached, or refuses: one line with the remedy."""


class Repository:
    """A model on the hub that an export goes to.

    The constructor asks the hub who the user is, so that a missing token is known before an export.

    Args:
        name: "user/name", or "name" for one's own.

    Raises:
        ValueError: no name of a repository.
        ModuleNotFoundError: huggingface_hub is not installed.
        HubError: no token, a token that is refused, or no network.
    """

    def __init__(self, name: str) -> None:
        try:
            import huggingface_hub as hub
            from huggingface_hub.utils import validate_repo_id
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'an upload needs huggingface_hub: `pip install "emd_fast[diffusers]"`', name=error.name
            ) from error
        try:
            validate_repo_id(name)
        except ValueError as error:
            raise ValueError(f"{name!r} is no name on the hub: {reason(error)}") from None
        self.name, self._api = name, hub.HfApi(library_name="emd_fast")
        user = self._ask("log in to", self._api.whoami)["name"]
        self.name = name if "/" in name else f"{user}/{name}"

    def push(self, folder: Path, *, public: bool = False) -> str:
        """Uploads the files of a folder in one commit; returns the address of the model.

        Args:
            folder: complete, with its README.md.
            public: of a model that is not there yet. One that is there stays as visible as it is.

        Raises:
            HubError: the hub refuses it, the connection is lost, or the model has files of something else,
                which would be read with the upload. The folder is intact.
        """
        made = self._ask("make", lambda: self._api.create_repo(self.name, private=not public, exist_ok=True))
        there = self._ask("read", lambda: self._api.list_repo_files(made.repo_id))
        own = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        if others := sorted(set(there) - own - {".gitattributes"}):
            raise HubError(
                f"{self.name} on the Hugging Face hub has files of something else, as {others[0]}: give another name"
            )
        self._ask(
            "upload to",
            lambda: self._api.upload_folder(
                repo_id=made.repo_id, folder_path=folder, commit_message="Generator, exported by emd_fast"
            ),
        )
        return str(made)

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (TypeError, AttributeError):  # a bug, or another interface
            raise
        except Exception as error:  # of its HTTP client, too, whose classes differ between its releases
            raise HubError(
                f"cannot {what} {self.name} on the Hugging Face hub: {reason(error)}; {self._remedy(error, what)}"
            ) from error

    def _remedy(self, error: Any, what: str) -> str:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if type(error).__name__ == "LocalTokenNotFoundError" or status in (401, 403):
            return "give a token that may write, by `hf auth login` or HF_TOKEN"
        if what == "log in to":
            return "try again once it can be reached"
        return f"`hf upload {self.name} FOLDER` sends the folder later"
