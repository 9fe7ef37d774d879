"""`python -m toka` is the `toka` script."""

import sys

from toka.cli import main

sys.exit(main())
