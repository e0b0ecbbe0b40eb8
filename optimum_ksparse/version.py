import sys
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def library_versions(*names: str) -> dict[str, str]:
    """Versions of this package, of Python, and of those of the named libraries that are installed."""
    found = {"optimum-ksparse": __version__, "python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
