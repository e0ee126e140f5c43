"""RolloutWorker: leases rollouts from the store, runs the agent on each, grades and seals the attempts.

It owns nothing that outlives it: killed at any moment, its leases expire, the agents' processes die with it, and the
rollouts are tried again elsewhere. It may be asked for `run` (its whole life) and `stop`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import ray
from ray.exceptions import RayActorError

from raygent.actors.agent_runner import AgentRunner, AttemptRecorder, Ended
from raygent.actors.engine_handle import EngineError
from raygent.actors.gateway import mint_key
from raygent.actors.grading import Grader, GraderError, timed_out
from raygent.actors.outcomes import NO_CALL, UNANSWERED, engine_failed, gave_up, outcome_of
from raygent.actors.working_folder import localised, working_folder
from raygent.callables import TEXT, ModelEndpoint, Verdict, plain, read_verdict
from raygent.config import OPTIMISER, Config
from raygent.records import INFRASTRUCTURE, OWN_SAMPLING, SCHEMAS, SUCCEEDED, AttemptKey, Lease, Seal, to_batch

logger = logging.getLogger("raygent")
Closed = dict[str, dict[str, Any]]  # engine replica -> what Engine.close_attempts tells of one attempt

POLL_S = (0.02, 0.2)  # between asks for leases while the queue is empty: first, and at most
KEY_MARGIN_S = 60.0  # a key ends with its attempt; this is how long it is good past agent.timeout_s
ENGINE_POLL_S = 3.0
GONE_S = 10.0  # for an attempt to end by itself when its replica has gone
ENGINE_PAUSE_S = 3.0  # after a failure of the engine's, or of an upstream's, times the square of the attempt's number
WORN_THREADS = 4  # abandoned agents' threads a worker carries before it has itself replaced


class EngineLost(Exception):
    """The engine did not answer, broke, or is not the one that the attempt began with."""

    outcome = "engine_lost"


class UpstreamLost(EngineLost):
    """An upstream gave no reply, however often it was asked."""

    outcome = "upstream_lost"


class RolloutWorker:
    """See the module. `root` is the driver's working folder: on another node the same files lie in this one's.

    What it seals bears its `name` and the node it ran on.
    """

    def __init__(self, config: Config, store: Any, engine: Any, secret: str, name: str, root: str = "") -> None:
        self.config = localised(config, root)
        self.store = store
        self.engine = engine
        self.secret = secret
        self.name = f"{name}@{ray.get_runtime_context().get_node_id()[:12]}"
        self.runner = AgentRunner(self.config)
        self.grader = Grader(self.config, self.config.workers.rollouts_each) if self.config.grader.run else None
        self.closer = Closer(engine)
        self.replicas: dict[str, str] = {}  # of the engine that serve, as seen last: source and url
        self.at: Counter[str] = Counter()  # attempts that run, by replica
        self.gone: dict[str, asyncio.Event] = {}  # by replica that attempts began with: set when it serves no more
        self.looks = self.newest_look = 0  # at the engine: begun, and the last of those that told something
        self.running: dict[AttemptKey, asyncio.Task[None]] = {}
        self.sealing: set[AttemptKey] = set()
        # Ended, but not given back before the engine is there again, or its upstream has had some time.
        self.without_engine: set[AttemptKey] = set()
        self.without_upstream: set[AttemptKey] = set()
        self.stopping = False
        self.wake: asyncio.Event | None = None

    async def run(self) -> str:
        """Work until told to stop, until too many agents hang here, or until the store is gone; says which."""
        self.wake = asyncio.Event()
        await self._engine_is_back()
        beside = [asyncio.create_task(self._heartbeats()), asyncio.create_task(self._watch_engine())]
        try:
            return await self._work()
        except RayActorError:
            return "the store is gone"
        finally:
            for task in [*beside, *self.running.values()]:
                task.cancel()
            await asyncio.wait(beside)
            self.runner.close()
            if self.grader:
                self.grader.close()

    async def stop(self) -> None:
        """Lease no more; `run` returns when what is running has ended."""
        self.stopping = True
        if self.wake:
            self.wake.set()

    async def _work(self) -> str:
        assert self.wake
        pause = POLL_S[0]
        while not self.stopping and not self.runner.worn(WORN_THREADS):
            self.wake.clear()
            working = len(self.running) - len(self.without_upstream)
            free = 0 if self.without_engine else max(0, self.config.workers.rollouts_each - working)
            leases: list[Lease] = await self.store.lease.remote(self.name, free) if free else []
            for lease in leases:
                self._begin(lease)
            if leases:
                pause = POLL_S[0]
                continue
            try:  # full: until one ends; idle: until it is time to ask again
                await asyncio.wait_for(self.wake.wait(), pause if free else None)
            except TimeoutError:
                pause = min(pause * 1.5, POLL_S[1])
        if self.running:
            await asyncio.wait(self.running.values())
        return "stopped" if self.stopping else "worn out by agents that hang"

    def _begin(self, lease: Lease) -> None:
        key = (lease.rollout.rollout_id, lease.attempt)
        task = asyncio.create_task(self._attempt(lease))
        self.running[key] = task

        def ended(task: asyncio.Task[None]) -> None:
            del self.running[key]
            self.sealing.discard(key)
            if self.wake:
                self.wake.set()
            if not task.cancelled() and (error := task.exception()):  # the lease expires
                logger.error("%s: attempt %s failed in the worker", self.name, key, exc_info=error)

        task.add_done_callback(ended)

    async def _attempt(self, lease: Lease) -> None:
        rollout, key = lease.rollout, (lease.rollout.rollout_id, lease.attempt)
        source = min(self.replicas, key=lambda replica: self.at[replica])
        endpoint, started = self._endpoint(lease, self.replicas[source]), time.time()
        recorder = AttemptRecorder(*key, self.name)
        self.at[source] += 1
        ended, gone = Ended("raised"), None
        try:
            run = self.runner.ask if rollout.mode == "ask" else self.runner.run
            ended = await self._unless_gone(source, run(rollout.input, endpoint, recorder))
        except EngineLost as lost:
            gone = lost
        finally:  # also when the lease was lost: the key ends, what is in flight is aborted
            self.at[source] -= 1
            closing = asyncio.ensure_future(self.closer.close(key))
        closed: Closed = {}
        try:
            closed = await closing
            for span in (span for of in closed.values() for span in of["spans"]):
                recorder("spans", span)
            for sent in (sent for of in closed.values() for sent in of["rewards"]):
                recorder("rewards", sent)
            recorder.order_rewards()
            if gone:
                raise gone
            check_engine(ended, source, closed, endpoint)
            outcome, error, verdict = await self._judge(lease, ended, closed, recorder)
        except EngineLost as lost:
            outcome, error, verdict = lost.outcome, f"{lost}\n{ended.error}", None
            await self._hold(lease, lost)
        recorder.close()
        failed = self.config.grader.failed_reward
        reward = verdict.value if verdict else None if outcome in INFRASTRUCTURE or rollout.mode == "ask" else failed
        calls = {source: of["calls"] for source, of in closed.items() if of["calls"]}
        seal = Seal(*key, self.name, outcome, reward, calls, error=error[-TEXT:], started=started, finished=time.time())
        batches = {}
        for table, records in (("rewards", recorder.rewards), ("spans", recorder.spans)):
            if records:
                batches[table] = to_batch(SCHEMAS[table], records)
                setattr(seal, table, {self.name: len(records)})
        self.sealing.add(key)
        await self.store.seal.remote(seal, batches)

    async def _unless_gone(self, source: str, running: Coroutine[Any, Any, Ended]) -> Ended:
        """How `running` ended. It is cut short, by EngineLost, where its replica goes and the others answer: no call of it would be
        answered any more, however long its client tries."""
        agent = asyncio.create_task(running)
        gone = asyncio.create_task(self.gone.setdefault(source, asyncio.Event()).wait())
        try:
            await asyncio.wait({agent, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not agent.done():  # most fail with their calls
                await asyncio.wait({agent}, timeout=GONE_S)
            if agent.done():
                return agent.result()
            raise EngineLost(f"engine replica {source} serves no more")
        finally:
            agent.cancel()
            gone.cancel()
            await asyncio.wait({agent, gone})

    def _endpoint(self, lease: Lease, url: str) -> ModelEndpoint:
        rollout = lease.rollout
        expires = time.time() + self.config.agent.timeout_s + KEY_MARGIN_S
        sampling = "eval" if rollout.mode in OWN_SAMPLING else rollout.mode
        key = mint_key(self.secret, rollout.rollout_id, lease.attempt, sampling, expires)
        prompts = {name: prompt["text"] for name, prompt in rollout.prompts.items()}
        endpoint = ModelEndpoint(f"{url}/a/{key}/v1", key, prompts=prompts)
        return endpoint.agent(OPTIMISER) if rollout.mode == "ask" else endpoint

    async def _judge(
        self, lease: Lease, ended: Ended, closed: Closed, recorder: AttemptRecorder
    ) -> tuple[str, str, Verdict | None]:
        """Outcome, error text and reward of an attempt that the engine did not spoil."""
        answered = any(of["calls"] for of in closed.values())
        if ended.how != "returned":
            outcome = outcome_of(ended, closed)
            unasked = not answered and outcome in ("agent_error", "timeout")
            return outcome, f"{ended.error.rstrip()} {UNANSWERED}" if unasked else ended.error, None
        if not answered:
            refused = outcome_of(ended, closed)
            if refused != "agent_error":
                return refused, "the agent returned, though every call of it was refused", None
            return "no_call", NO_CALL, None
        try:
            output = plain(ended.value)
            given = None if self.grader else read_verdict(ended.value, "the agent")
        except (TypeError, ValueError) as error:
            return "agent_error", f"the agent returned what is no JSON value or finite reward: {error}", None
        recorder.note("output", value=output)
        if lease.rollout.mode == "ask":
            return SUCCEEDED, "", None
        if self.grader:
            try:
                verdict = await self._grade(self.grader, lease, output)
            except GraderError as error:
                return "grader_error", str(error), None
            recorder.verdict(verdict)
            return SUCCEEDED, "", verdict
        if given is not None:
            recorder.verdict(given)
            return SUCCEEDED, "", given
        emitted = recorder.emitted()
        if emitted is None:
            return "no_reward", "the agent returned no reward and emitted none, and there is no grader.run", None
        return SUCCEEDED, "", Verdict(emitted)

    async def _grade(self, grader: Grader, lease: Lease, output: Any) -> Verdict:
        call = grader.grade(lease.rollout.input, lease.rollout.private, output)
        if not grader.is_async:
            return (await call).verdict
        try:
            return (await self.runner.on_agents_loop(call, self.config.grader.timeout_s)).verdict
        except TimeoutError:
            raise GraderError(
                f"grader.run = {self.config.grader.run}: {timed_out(self.config)}; it, or an async agent, blocked the "
                "event loop that all of them share: await, or make it sync"
            ) from None

    async def _hold(self, lease: Lease, lost: EngineLost) -> None:
        """Hold the lease for a while: retried at once, the rollout would soon have used up its attempts. Each waits longer than
        the one before, since an engine that broke a call may still look well.

        Without the engine, which all rollouts need, the worker leases no more until it is there again. Without an upstream,
        which others may not need, it goes on, and what it holds takes nobody's place.
        """
        tries = lease.failures + 1
        if tries >= self.config.workers.max_attempts:
            return
        key, by_upstream = (lease.rollout.rollout_id, lease.attempt), isinstance(lost, UpstreamLost)
        held = self.without_upstream if by_upstream else self.without_engine
        held.add(key)
        if self.wake:
            self.wake.set()
        try:
            await asyncio.sleep(ENGINE_PAUSE_S * tries**2)
            if not by_upstream:
                await self._engine_is_back()
        finally:
            held.discard(key)

    async def _engine_is_back(self) -> None:
        while True:
            try:
                if await self._look_at_engine():
                    return
            except EngineLost as lost:
                logger.warning("%s: %s", self.name, lost)
            await asyncio.sleep(1)

    async def _look_at_engine(self) -> bool:
        """Whether a replica serves; where some do, note which. Those that do no more end their attempts. Raises EngineLost."""
        self.looks += 1
        look = self.looks
        try:
            replicas = await asyncio.to_thread(self.engine.status)
        except EngineError as error:
            raise EngineLost(f"the engine does not answer: {error}") from error
        serving = {replica["source"]: replica["url"] for replica in replicas if replica["version"] >= 0}
        if look > self.newest_look:  # else a later one has told already
            self.newest_look = look
            for source in self.gone.keys() - serving.keys():
                self.gone.pop(source).set()
            self.replicas = serving or self.replicas
        return bool(serving)

    async def _watch_engine(self) -> None:
        while True:
            await asyncio.sleep(ENGINE_POLL_S)
            try:
                await self._look_at_engine()
            except EngineLost as lost:  # busy, or gone: the attempts will tell
                logger.warning("%s: %s", self.name, lost)

    async def _heartbeats(self) -> None:
        """Extends the leases; stops the attempts whose lease the store gave to others."""
        while True:
            lost = await self.store.heartbeat.remote(self.name, list(self.running))
            for key in map(tuple, lost):
                if key in self.running and key not in self.sealing:
                    self.running[key].cancel()
            await asyncio.sleep(self.config.workers.lease_s / 4)


def check_engine(ended: Ended, source: str, closed: Closed, endpoint: ModelEndpoint) -> None:
    """Raises EngineLost where the attempt's replica, `source`, or vLLM in it, went away, or the agent failed by the engine's
    failing.

    Whether the agent got over the first does not matter: what it met was not its doing. Of a process no exception is to be
    had: it failed by the engine's failing where it raised, or ran out of time, after a call that the engine did not serve.

    Raises UpstreamLost where an upstream failed the attempt: got over or not, what a judge did not say is in the reward. And
    where the agent ran out of time, or raised since a call took too long for it, while one waited for an upstream.
    """
    if source not in closed:
        raise EngineLost(f"engine replica {source} went away during the attempt")
    if died := closed[source]["died"]:
        raise EngineLost(f"vLLM died in engine replica {source} during the attempt, or right after it: {died}")
    waited = ended.how == "timeout" or (ended.how == "raised" and gave_up(ended.exception, endpoint.anthropic_base_url))
    for name in ("upstream_failed", "upstream_waited") if waited else ("upstream_failed",):
        if why := next((of[name] for of in closed.values() if of[name]), ""):
            raise UpstreamLost(why)
    unserved = any(of["failed"] for of in closed.values())
    did_nothing = not any(of["calls"] for of in closed.values())
    if engine_failed(ended.exception, endpoint.anthropic_base_url) or (
        unserved and (did_nothing or (ended.how in ("raised", "timeout") and ended.exception is None))
    ):
        raise EngineLost("the engine did not serve the agent's call")


class Closer:
    """Ends attempts at the engine, those that end at about the same time in one broadcast."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.waiting: dict[AttemptKey, asyncio.Future[Closed]] = {}
        self.task: asyncio.Task[None] | None = None

    async def close(self, key: AttemptKey) -> Closed:
        """The attempt's key is refused from now on; what each replica knows of it. Raises EngineLost."""
        self.waiting[key] = asyncio.get_running_loop().create_future()
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._drain())
        return await self.waiting[key]

    async def _drain(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting, {}
            failed = EngineLost("the engine's answer is not understood: see the worker's log")
            closed: dict[AttemptKey, Closed] = {}
            try:
                closed = await asyncio.to_thread(self.engine.close_attempts, list(batch))
            except EngineError as error:
                failed = EngineLost(f"the engine does not answer: {error}")
            finally:  # an error of another kind ends this task: nobody may wait for it for ever
                for key, future in batch.items():
                    if future.done():
                        continue
                    if key in closed:
                        future.set_result(closed[key])
                    else:
                        future.set_exception(failed)


def make_worker(config: Config, store: Any, engine: Any, secret: str, name: str) -> Any:
    """A RolloutWorker actor, spread over the nodes; it dies with the driver."""
    return (
        ray.remote(RolloutWorker)
        .options(num_cpus=config.workers.cpus, scheduling_strategy="SPREAD", max_restarts=0)
        .remote(config, store, engine, secret, name, str(working_folder()))
    )
