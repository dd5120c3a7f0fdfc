"""Has the tests that draw their cases draw the same ones in every run: a failure is of the change that is tested.

HOLDFAST_TEST_FUZZ=1 draws others.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, database=None, deadline=None)
if not os.environ.get("HOLDFAST_TEST_FUZZ"):
    settings.load_profile("same")
