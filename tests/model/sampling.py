"""How much of what the models know is tried: a part in each run of the suite, all of it with the profile "thorough"."""

from hypothesis import settings

IS_THOROUGH = settings.get_current_profile_name() == "thorough"
# Of the steps at which a crash is tried, and of the states in which a disk may be found: every STRIDE-th.
STRIDE = 1 if IS_THOROUGH else 10
