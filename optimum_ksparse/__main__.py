"""`python -m optimum_ksparse …`: as `optimum-cli ksparse …`, where optimum is not installed."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m optimum_ksparse"))
