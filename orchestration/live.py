"""A job's progress on the terminal: the stages' own lines, each step's start and end, and each asset as it is made."""

import logging
import os
import time
from typing import Any

import dagster as dg

_SHOWN = {
    "STEP_START": "start ",
    "STEP_FAILURE": "FAILED",
    "ASSET_OBSERVATION": "      ",
    "ASSET_MATERIALIZATION": "done  ",
    "ASSET_CHECK_EVALUATION": "check ",
}
BEGAN = "_OPENLM_BEGAN"
"""Environment variable: id of the process that runs the job, and its monotonic clock when it began."""
_process, _started = os.getpid(), time.monotonic()
if BEGAN in os.environ:
    _process, _started = int((_of := os.environ[BEGAN].split())[0]), float(_of[1])


def run_process() -> int:
    """Id of the process that runs the job, as its steps know it."""
    return _process


def began() -> None:
    """Have lines of steps in processes of their own count the time of this process, and name their runs."""
    os.environ[BEGAN] = f"{_process} {_started}"


class LiveHandler(logging.Handler):
    """Prints one short line for each event that a person waits for."""

    def __init__(self, level: int = logging.NOTSET) -> None:
        from rich.console import Console  # slow to import, and only runs need it

        super().__init__(level)
        self._console = Console(highlight=False, soft_wrap=True)

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "dagster_meta", {})
        event = fields.get("dagster_event")
        if event is None:
            if record.levelno < logging.INFO:
                return
            word, text = "      ", fields.get("orig_message") or record.getMessage()
        elif event.event_type_value not in _SHOWN or not (text := _describe(event, fields)):
            return
        else:
            word = _SHOWN[event.event_type_value]
        self._console.print(f"{time.monotonic() - _started:6.1f} s  {word} {text}", markup=False)


def _describe(event: dg.DagsterEvent, fields: dict) -> str | None:
    if event.event_type_value == "ASSET_OBSERVATION":
        seen = event.event_specific_data.asset_observation
        beside_others = os.getpid() != _process and len(seen.asset_key.path) > 1
        return f"{seen.asset_key.path[1]}: {seen.description}" if beside_others else seen.description
    if event.event_type_value == "ASSET_MATERIALIZATION":
        made = event.event_specific_data.materialization
        reused = made.metadata.get("reused")
        partition = f" [{made.partition}]" if made.partition else ""
        return made.asset_key.to_user_string() + partition + (", nothing to do" if reused and reused.value else "")
    if event.event_type_value == "ASSET_CHECK_EVALUATION":
        check = event.event_specific_data
        return f"{check.asset_key.to_user_string()} {check.check_name}: {'passed' if check.passed else 'FAILED'}"
    if event.event_type_value == "STEP_FAILURE":
        error = event.event_specific_data
        if is_interrupt(error.error):
            return f"{fields.get('step_key')}: stopped"
        failure = error.user_failure_data
        return f"{fields.get('step_key')}: {failure.description if failure else error.error.message.strip()}"
    return str(fields.get("step_key"))


def is_interrupt(error: Any) -> bool:
    """Whether what Dagster recorded of a step's error is a signal that asked to stop."""
    return error is not None and error.cls_name == dg.DagsterExecutionInterruptedError.__name__


@dg.logger
def live_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """Prints a run's progress for a person at a terminal."""
    log = logging.Logger("live", logging.DEBUG)
    log.addHandler(LiveHandler())
    return log
