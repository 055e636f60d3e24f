"""Every fault of `faults.py` is noticed: the tests can fail."""

import pytest

import faults


@pytest.mark.slow
@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.what.replace(" ", "-"))
def test_fault_is_noticed(fault: faults.Fault) -> None:
    noticed, message = faults.run(fault)
    assert noticed, f"{fault.test} does not notice that {fault.what}; it said: {message}"
