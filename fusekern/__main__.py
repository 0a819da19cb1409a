"""``python -m fusekern VERB``, for torchrun and for environments whose scripts are not on the path."""

import sys

from fusekern.cli import main

if __name__ == "__main__":
    sys.exit(main())
