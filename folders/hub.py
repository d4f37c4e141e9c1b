"""Folders by the name they have on the Hugging Face hub."""

import os
import re
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..core.errors import ArtifactError, missing_extra
from .files import ARTIFACT_FILE, CACHE_VARIABLE, atomic_folder, cache_folder

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # what begins with . / or ~ is a path
PICKLED = ("*pytorch_model*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5")  # never read here, so never fetched


def local_folder(
    name: str | Path, *, ignore: Sequence[str] = (), only: Sequence[str] | None = None, revision: str | None = None
) -> Path:
    """The folder of that path; a hub id ("owner/name", where no such folder is) is downloaded into the hub's cache.

    ignore: patterns of further files that are not needed; only: of those that are. revision: a branch, tag or commit of the
    hub's. Raises ArtifactError, MissingExtraError.
    """
    folder = Path(name)
    if folder.exists() or not HUB_ID.fullmatch(str(name)):
        if revision is not None:
            raise ArtifactError(f"{name} is no hub id (owner/name), so it has no revision {revision!r}; leave it out")
        return folder
    try:
        hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
    except ImportError:
        raise missing_extra("huggingface_hub", "cpu") from None
    known = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError)
    try:
        wanted = {"ignore_patterns": [*PICKLED, *ignore], "allow_patterns": only, "revision": revision}
        snapshot = Path(hub.snapshot_download(str(name), **wanted))
        return snapshot if only is not None else _with_files_of_its_own(snapshot, str(name))
    except errors.HFValidationError:
        raise ArtifactError(f"there is no folder {name}, and no hub id is written so; check the path") from None
    except errors.GatedRepoError:
        raise ArtifactError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name} and log in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ArtifactError(f"{name} has no revision {revision!r} on the hub") from None
    except errors.RepositoryNotFoundError:
        raise ArtifactError(
            f"the hub has no {name}, or it is private; see the names that are known: imagine-flash models"
        ) from None
    except known as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        place = Path(hub.constants.HF_HUB_CACHE) / f"models--{str(name).replace('/', '--')}"
        raise ArtifactError(
            f"{name} is no folder here and could not be fetched from the Hugging Face hub ({reason}); without network, download "
            f"it elsewhere (hf download {name}) and copy it to {place}, or give the path of its folder"
        ) from None


def hub_file(name: str) -> tuple[str, str] | None:
    """The hub id and the file that owner/name/FILE means; None for a path, as where there is a folder `owner` here."""
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    hub_id = f"{owner}/{repository}"
    return (hub_id, file) if Path(file).suffix and HUB_ID.fullmatch(hub_id) and not Path(owner).exists() else None


def files_on_hub(name: str) -> list[str]:
    """Names of the files of a hub id, none of which is fetched; without network of those that the cache has. Raises as
    `local_folder`."""
    try:
        hub = import_module("huggingface_hub")
    except ImportError:
        raise missing_extra("huggingface_hub", "cpu") from None
    try:
        return sorted(hub.list_repo_files(name))
    except Exception:  # of whichever HTTP library it uses
        folder = local_folder(name, only=())  # or it says what is wrong
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _with_files_of_its_own(snapshot: Path, name: str) -> Path:
    """An artifact of the hub's cache without links: there, files are links to `blobs/`, and runtimes refuse weights outside
    the folder of their graph. Hard links where the file system has them, so that nothing is stored twice. A copy that lacks
    files, made when the download had broken off, is made anew."""
    if not (snapshot / ARTIFACT_FILE).is_file() or not any(path.is_symlink() for path in snapshot.rglob("*")):
        return snapshot
    error: ArtifactError | None = None
    files = [path.relative_to(snapshot) for path in snapshot.rglob("*") if path.is_file()]
    for place in (snapshot.parents[1] / "imagine-flash", cache_folder("hub")):  # beside the blobs, where one may write
        if place is None:
            continue
        target = place / f"{name.replace('/', '--')}-{snapshot.name}"
        if all((target / file).is_file() for file in files):
            return target
        try:
            place.mkdir(exist_ok=True)
            with atomic_folder(target) as temporary:
                for file in files:
                    (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                    _link_or_copy((snapshot / file).resolve(), temporary / file)
            return target
        except (ArtifactError, OSError) as reason:
            error = ArtifactError(f"cannot unpack {name} ({reason}); set {CACHE_VARIABLE} to a folder with room")
    raise error or ArtifactError(f"cannot unpack {name}; set {CACHE_VARIABLE} to a folder")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)
