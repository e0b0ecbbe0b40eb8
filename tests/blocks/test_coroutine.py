"""Functions that stop in the middle, in threads of their own, of which none is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from optimum_ksparse.blocks.coroutine import Coroutine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


def pausing(steps: list[Any], name: str, number: int = 2) -> Coroutine:
    """Notes each step, and pauses after it."""

    def function() -> str:
        try:
            for step in range(number):
                steps.append((name, step))
                made.pause()
        except Exception:
            steps.append("caught")
        finally:
            steps.append((name, "end"))
        return name

    made = Coroutine(function, CPU)
    return made


def test_functions_take_turns_and_return() -> None:
    steps: list[Any] = []
    a, b = pausing(steps, "a"), pausing(steps, "b", 1)
    assert steps == []
    assert [c.resume() for c in (a, b, a, b, a)] == [True, True, True, False, False]
    assert steps == [("a", 0), ("b", 0), ("a", 1), ("b", "end"), ("a", "end")]
    assert (a.result, b.result) == ("a", "b")
    assert not a.resume()
    a.end()
    b.end()


@pytest.mark.parametrize("resumed", [0, 1, 3])
def test_one_that_is_ended_cleans_up_and_meets_no_error(resumed: int) -> None:
    steps: list[Any] = []
    coroutine = pausing(steps, "a")
    for _ in range(resumed):
        coroutine.resume()
    coroutine.end()
    coroutine.end()
    assert "caught" not in steps
    assert steps[-1:] == ([("a", "end")] if resumed else [])


@pytest.mark.parametrize("error", [ValueError("on purpose"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
def test_its_error_is_raised_by_its_owner_once(error: BaseException) -> None:
    def function() -> None:
        coroutine.pause()
        raise error

    coroutine = Coroutine(function, CPU)
    assert coroutine.resume()
    with pytest.raises(type(error)) as raised:
        coroutine.resume()
    assert raised.value is error
    assert "function" in [entry.name for entry in raised.traceback]
    assert not coroutine.resume()
    coroutine.end()


def test_an_owner_that_is_interrupted_while_it_runs_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started, goes_on, steps = threading.Event(), threading.Event(), []

    def function() -> None:
        started.set()
        goes_on.wait()
        steps.append("works")
        coroutine.pause()
        steps.append("goes on")

    coroutine = Coroutine(function, CPU)

    class Interrupted:
        def acquire(self) -> None:
            started.wait()
            raise KeyboardInterrupt

        def release(self) -> None:
            pass

    monkeypatch.setattr(coroutine, "_owners", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        coroutine.resume()
    timer = threading.Timer(0.05, goes_on.set)
    timer.start()
    coroutine.end()
    timer.join()
    assert steps == ["works"]


def settings() -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "cache": torch.is_autocast_cache_enabled(),
        "threads": torch.get_num_threads(),
        "device": torch.empty(0).device,
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def run(function: Any) -> Any:
    coroutine = Coroutine(function, CPU)
    coroutine.resume()
    coroutine.end()
    return coroutine.result


def test_settings_are_those_of_the_owner() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert run(settings) == settings()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.device("meta"):
            assert run(settings) == settings()
        with torch.inference_mode():
            assert run(settings) == settings()
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        assert run(settings) == settings()
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_settings_of_its_own_stay_its_own() -> None:
    def function() -> bool:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            coroutine.pause()
            return torch.is_grad_enabled()

    coroutine = Coroutine(function, CPU)
    before = settings()
    coroutine.resume()
    assert settings() == before
    with torch.inference_mode():
        coroutine.resume()
    assert coroutine.result is False
    coroutine.end()


def test_its_owner_computes_for_it() -> None:
    """Not where the function has settings of its own."""
    threads: list[threading.Thread] = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            threads.append(threading.current_thread())
            return super().__torch_function__(func, types, args, kwargs)

    x = torch.ones(2).as_subclass(Watched)

    def function() -> torch.Tensor:
        y = torch.stack([x, x])
        with torch.no_grad():
            return y + 1

    assert run(function).sum() == 8
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_an_error_of_the_owner_on_its_behalf_is_its_own() -> None:
    def function() -> str:
        try:
            torch.ones(2, 3) @ torch.ones(2, 3)
        except RuntimeError:
            return "caught"
        return ""

    assert run(function) == "caught"
