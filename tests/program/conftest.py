"""The recorded year, run once for the session."""

from __future__ import annotations

import pytest

from tests.recorded_year import Recorded, run_year
from tests.running_program import RECORDING
from tests.slow_fold import Year, read_year


@pytest.fixture(scope="session")
def year() -> Year:
    if not RECORDING.exists():
        pytest.skip(f"the recorded year is not at {RECORDING.name}'s usual place")
    return read_year(RECORDING)


@pytest.fixture(scope="session")
def recorded(year: Year, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The program's record of the year."""
    return run_year(tmp_path_factory.mktemp("year"))
