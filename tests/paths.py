"""Where the tests find material that is not part of the repository; a stranger's machine may lack it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
CONFORMANCE = SHARED / "conformance"
DATA = SHARED / "data"

needs_conformance = pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="the shared conformance vectors are not here")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared test files are not here")
