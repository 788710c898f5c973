"""How a command ends: errors as one line and an exit code.

Exit codes: 0 success; 1 a bug of ours (with a traceback); 2 to 9 as in `common.errors`; 130 Ctrl-C;
143 SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Final, NoReturn

import typer
from rich.console import Console

from common.errors import ClusterError, ConfigError, StorageError, TalipotError
from deploy.screen import degrade_unprintable, make_console, say

_INTERRUPTED: Final = 130
_TERMINATED: Final = 143


def run_to_end(app: typer.Typer, arguments: Sequence[str] | None, errors: Console) -> NoReturn:
    """Run a command line, and end the process.

    Args:
        app: the commands.
        arguments: of the command line; None takes the process's own.
        errors: where errors go.
    """
    degrade_unprintable()
    threading.excepthook = _unraised
    terminated = threading.Event()

    def terminate(*_: object) -> None:
        terminated.set()
        sys.exit(_TERMINATED)

    signal.signal(signal.SIGTERM, terminate)
    try:
        _run(app, arguments, errors)
    except BaseException:
        # Inside a call of Ray's our exit comes back as another one, with a code of Ray's.
        if terminated.is_set():
            _fail(errors, "terminated", _TERMINATED)
        raise
    sys.exit(0)


def _unraised(arguments: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but for what is raised again where it is noticed.

    TensorBoard's thread hands a disk that is full to whoever writes next.
    """
    handed_on = type(arguments.thread).__module__.startswith("tensorboard.")
    if not (handed_on and issubclass(arguments.exc_type, OSError)):
        threading.__excepthook__(arguments)


def end_now(error: TalipotError) -> NoReturn:
    """End the process from any of its threads, with an error's line and exit code.

    For what leaves its main thread hanging in a call that never returns.
    """
    _say(make_console(stderr=True), str(error))
    sys.stdout.flush()
    os._exit(error.exit_code)


def _run(app: typer.Typer, arguments: Sequence[str] | None, errors: Console) -> None:
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except TalipotError as error:
        _fail(errors, str(error), error.exit_code)
    except (TimeoutError, ConnectionError) as error:  # Ray's are OSErrors too
        _fail(errors, f"no answer: {str(error) or type(error).__name__}", ClusterError.exit_code)
    except OSError as error:
        # A full disk, or a folder that may not be written, wherever that is noticed first.
        _fail(errors, _what_failed(error), StorageError.exit_code)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            _fail(errors, message, ConfigError.exit_code)
        raise
    if code == _INTERRUPTED:  # what typer makes of Ctrl-C
        _fail(errors, "interrupted", _INTERRUPTED)
    if isinstance(code, int) and code:
        sys.exit(code)


def _what_failed(error: OSError) -> str:
    """Name the file and the reason, as far as the error knows them."""
    reason = error.strerror or str(error) or type(error).__name__
    names = [
        os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)
    ]
    return f"{' -> '.join(names) or 'file system'}: {reason}"


def _say(errors: Console, message: str) -> None:
    lines = (line.strip() for line in message.splitlines())
    say(errors, ("error", "bold red"), " " + " ".join(line for line in lines if line))


def _fail(errors: Console, message: str, code: int) -> NoReturn:
    _say(errors, message)
    attach = sys.modules.get("deploy.workers.attach")
    if attach is not None and attach.asks():
        # Python would wait at its end for a call of Ray's that may never return.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
