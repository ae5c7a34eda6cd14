"""The thread that an inference engine lives in, inside its actor; what it can do beside its steps has another one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from opd_ray.errors import EngineFailed, RunError
from opd_ray.generate.engine import GenerationEngine, Unfinished
from opd_ray.messages import GenerationRequest, TransferGroup, WeightManifest
from opd_ray.rooms import spans
from opd_ray.rooms.threads import start

Handle = Callable[[GenerationEngine, Future], None]
"""Runs on the engine, and settles the future now or later."""


class EngineThread:
    """Owns an engine: builds it, steps it while it has requests, runs commands in between.

    Every call returns a future. When the engine fails, all of them get EngineFailed: one that failed is not stepped
    again. New weights come in beside the steps, and are installed between two. A broadcast that breaks off costs the
    engine nothing; after an installation that failed half way, it is not stepped until one succeeds.
    """

    def __init__(self, make_engine: Callable[[], GenerationEngine]) -> None:
        self._inbox: deque[tuple[Handle, Future]] = deque()
        """What came in and was not looked at yet."""
        self._running: dict[str, Future] = {}
        self._drained: list[Future] = []
        """Whoever waits until nothing is unfinished."""
        self._on_hold = False
        """Do requests wait for a weight update?"""
        self._held: deque[tuple[GenerationRequest, Future]] = deque()
        self._failure: EngineFailed | None = None
        self._half_installed = False
        self._wake = threading.Condition()
        self._receiving = threading.Lock()
        self._started: Future = Future()
        threading.Thread(target=self._run, args=(make_engine,), name="engine", daemon=True).start()
        self._started.result()

    def submit(self, request: GenerationRequest) -> Future:
        """A future of the request's Finished."""
        return self._enqueue(partial(self._admit, request))

    def command(self, run: Callable[[GenerationEngine], Any]) -> Future:
        """Runs ``run(engine)`` between two steps."""

        def handle(engine: GenerationEngine, done: Future) -> None:
            try:
                done.set_result(run(engine))
            except Exception as error:
                done.set_exception(error)

        return self._enqueue(handle)

    def drain(self) -> Future:
        """Done when nothing is unfinished; requests that come from now on wait for the next weight update."""
        return self._enqueue(self._hold)

    def connect(self, group: TransferGroup) -> Future:
        """Joins the group that weights are broadcast in."""
        if not self._engine.beside_steps:
            return self.command(lambda engine: engine.connect(group))
        return self._beside(lambda: self._engine.connect(group))

    def update(self, manifest: WeightManifest, unfinished: Unfinished) -> Future:
        """Takes a broadcast in, installs it, and then lets in what waited for it."""

        def whole() -> None:
            self._engine.receive(manifest)
            self._enqueue(partial(self._install, unfinished)).result()

        return self._beside(whole)

    def abandon(self) -> Future:
        """Drops every unfinished request; their futures get a RunError, that of ``abandon`` their number."""
        return self._enqueue(self._drop)

    def _beside(self, call: Callable[[], Any]) -> Future:
        """Runs it in another thread, one at a time: a broadcast that its caller gave up may go on for a while."""

        def alone() -> Any:
            with self._receiving:
                return call()

        return start(alone)

    def _install(self, unfinished: Unfinished, engine: GenerationEngine, done: Future) -> None:
        self._half_installed = True
        try:
            with spans.span("broadcast"):
                engine.install(unfinished)
        except Exception as error:
            done.set_exception(error)
            return
        self._half_installed = self._on_hold = False
        held, self._held = self._held, deque()
        for request, waiting in held:
            self._admit(request, engine, waiting)
        done.set_result(None)

    def _enqueue(self, handle: Handle) -> Future:
        done: Future = Future()
        done.set_running_or_notify_cancel()  # a caller that gives up must not make set_result() fail later
        with self._wake:
            if self._failure is not None:
                done.set_exception(self._failure)
            else:
                self._inbox.append((handle, done))
                self._wake.notify()
        return done

    def _hold(self, _: GenerationEngine, done: Future) -> None:
        self._on_hold = True
        self._drained.append(done)

    def _drop(self, engine: GenerationEngine, done: Future) -> None:
        engine.abort(list(self._running))
        dropped = [*self._running.values(), *(waiting for _, waiting in self._held)]
        self._running, self._held = {}, deque()
        for waiting in dropped:
            waiting.set_exception(RunError("the response was abandoned: its run ended or went back to a checkpoint"))
        done.set_result(len(dropped))

    def _admit(self, request: GenerationRequest, engine: GenerationEngine, done: Future) -> None:
        if self._on_hold:
            self._held.append((request, done))
            return
        try:
            engine.submit(request)
        except Exception as error:  # a request that the engine refuses fails alone
            done.set_exception(error)
        else:
            self._running[request.request_id] = done

    def _run(self, make_engine: Callable[[], GenerationEngine]) -> None:
        try:
            engine = self._engine = make_engine()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while True:
                self._work(engine)
        except BaseException as error:
            failure = EngineFailed(f"the engine failed: {type(error).__name__}: {error}")
            with self._wake:
                self._failure = failure
                waiting = [*self._running.values(), *(done for _, done in (*self._held, *self._inbox))]
                waiting += self._drained
            for done in waiting:
                if not done.done():
                    done.set_exception(failure)

    def _work(self, engine: GenerationEngine) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._drained or (self._running and not self._half_installed))
        while self._inbox:
            handle, done = self._inbox[0]
            handle(engine, done)
            self._inbox.popleft()  # only now: what fails is told of the failure like what waits behind it
        if self._drained and (not self._running or self._half_installed):
            drained, self._drained = self._drained, []
            for done in drained:
                done.set_result(None)
        if self._running and not self._half_installed:
            with spans.span("generate"):
                step = engine.step()
            for finished in step:
                self._running.pop(finished.request_id).set_result(finished)
