"""Packages that parts of softmeet need beyond its core, and the line that installs them."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from softmeet.errors import InvalidInputError


def require_extra(what: str, extra: str, *packages: str) -> None:
    """Check that packages are installed, before they are imported.

    Args:
        what: what needs them, the beginning of the message: ``"serving"``.
        extra: the extra of softmeet that has them: ``"server"``.
        packages: their import names.

    Raises:
        InvalidInputError: if one is missing; the message says which, and how to install it.

    Example:
        >>> require_extra("this", "eval", "json")
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise InvalidInputError(f"{what} needs {' and '.join(missing)}: {install_line(extra)}")


def install_line(extra: str) -> str:
    """Return the command that installs an extra: from where softmeet was installed from, else by name.

    Example:
        >>> "[server]'" in install_line("server")
        True
    """
    # Environments that uv made hold no pip.
    pip = f"{sys.executable} -m pip install" if find_spec("pip") else f"uv pip install --python {sys.executable}"
    found = _origin()
    # pip does not know that the distribution of the bundled members lies there, too.
    if "dir_info" in found:
        folder = Path(unquote(urlparse(found["url"]).path))
        return f"{pip} -e '{folder / 'zoo'}'" if extra == "zoo" else f"{pip} -e '{folder}[{extra}]'"
    if "vcs_info" in found:
        there, revision = "{vcs_info[vcs]}+{url}".format_map(found), found["vcs_info"].get("requested_revision")
        there += f"@{revision}" if revision else ""
        own = f"softmeet-zoo @ {there}#subdirectory=zoo" if extra == "zoo" else f"softmeet[{extra}] @ {there}"
        return f"{pip} '{own}'"
    return f"{pip} 'softmeet[{extra}]'"


def _origin() -> dict[str, Any]:
    """Return what pip noted of a folder or repository that softmeet was installed from; {} of an index or a wheel."""
    try:
        found: dict[str, Any] = json.loads(distribution("softmeet").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return {}
    return found
