"""Which part of the models' cases runs: a sample in each run of the suite, all cases with the profile "thorough"."""

from hypothesis import settings

IS_THOROUGH = settings.get_current_profile_name() == "thorough"
# Every STRIDE-th step is tried for a crash, and every STRIDE-th possible state of the disk.
STRIDE = 1 if IS_THOROUGH else 10
