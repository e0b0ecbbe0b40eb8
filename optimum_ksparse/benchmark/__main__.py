"""`python -m optimum_ksparse.benchmark`: as `optimum-cli ksparse bench`, where optimum is not installed."""

from __future__ import annotations

import argparse
import sys

from . import FLAGS, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m optimum_ksparse.benchmark", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id of a sparse model")
    for name, arguments in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **arguments)
    try:
        print(run(**vars(parser.parse_args())))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, TypeError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
