"""``python -m mixprec_lab``: see ``mixprec_lab.command_line``."""

import sys

from mixprec_lab.command_line import main

if __name__ == "__main__":
    sys.exit(main())
