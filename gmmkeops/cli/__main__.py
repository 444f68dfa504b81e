"""Entry point ``python -m gmmkeops.cli`` of the command line, for launchers such as torchrun."""

import sys

from gmmkeops.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
