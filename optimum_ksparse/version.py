import json
import os
import re
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version

__version__ = "0.2.0"

_NAME = "optimum-ksparse"
# Set it to where readers of a model's card get this package: `git+https://…`, the URL of a wheel, or, once it is
# registered there, its name on an index. Nobody should be told to install a name that anybody may still register.
INSTALL_VARIABLE = "OPTIMUM_KSPARSE_INSTALL"
_HARMLESS = re.compile(r"(git\+)?https://[\w.:-]+/[\w./@+%#=&-]{1,300}|[\w.-]{1,100}", re.ASCII)


def library_versions(*names: str) -> dict[str, str]:
    """Versions of this package, of Python, and of those of the named libraries that are installed."""
    versions = {"optimum-ksparse": __version__, "python": sys.version.split()[0]}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = _installed(name)
    return versions


_installed = cache(version)  # to parse the metadata of torch takes 20 ms


def install_command(extra: str | None = None) -> str | None:
    """The command by which others install this package: from what the environment variable names, otherwise from the
    repository that this installation came from, or from the URL of the project; None where none is known.

    Raises:
        ValueError: the variable holds something else.
    """
    source = os.environ.get(INSTALL_VARIABLE)
    if source is not None and not _HARMLESS.fullmatch(source):
        raise ValueError(f"{INSTALL_VARIABLE}={source!r} is neither git+https://…, the URL of a wheel, nor a name")
    source = source or _recorded_source()
    if source is None:
        return None
    name = f"{_NAME}[{extra}]" if extra else _NAME
    what = f"{name} @ {source}" if "/" in source else name.replace(_NAME, source)
    return f'pip install "{what}"' if "[" in what or " " in what else f"pip install {what}"


def install_hint(extra: str) -> str:
    """The command that adds what an extra of this package needs; of an installation without metadata, in its clone."""
    installed = _distribution()
    needed = [line.split(";") for line in (installed and installed.requires) or []]
    names = [name.strip() for name, *marker in needed if re.search(rf"extra == ['\"]{extra}['\"]", "".join(marker))]
    return "pip install " + (" ".join(f'"{name}"' for name in names) or f'".[{extra}]"')


def _distribution() -> Distribution | None:
    try:
        return distribution(_NAME)
    except PackageNotFoundError:
        return None


def _recorded_source() -> str | None:
    """Where the installed package came from, where others get it from, too: a repository, or the project's URL."""
    installed = _distribution()
    if installed is None:
        return None
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    links = [link.partition(",") for link in installed.metadata.get_all("Project-URL") or []]
    url = str(origin["url"]) + f"@{commit}" if commit else next((at.strip() for _, _, at in links), None)
    source = None if url is None else f"git+{url}"
    return source if source is not None and _HARMLESS.fullmatch(source) else None
