"""What can go wrong, each with what to do about it.

Every error has a `code`, fixed and meant for programs, a `message` that says what happened and to which model or
session, and a `hint` that says what to do now. They cross the wire as JSON in an ERROR frame, and come out on the
other side as the same class.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar


class RootstockError(Exception):
    """Base of all errors of rootstockd and its client.

    Args:
        message: what happened, and to which model or session.
        hint: what to do now; empty where there is nothing to say.
    """

    code: ClassVar[str] = "error"
    by_code: ClassVar[dict[str, type[RootstockError]]] = {}

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        RootstockError.by_code[cls.code] = cls

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def to_json(self) -> bytes:
        """The body of an ERROR frame."""
        return json.dumps({"code": self.code, "message": self.message, "hint": self.hint}).encode()

    @staticmethod
    def from_json(body: bytes) -> RootstockError:
        """The error that an ERROR frame carries; a code this version does not know becomes a plain RootstockError."""
        try:
            fields = json.loads(body)
            code, message, hint = str(fields["code"]), str(fields["message"]), str(fields.get("hint") or "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"an ERROR frame that is not JSON with a code and a message: {body[:80]!r}.") from error
        return error_from_code(code, message, hint)


def error_from_code(code: str, message: str, hint: str = "") -> RootstockError:
    """The error class that stands for `code`, filled in."""
    return RootstockError.by_code.get(code, RootstockError)(message, hint)


class DaemonNotFoundError(RootstockError, ConnectionError):
    """No daemon answers where one was looked for."""

    code = "daemon-not-found"


class ConnectionLostError(RootstockError, ConnectionError):
    """The daemon closed the connection in the middle of an exchange."""

    code = "connection-lost"


class ProtocolError(RootstockError):
    """A byte stream that is not the protocol. Nothing after it can be trusted: the connection is closed."""

    code = "protocol"


class InvalidInitError(RootstockError, ValueError):
    """An INIT that can't be understood, or that asks for something that does not exist."""

    code = "invalid-init"


class UnknownModelError(RootstockError, KeyError):
    """A model name that is not in the daemon's catalogue."""

    code = "unknown-model"
    __str__ = RootstockError.__str__


class UnknownElementError(RootstockError, ValueError):
    """A structure with an element that the model was not made for."""

    code = "unknown-element"


class UnsupportedError(RootstockError, NotImplementedError):
    """A property or an option that the model does not have."""

    code = "unsupported"


class InvalidStructureError(RootstockError, ValueError):
    """Positions, cell or atom count that no engine could evaluate."""

    code = "invalid-structure"


class ModelLoadError(RootstockError):
    """A model that could not be loaded."""

    code = "model-load"


class ModelChangedError(RootstockError):
    """Under the name of a calculator's model is another potential than before, or than it asked for.

    Nothing of what that computed is given out.
    """

    code = "model-changed"


def model_changed(model: str, before: str, now: str | None, anew: str) -> ModelChangedError:
    """What is said where a model has another fingerprint than before.

    Args:
        model: its name.
        before: the fingerprint that it had.
        now: the one that it has; None if what has answered names none.
        anew: what to do to go on with the new one.
    """
    if now is None:
        return ModelChangedError(
            f"model {model!r} may be another than before: its fingerprint was {before}, and now none is named.",
            f"To go on with it all the same, {anew}. To know, have whoever runs the daemon upgrade it; then repeat the "
            "step.",
        )
    return ModelChangedError(
        f"model {model!r} is another than before: its fingerprint was {before} and is {now} now.",
        f"To go on with the new one, {anew}. To go on with the old one, have whoever runs the daemon restore its "
        f"catalogue entry (`rootstockd models show {model}`) and `rootstockd reload`, or restore the packages of its "
        "environment; then repeat the step.",
    )


def not_the_model(model: str, asked: str, now: str | None) -> ModelChangedError:
    """What is said where a model has not had the fingerprint that was asked for.

    Args:
        model: its name.
        asked: the fingerprint.
        now: the one that it has; None if what has answered names none.
    """
    if now is None:
        return ModelChangedError(
            f"model {model!r} may be another than was asked for: its fingerprint was to be {asked}, and none is named.",
            "To take it all the same, leave out `fingerprint`. To know, have whoever runs the daemon upgrade it.",
        )
    return ModelChangedError(
        f"model {model!r} is another than was asked for: its fingerprint was to be {asked} and is {now}.",
        f"To take it as it is, leave out `fingerprint`. For the other one, ask for the model, dtype and dispersion "
        f"that the fingerprint is of; if these are they, have whoever runs the daemon restore the catalogue entry "
        f"(`rootstockd models show {model}`) or the packages of its environment.",
    )


class NotAModelError(ModelLoadError):
    """A file of weights that is no model of its family, or not one that its engine can read."""

    code = "not-a-model"


class DeviceFailedError(ModelLoadError):
    """A device that can't be used, although its driver has it."""

    code = "device"


class EvaluationError(RootstockError):
    """An evaluation that the engine could not finish."""

    code = "evaluation"


class DrainingError(RootstockError):
    """The daemon is on its way down and takes no new work."""

    code = "draining"


class RestartNeededError(RootstockError):
    """The daemon's code was upgraded on the disk: a model that it has yet to load is the next daemon's to load."""

    code = "restart-needed"


class AccessDeniedError(RootstockError, PermissionError):
    """The daemon's configuration does not let this user do that."""

    code = "access-denied"


class LimitError(RootstockError):
    """More than the daemon's configuration allows."""

    code = "limit"


class DaemonFullError(LimitError):
    """The daemon has all the sessions that it takes."""

    code = "full"


class UserLimitError(LimitError):
    """One user has all the sessions, atoms or models that one may have, or may have no evaluations; others may."""

    code = "user-limit"


class DriverNotFoundError(RootstockError, ConnectionError):
    """No driver listens where one was to be attached."""

    code = "driver-not-found"


class InStepError(RootstockError, RuntimeError):
    """A session that was used or closed inside one of its own steps, by a signal's handler or a finalizer."""

    code = "in-step"


def used_in_step(what: str = "an evaluation was asked for") -> InStepError:
    """What is said to who wants something inside a step, in the same thread, which can't go on meanwhile."""
    return InStepError(
        f"{what} in the middle of a step of the same calculator or session, by a signal's handler or a finalizer that "
        "ran inside it.",
        "Have the handler note that it was called, and evaluate after the step; or let it evaluate with a calculator "
        "made by copy.copy(calculator), which has a session of its own.",
    )


class NotAnsweringError(RootstockError, TimeoutError):
    """A daemon is there and does not answer."""

    code = "not-answering"
