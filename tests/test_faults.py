"""Every fault of `faults.py` is noticed: the tests can fail."""

import dataclasses
import re

import pytest

import faults


@pytest.mark.slow
@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.what.replace(" ", "-"))
def test_fault_is_noticed(fault: faults.Fault) -> None:
    noticed, message = faults.run(fault)
    assert noticed, f"{fault.test} does not notice that {fault.what}; it said: {message}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("new", "test"), [("(", faults.FAULTS[0].test), ("0", "tests/model/test_ops.py::test_of_none")]
)
def test_what_does_not_run_is_no_proof(new: str, test: str) -> None:
    """A package that cannot be imported, and a test that is not there."""
    noticed, message = faults.run(dataclasses.replace(faults.FAULTS[0], new=new, test=test))
    assert not noticed, message


def test_every_fault_finds_its_text_and_its_test() -> None:
    """So that a change of the code meets this in seconds, not in the slow run."""
    for fault in faults.FAULTS:
        assert fault.old in (faults.ROOT / "src" / fault.path).read_text(encoding="utf-8"), fault.what
        for test in fault.test.split(" or "):
            path, *names = re.sub(r"\[.*", "", test).split("::")
            text = (faults.ROOT / path).read_text(encoding="utf-8")
            assert all(re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE) for name in names), fault.what
