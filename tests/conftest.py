"""Property tests: the same examples at every run, so that a failure is one of the change at hand.

`HYPOTHESIS_PROFILE=random pytest` looks for new ones.
"""

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("random")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
