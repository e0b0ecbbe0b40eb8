"""A function that may stop in the middle and go on later, however deep in other code it is.

Python's own coroutines stop only in code that was written for it, which the forward of a decoder block was not. So
each function gets a thread, which runs while its owner waits, and waits while its owner runs: there is never more than
one at work, and nothing needs a lock.

On a CPU the owner computes for all of them what they call of PyTorch: each thread that computes itself has workers of
its own for as long as it lives, one a processor, and memory of its own, which others cannot use when it is freed.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class _Ended(BaseException):
    """Raised where a coroutine waits that is no longer wanted. No error, so that no `except Exception` takes it."""


class Coroutine:
    """A function in a thread of its own, which finds PyTorch's settings as they are where it is made.

    Args:
        function: without arguments.
        device: on which it computes.

    Attributes:
        result: what the function returned; None before.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self.result: Any = None
        self._function, self._enter_settings = function, _settings_of_this_thread(device)
        self._mine, self._owners = threading.Semaphore(0), threading.Semaphore(0)  # whose turn it is
        self._request: Callable[[], None] | None = None  # what the owner is to compute
        self._device = device
        self._error: BaseException | None = None
        self._is_unwanted = self._is_done = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
        self._thread.start()

    def resume(self) -> bool:
        """Lets the function go on: True when it pauses, False when it has returned. Raises its error."""
        if not self._is_done:
            self._owners_settings = _settings(self._device)
            self._mine.release()
            self._owners.acquire()
            while self._request is not None:
                self._request()
                self._request = None
                self._mine.release()
                self._owners.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # which holds this frame, and all that the function had
        return not self._is_done

    def pause(self) -> None:
        """Called by the function: goes on with the next `resume`."""
        if threading.current_thread() is not self._thread:
            raise RuntimeError("a function of PyTorch calls modules by itself, which cannot wait there")
        self._owners.release()
        self._mine.acquire()
        if self._is_unwanted:
            raise _Ended

    def end(self) -> None:
        """Ends the function where it waits; at its next pause where it still runs, because its owner was
        interrupted."""
        self._is_unwanted = True
        self._mine.release()
        self._thread.join()

    def by_owner(self, function: Callable[[], Any]) -> Any:
        """Called by the function: has another one run by the owner, and gives its result or error."""
        if self._is_unwanted or _settings(self._device) != self._owners_settings:
            return function()
        result: list[Any] = []
        errors: list[BaseException] = []

        def request() -> None:
            try:
                result.append(function())
            except Exception as error:
                errors.append(error)

        self._request = request
        self.pause()
        if errors:
            raise errors.pop()
        return result.pop()

    def _run(self) -> None:
        self._mine.acquire()
        try:
            if not self._is_unwanted:
                with ExitStack() as stack:
                    self._enter_settings(stack)
                    if self._device.type == "cpu":
                        stack.enter_context(_ByOwner(self))
                    self.result = self._function()
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            del self._function  # with all that it holds
            self._is_done = True
            self._owners.release()


class _ByOwner(TorchFunctionMode):
    """Within it the owner of a coroutine computes what that calls of PyTorch."""

    def __init__(self, coroutine: Coroutine) -> None:
        super().__init__()
        self._coroutine = coroutine

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Attributes, such as a shape, cost nothing; what takes no tensor may change the settings of this thread.
        if getattr(func, "__name__", "") == "__get__" or not _has_tensor([*args, *kwargs.values()]):
            return func(*args, **kwargs)
        return self._coroutine.by_owner(lambda: func(*args, **kwargs))


def _has_tensor(values: Sequence[Any]) -> bool:
    return any(
        isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and _has_tensor(value)) for value in values
    )


def _settings(device: torch.device) -> tuple[Any, ...]:
    """Which of them a function may change for itself, as they are in this thread."""
    casts = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    modes = map(id, _get_current_dispatch_mode_stack())
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *casts, *modes


def _settings_of_this_thread(device: torch.device) -> Callable[[ExitStack], None]:
    """Gives what makes another thread compute as this one: by settings that PyTorch keeps for each thread. (Dtypes by
    default, deterministic algorithms and backends' flags are the process's.)"""
    grad, inference, threads = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()
    default, cached = torch.get_default_device(), torch.is_autocast_cache_enabled()
    kinds = {"cpu", device.type}
    casts = {kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds}
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter(stack: ExitStack) -> None:
        torch.set_num_threads(threads)
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, (dtype, enabled) in casts.items():
            stack.enter_context(torch.autocast(kind, dtype, enabled, cached))
        if default != torch.device("cpu"):
            stack.enter_context(default)
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))

    return enter
