"""Runs the user's agent once, under its time limit: as a task, in a thread, or as a process; tells how it ended.

Agents' code never runs on the worker's own event loop: coroutines share one loop in a thread of its own, a sync agent gets
a thread to itself. A thread cannot be killed: one that outlives its limit is abandoned and counted.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from raygent import prompts
from raygent.actors import own_traces
from raygent.actors.otlp import MOST_SPANS
from raygent.actors.persistent_agent import PersistentAgents
from raygent.actors.subprocess_agent import (
    KEPT_BYTES,
    CommandEnd,
    Supervised,
    last_line,
    run_command,
    stdout_span,
)
from raygent.callables import (
    AGENT_OFFERS,
    TEXT,
    ModelEndpoint,
    Verdict,
    arguments,
    awaited,
    is_async,
    load_callable,
)
from raygent.config import Config
from raygent.emit import reward_fields, sink
from raygent.prompts import on_trial
from raygent.records import Reward, Span, to_json

logger = logging.getLogger("raygent")
CANCEL_S = 5.0  # for a cancelled coroutine to end
KILL_S = 10.0  # for a killed process tree to be gone


class AgentExit(Exception):
    """The agent called sys.exit()."""


@dataclass(frozen=True)
class Ended:
    """How the agent ended: `value` where it returned, else `error`, a text whose last line says what it was."""

    how: Literal["returned", "raised", "timeout", "over_memory", "over_processes"]
    value: Any = None
    error: str = ""
    exception: BaseException | None = None  # of an agent in this process


class AttemptRecorder:
    """The rewards and spans of one attempt, from whatever thread; a closed one takes no more."""

    def __init__(self, rollout_id: str, attempt: int, source: str) -> None:
        self.of = (rollout_id, attempt, source)
        self.rewards: list[Reward] = []
        self.spans: list[Span] = []
        self._lock = threading.Lock()
        self._closed = False

    def __call__(self, table: str, fields: dict[str, Any]) -> None:
        with self._lock:
            if self._closed:
                return
            if table == "rewards":
                fields = fields | {"components": to_json(fields["components"])}
                self.rewards.append(Reward(*self.of, len(self.rewards), **fields))
            elif fields["kind"] != "otlp" or len(self.spans) < MOST_SPANS:
                fields = fields | {"attributes": to_json(fields["attributes"])}
                self.spans.append(Span(*self.of, len(self.spans), **fields))

    def note(self, name: str, kind: str = "note", **attributes: Any) -> None:
        now = time.time()
        self("spans", {"kind": kind, "name": name, "attributes": attributes, "started": now, "finished": now})

    def verdict(self, verdict: Verdict) -> None:
        """The rollout's reward, and those of single agents and calls."""
        self("rewards", reward_fields(verdict.value, components=verdict.components))
        for agent, value in verdict.agents.items():
            self("rewards", reward_fields(value, agent=agent))
        for call, value in verdict.calls.items():
            self("rewards", reward_fields(value, call=call))

    def order_rewards(self) -> None:
        """By the time they were given at, whichever way they came."""
        ordered = sorted(self.rewards, key=lambda reward: reward.time)
        self.rewards = [replace(reward, source_sequence=place) for place, reward in enumerate(ordered)]

    def emitted(self) -> float | None:
        """The rollout's reward as the agent emitted it: the last "reward" for the whole, else the agents' mean."""
        rewards = [reward for reward in self.rewards if reward.name == "reward" and reward.call_sequence < 0]
        whole = [reward.value for reward in rewards if not reward.agent]
        each = {reward.agent: reward.value for reward in rewards if reward.agent}
        return whole[-1] if whole else sum(each.values()) / len(each) if each else None

    def close(self) -> None:
        with self._lock:
            self._closed = True


def run_for_ever(loop: asyncio.AbstractEventLoop) -> None:
    """Until it is stopped. asyncio ends a loop where a task of an agent's calls sys.exit(), and others' run on it too."""
    while True:
        try:
            return loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as ended:
            logger.warning("a task of an agent's ended with %r; the agents' loop goes on", ended)


class AgentRunner:
    """`config.agent`, ready to be run many times at once. Raises ConfigError where it cannot be imported or called."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.agent: Callable[..., Any] | None = None
        self.abandoned: list[threading.Thread] = []
        self.stuck = False  # a coroutine blocks the agents' loop
        if config.agent.run is not None and config.agent.in_ == "process":
            prompts.expected = bool(config.prompts)
            self.agent = load_callable(config.agent.run, config.folder, "agent.run")
            arguments(self.agent, AGENT_OFFERS, (None, None), "agent.run")
        self.kept = PersistentAgents(config) if config.agent.persistent else None
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=run_for_ever, args=(self.loop,), name="agents", daemon=True).start()

    def close(self) -> None:
        """End the processes that are kept for more rollouts."""
        if self.kept:
            self.kept.close()

    def worn(self, most: int) -> bool:
        """Whether too much of what cannot be ended is left in this process."""
        self.abandoned = [thread for thread in self.abandoned if thread.is_alive()]
        return self.stuck or len(self.abandoned) >= most

    async def on_agents_loop(self, coroutine: Coroutine[Any, Any, Any], limit_s: float) -> Any:
        """Raises TimeoutError over `limit_s`, which is past the coroutine's own: something blocks the loop."""
        running = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))
        try:
            return await asyncio.wait_for(running, limit_s + 2 * CANCEL_S)
        except TimeoutError:
            self.stuck = True
            raise

    async def run(self, task_input: Any, endpoint: ModelEndpoint, recorder: AttemptRecorder) -> Ended:
        """Run the agent to its end or its time limit. Cancelled, it stops the agent."""
        own_traces.follow()
        if self.agent is None:
            ended = await self._in_process(task_input, endpoint, recorder)
        else:
            positional, named = arguments(self.agent, AGENT_OFFERS, (task_input, endpoint), "agent.run")
            way = self._as_task if is_async(self.agent) else self._in_thread
            ended = await way(partial(self.agent, *positional, **named), endpoint, recorder)
        if ended.how == "raised":
            recorder.note("agent", kind="exception", error=ended.error)
        return ended

    async def ask(self, text: str, endpoint: ModelEndpoint, recorder: AttemptRecorder) -> Ended:
        """In the place of the agent: the model's reply to `text`."""
        return await self._as_task(partial(reply_to, text, endpoint), endpoint, recorder)

    async def _as_task(self, agent: Callable[[], Any], endpoint: ModelEndpoint, recorder: AttemptRecorder) -> Ended:
        async def agents_own() -> Any:
            sink.set(recorder)
            on_trial.set(endpoint.prompts)
            try:
                return await agent()
            except SystemExit as error:  # it would end the loop
                raise AgentExit(f"the agent called sys.exit({error.code!r})") from error

        async def limited() -> Ended:
            task = asyncio.ensure_future(agents_own())
            try:
                done, _ = await asyncio.wait({task}, timeout=self.config.agent.timeout_s)
            finally:
                if not task.done():
                    task.cancel()
            if done:
                return ended_of(task)
            await asyncio.wait({task}, timeout=CANCEL_S)
            return self._timeout()

        try:
            return await self.on_agents_loop(limited(), self.config.agent.timeout_s)
        except TimeoutError:
            return self._timeout(
                "; an async agent blocked the event loop that all of them share: await, or make it sync"
            )

    async def _in_thread(self, agent: Callable[[], Any], endpoint: ModelEndpoint, recorder: AttemptRecorder) -> Ended:
        def call() -> Any:
            sink.set(recorder)
            on_trial.set(endpoint.prompts)
            value = agent()
            return asyncio.run(awaited(value)) if inspect.isawaitable(value) else value

        thread, future = in_thread(call)
        waiting = asyncio.wrap_future(future)
        try:
            done, _ = await asyncio.wait({waiting}, timeout=self.config.agent.timeout_s)
        except asyncio.CancelledError:
            self.abandoned.append(thread)
            raise
        if done:
            return ended_of(waiting)
        self.abandoned.append(thread)
        return self._timeout()

    async def _in_process(self, task_input: Any, endpoint: ModelEndpoint, recorder: AttemptRecorder) -> Ended:
        running: list[Supervised] = []
        over = threading.Event()

        def started(process: Supervised) -> None:
            running.append(process)
            if over.is_set():
                process.stop()

        def run() -> CommandEnd:
            if self.kept is None:
                return run_command(self.config, task_input, endpoint, started)
            agent = self.kept.take()
            started(agent)
            return agent.run(task_input, endpoint)

        began = time.time()
        thread, future = in_thread(run)
        waiting = asyncio.wrap_future(future)
        try:
            in_time, _ = await asyncio.wait({waiting}, timeout=self.config.agent.timeout_s)
        finally:
            over.set()
            for process in running:
                process.let_go()
        await asyncio.wait({waiting}, timeout=KILL_S)
        if not waiting.done():  # a process that not even SIGKILL ends
            self.abandoned.append(thread)
            return self._timeout()
        if waiting.exception():
            return ended_of(waiting)
        end = waiting.result()
        recorder("spans", stdout_span(end, began))
        for event in end.events:
            keep_event(event, recorder)
        return read_end(end, self.config) if in_time else self._timeout()

    def _timeout(self, why: str = "") -> Ended:
        return Ended(
            "timeout", error=f"the agent took more than agent.timeout_s = {self.config.agent.timeout_s:g} s{why}"
        )


async def reply_to(text: str, endpoint: ModelEndpoint) -> str:
    """What the model says to one message, by Chat Completions."""
    import openai  # takes a second, and most workers never ask

    async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        reply = await client.chat.completions.create(model=endpoint.model, messages=[{"role": "user", "content": text}])
    return reply.choices[0].message.content or ""


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, Future[Any]]:
    """`call` in a daemon thread with a context of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(contextvars.Context().run(call))
        except SystemExit as error:
            future.set_exception(AgentExit(f"the agent called sys.exit({error.code!r})"))
        except BaseException as error:  # noqa: BLE001 - whatever the user's code raises is what the attempt ended in
            future.set_exception(error)

    thread = threading.Thread(target=run, name="agent", daemon=True)
    thread.start()
    return thread, future


def ended_of(future: Any) -> Ended:
    """Of a finished task or future."""
    if future.cancelled():
        return Ended("raised", error="CancelledError: the agent cancelled itself")
    error = future.exception()
    if error is None:
        return Ended("returned", future.result())
    return Ended("raised", error="".join(traceback.format_exception(error))[-TEXT:], exception=error)


def read_end(end: CommandEnd, config: Config) -> Ended:
    """What an ended process means."""
    if end.answer is not None:
        if "output" in end.answer:
            return Ended("returned", end.answer["output"])
        return Ended("raised", error=str(end.answer["error"])[-TEXT:])
    limit, _, found = end.over.partition(" ")
    if limit == "over_memory":
        why = f"agent.memory_mb: the agent's processes took {found} MiB, over the limit of {config.agent.memory_mb}"
        return Ended("over_memory", error=_behind(end.stderr, f"{why}; all were killed"))
    if limit == "over_processes":
        why = f"agent.processes: the agent had {found} processes, over the limit of {config.agent.processes}"
        return Ended("over_processes", error=_behind(end.stderr, f"{why}; all were killed"))
    if config.agent.persistent:
        why = f"the agent's process ended, with exit code {end.code}, before it answered"
        return Ended("raised", error=_behind(end.stderr, why))
    if end.code != 0:
        return Ended("raised", error=_behind(end.stderr, f"the agent's process ended with exit code {end.code}"))
    if config.agent.command is not None:
        if len(end.stdout.encode()) >= KEPT_BYTES and "\n" not in end.stdout.strip():
            why = f"the last line of the agent's output, what it gives back, is over {KEPT_BYTES >> 20} MiB; write less"
            return Ended("raised", error=why)
        return Ended("returned", last_line(end.stdout))
    results = [event for event in end.events if event["table"] == "result"]
    if not results:
        return Ended("raised", error="the agent's process ended before the agent returned (it called os._exit?)")
    return Ended("returned", results[-1].get("value"))


def _behind(stderr: str, why: str) -> str:
    """What the process wrote on stderr, and as the last line, which summaries show, `why`, with the last of what it wrote."""
    written = stderr[-TEXT:].rstrip()
    return f"{written}\n{why}; it last wrote: {written.splitlines()[-1][:300]}" if written else why


def keep_event(event: dict[str, Any], recorder: AttemptRecorder) -> None:
    """A reward or span that a process wrote to its events file; what is malformed is noted instead."""
    table, fields = event["table"], {key: value for key, value in event.items() if key != "table"}
    if table == "result":
        return
    try:
        if table == "rewards":
            told = {name: fields[name] for name in ("name", "agent", "components", "call") if name in fields}
            if fields.get("call_sequence", -1) != -1:  # as emit_reward() writes it
                told["call"] = fields["call_sequence"]
            checked = reward_fields(fields["value"], **told)
            checked["time"] = float(fields.get("time", checked["time"]))
        else:
            checked = {"attributes": fields["attributes"]} | {key: str(fields[key]) for key in ("kind", "name")}
            checked |= {key: float(fields[key]) for key in ("started", "finished")}
        if not all(math.isfinite(checked[key]) for key in ("time", "started", "finished") if key in checked):
            raise ValueError("a time is not finite")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        recorder.note("malformed event", kind="exception", error=str(error))
        return
    recorder(table, checked)
