"""Lets the tests of kernels, those under Triton's interpreter too, import what lies beside them (adjusted_case)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
