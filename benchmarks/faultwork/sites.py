"""Where a fault can come: every call in gradwatch's code that a run makes, found by tracing a run.

Nothing is listed by hand, so a new function is covered as soon as a scene reaches it. A site is an instruction, before
which the call fails without having begun, or after which it fails with its work done.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple, Self

import gradwatch
from benchmarks.faultwork.foresight import descriptors, is_foreseen, passed_on, read_ahead

PACKAGE = f"{Path(gradwatch.__file__).parent}/"
#: Instructions that call something, and those that do where tensors and arrays are added or looked into.
_CALLS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "BEFORE_WITH", "IMPORT_NAME"}
_OPERATORS = {"BINARY_OP", "BINARY_SUBSCR", "STORE_SUBSCR", "COMPARE_OP", "UNARY_NEGATIVE"}
_NUMERIC = ("backends/", "detectors/", "rows.py")
#: Modules whose functions may wait, for a disk, a network, another thread, or the user's own code.
_WAITING = {
    "posix", "os", "_io", "io", "pathlib", "fcntl", "select", "_socket", "socket", "ssl", "http", "urllib", "smtplib",
    "_thread", "threading", "subprocess", "logging", "pyarrow", "benchmarks",
}  # fmt: skip


class Site(NamedTuple):
    """One instruction at which a call may fail.

    Args:
        file: Below the package.
        line: Of the instruction.
        function: Qualified name of the function.
        first_line: Of the function.
        offset: Of the instruction in the function's code.
        when: `before` or `after` the call.
        moment: Of the run: `watch`, `first`, `steady`, `close`, ...
        thread: `main`, or the kind of thread.
        leads: Whether its function calls none but ours, as one that leads into a guard does: it has nothing of its own
            that can fail, and what it calls fails by itself. Only an interrupt comes to it.
        waits: Whether what is called may wait for something, and so hang.
    """

    file: str
    line: int
    function: str
    first_line: int
    offset: int
    when: str
    moment: str
    thread: str
    leads: bool = False
    waits: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function} ({self.when}, {self.moment}, {self.thread})"


class Moment:
    """What the run is doing now; set by the run, read by whoever traces it."""

    def __init__(self) -> None:
        self.now = ""
        self.main = threading.get_ident()

    @property
    def thread(self) -> str:
        """Kind of the thread that asks."""
        return "main" if threading.get_ident() == self.main else threading.current_thread().name


@contextmanager
def traced(trace: Any, profile: Any) -> Iterator[None]:
    """With these functions on this thread and on all that begin meanwhile."""
    read_ahead(PACKAGE)
    threading.settrace(trace)
    threading.setprofile(profile)
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        sys.settrace(None)
        threading.setprofile(None)
        threading.settrace(None)


@functools.cache
def instructions(code: CodeType) -> dict[int, int]:
    """Offset to line of the instructions of a function that may fail."""
    numeric = code.co_filename.removeprefix(PACKAGE).startswith(_NUMERIC)
    wanted = _CALLS | _OPERATORS if numeric else _CALLS
    found, line, pushed = {}, code.co_firstlineno, 0
    for each in dis.get_instructions(code):
        line = each.positions.lineno if each.positions and each.positions.lineno else line
        # Three Nones before a call: the end of a `with`, whose failure is that of the block.
        if each.opname in wanted and pushed < 3 and each.offset not in left_out(code, "before"):
            found[each.offset] = line
        if each.opname not in {"PRECALL", "CACHE"}:
            pushed = pushed + 1 if each.opname == "LOAD_CONST" and each.argval is None else 0
    return found


@functools.cache
def left_out(code: CodeType, when: str) -> frozenset[int]:
    """Offsets at which nothing fails.

    Those are calls of the user's own, and places behind a call that gave a bare descriptor or that entered a `with`:
    Python sees to it that nothing comes between the entering and the block.
    """
    is_after = when == "after"
    spans = passed_on(code.co_filename) | (descriptors(code.co_filename) if is_after else frozenset())
    return frozenset(
        each.offset
        for each in _with_caches(code)
        if each.positions in spans or (is_after and each.opname == "BEFORE_WITH")
    )


def _with_caches(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions, with the caches behind them, the last of which is "the last instruction" in a Python call."""
    return dis.get_instructions(code, show_caches=True)


@functools.cache
def _begins(code: CodeType) -> dict[int, int]:
    """Offset of an instruction or of a cache behind it to that of the instruction."""
    begins, begin = {}, 0
    for each in _with_caches(code):
        begin = begin if each.opname == "CACHE" else each.offset
        begins[each.offset] = begin
    return begins


def _place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename.removeprefix(PACKAGE), code.co_qualname, code.co_firstlineno


def _is_thrown_away(frame: FrameType, event: str) -> bool:
    """Whether it may be a generator that "returns" because nobody wants it, where nobody hears what is raised."""
    return event == "return" and bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


class Catalogue:
    """Collects the sites of a run, with how often each was passed.

    Args:
        moment: Of the run that is traced.
    """

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._hits: Counter[Site] = Counter()
        self._calling_out: set[CodeType] = set()
        self._waiting: set[tuple[CodeType, int]] = set()

    @property
    def hits(self) -> dict[Site, int]:
        """How often each site was passed."""
        out = {_place(code) for code in self._calling_out}
        waiting = {(*_place(code), offset) for code, offset in self._waiting}
        found = {}
        for site, count in self._hits.items():
            place = site.file, site.function, site.first_line
            found[site._replace(leads=place not in out, waits=(*place, site.offset) in waiting)] = count
        return found

    def __enter__(self) -> Self:
        self._traced = traced(self._begin, self._profile)
        self._traced.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._traced.__exit__(None, None, None)

    def _begin(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "<module>":
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return functools.partial(self._trace, instructions(frame.f_code))

    def _trace(self, places: dict[int, int], frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode" and frame.f_lasti in places:
            if dis.opname[frame.f_code.co_code[frame.f_lasti]] in _OPERATORS | {"IMPORT_NAME"}:
                self._calling_out.add(frame.f_code)
            self._note(frame, places[frame.f_lasti], "before")
        return frame.f_trace

    def _profile(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            module = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
            self._calls_out(frame, str(module))
        elif event == "call" and frame.f_back is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            self._calls_out(frame.f_back, str(frame.f_globals.get("__name__")))
        elif event in {"return", "c_return"}:
            caller = frame.f_back if event == "return" else frame
            if _is_thrown_away(frame, event):
                return
            is_ours = caller is not None and caller.f_code.co_filename.startswith(PACKAGE)
            if caller is not None and is_ours and caller.f_lasti not in left_out(caller.f_code, "after"):
                self._note(caller, caller.f_lineno, "after")

    def _calls_out(self, frame: FrameType, module: str) -> None:
        self._calling_out.add(frame.f_code)
        if module.partition(".")[0] in _WAITING:
            self._waiting.add((frame.f_code, _begins(frame.f_code)[frame.f_lasti]))

    def _note(self, frame: FrameType, line: int, when: str) -> None:
        if self._moment.now:
            file, function, first = _place(frame.f_code)
            key = (file, line, function, first, frame.f_lasti, when, self._moment.now, self._moment.thread)
            self._hits[Site(*key)] += 1


class Injector:
    """Makes one call fail, once; with `then`, also a call that gradwatch makes after it.

    Args:
        site: Which.
        moment: Of the run.
        strike: Raises, or waits.
        nth: At which pass.
        then: How many calls later a second one fails; 0 for none.
        error: Class of what `strike` raises; None where it raises nothing.

    Attributes:
        fired: How many calls have failed.
        is_foreseen: Whether the code names this error where it calls, and goes on without what the call was for.
    """

    def __init__(
        self,
        site: Site,
        moment: Moment,
        strike: Callable[[], None],
        *,
        nth: int = 1,
        then: int = 0,
        error: type[BaseException] | None = None,
    ) -> None:
        self._error, self.is_foreseen = error, False
        self._site, self._moment, self._strike, self._left, self._then = site, moment, strike, nth, then
        self._key = (PACKAGE + site.file, site.function, site.first_line)
        self.fired = 0

    def __enter__(self) -> Self:
        is_after = self._site.when == "after"
        self._traced = traced(None if is_after else self._begin, self._profile if is_after or self._then else None)
        self._traced.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._traced.__exit__(None, None, None)

    def _begin(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not self.fired and (code.co_filename, code.co_qualname, code.co_firstlineno) == self._key:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self._trace
        return None

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode" and frame.f_lasti == self._site.offset and not self.fired:
            self._pass(frame)
        return self._trace

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if self.fired:
            self._second(frame, event)
        elif event in {"return", "c_return"} and self._site.when == "after" and not _is_thrown_away(frame, event):
            caller = frame.f_back if event == "return" else frame
            if caller is not None and caller.f_lasti == self._site.offset:
                code = caller.f_code
                if (code.co_filename, code.co_qualname, code.co_firstlineno) == self._key:
                    self._pass(caller)

    def _second(self, frame: FrameType, event: str) -> None:
        # A call out of our code: what is ours fails by what it calls.
        is_ours = event == "call" and frame.f_code.co_filename.startswith(PACKAGE)
        caller = {"call": frame.f_back, "c_call": frame}.get(event) if not is_ours else None
        if self.fired == 1 and self._then and caller is not None and caller.f_code.co_filename.startswith(PACKAGE):
            if _begins(caller.f_code).get(caller.f_lasti) not in instructions(caller.f_code):
                return
            self._then -= 1
            if not self._then:
                self.fired = 2
                self._strike()

    def _pass(self, frame: FrameType) -> None:
        if self._moment.now != self._site.moment or self._moment.thread != self._site.thread:
            return
        self._left -= 1
        if not self._left:
            self.fired = 1
            if self._error is not None:
                self.is_foreseen = is_foreseen(frame, PACKAGE, self._error)
            self._strike()
