"""Faults and exceptions as they travel to the front."""

from __future__ import annotations

import traceback

from pullback_server.engine.boot import told
from pullback_server.faults import Fault
from pullback_server.job import FaultRecord
from pullback_wire import Reason

#: Characters of a traceback that travel to the log: its end says most.
_TRACEBACK = 16 << 10


def fault_record(fault: Fault) -> FaultRecord:
    """A fault, with its traceback where that says more than the fault."""
    trace = trace_of(fault) if fault.reason in (Reason.MODEL_ERROR, Reason.INTERNAL) else ""
    return FaultRecord(fault.reason.value, cleaned(fault.message), cleaned(fault.field), fault.retry_after, trace)


def record_of(reason: Reason, what: str, error: BaseException) -> FaultRecord:
    """Any other exception."""
    return FaultRecord(reason.value, cleaned(f"{what}: {told(error)}"), traceback=trace_of(error))


def trace_of(error: BaseException) -> str:
    return cleaned("".join(traceback.format_exception(error))[-_TRACEBACK:])


def cleaned(text: str) -> str:
    """The text without what cannot be encoded (a file name that is no UTF-8, quoted in a message)."""
    return text.encode("utf-8", "backslashreplace").decode()
