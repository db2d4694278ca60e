"""`python -m excise.cli`: the same as `excise`."""

import sys

from excise.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
