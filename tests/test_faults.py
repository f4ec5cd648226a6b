import pytest

from gradwatch.errors import StopTraining
from gradwatch.faults import Faults


def fail() -> int:
    raise ValueError("disk on fire")


def test_result_of_a_working_part_passes_through() -> None:
    assert Faults().call("writer", lambda x: x + 1, 2, default=0) == 3


def test_failure_gives_the_default_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()

    assert [faults.call("writer", fail, default=7) for _ in range(3)] == [7, 7, 7]
    assert [record.getMessage() for record in caplog.records] == [
        "gradwatch: 'writer' failed and is switched off; training goes on"
    ]
    assert faults.messages == {"writer": "ValueError: disk on fire"}


def test_failed_part_is_not_called_again() -> None:
    faults = Faults()
    calls: list[int] = []
    faults.call("writer", fail, default=None)

    faults.call("writer", calls.append, 1, default=None)

    assert calls == []
    assert not faults.is_on("writer")


def test_other_parts_go_on() -> None:
    faults = Faults()
    faults.call("writer", fail, default=None)

    assert faults.call("detectors", lambda: "found", default="") == "found"


def test_stop_training_passes_through() -> None:
    def stop() -> None:
        raise StopTraining("exploding in fc")

    with pytest.raises(StopTraining, match="exploding in fc"):
        Faults().call("actions", stop, default=None)


def test_failures_noted_from_outside_are_counted() -> None:
    faults = Faults()
    faults.note("detector mine", RuntimeError("a"))
    faults.note("detector mine", RuntimeError("b"))

    assert faults.counts == {"detector mine": 2}
    assert faults.messages == {"detector mine": "RuntimeError: a"}
