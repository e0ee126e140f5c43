"""The entities of a run and their Arrow schemas: the one place where a record's shape is stated.

Every table of the replay store has one of these schemas, in the log as in the Parquet files. Times are Unix seconds
(float64). Token ids are int32, logprobs float32 and natural, one entry a sampled token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# greedy: as train, but of the likeliest tokens, and never trained; score: a training task under a prompt that is tried;
# ask: not the agent, but the model that improves prompts, asked once.
Mode = Literal["train", "eval", "greedy", "score", "ask"]
OWN_SAMPLING = ("eval", "score", "ask")  # modes in which the agent's own sampling parameters are in force
AttemptKey = tuple[str, int]  # rollout id, number
UPSTREAM = "upstream:"  # begins the policy of a call that an upstream answered

# The winning attempt succeeded, or ended in an outcome of the agent's own making, which the configured reward answers.
SUCCEEDED = "succeeded"
OUTCOMES = (
    "agent_error",
    "timeout",
    "over_memory",
    "over_processes",
    "max_calls",
    "context_overflow",
    "no_call",
    "no_reward",
    "grader_error",
)
# Ours to answer for: these attempts are made again and never trained on.
INFRASTRUCTURE = ("lease_lost", "engine_lost", "upstream_lost", "incomplete", "store_restarted")
# A rollout's status: queued, running, then one of the ends.
#   succeeded  an attempt won with outcome "succeeded"
#   failed     an attempt won with one of OUTCOMES; its reward is grader.failed_reward
#   lost       every attempt allowed failed for infrastructure's sake
#   dropped    cancelled, over the staleness bound when its group was taken, or undone by a rewind
ENDED = ("succeeded", "failed", "lost", "dropped")


@dataclass(frozen=True)
class Task:
    """One item of the user's data. `input` is what the agent sees, `private` what the grader alone sees (JSON values)."""

    id: str
    input: Any
    private: Any = None
    source: str = ""  # the name of its file, where data.train has several


class PromptVersion(TypedDict):
    """A prompt as one rollout has it: the version's number and its text."""

    version: int
    text: str


@dataclass
class Rollout:
    """One run of the agent on one task: `index` of its `group_id`, made for driver step `step`."""

    rollout_id: str
    task_id: str
    group_id: str
    mode: Mode
    step: int
    index: int
    input: Any
    private: Any = None
    resource_version: int = 0  # policy version asked for (eval: pinned; train: the newest when it was queued)
    prompts: dict[str, PromptVersion] = field(default_factory=dict)  # by name


@dataclass(frozen=True)
class Lease:
    """The right to try `rollout` as attempt number `attempt` (from 1), after `failures` of infrastructure."""

    rollout: Rollout
    attempt: int
    failures: int = 0


@dataclass
class Call:
    """One model request and its reply, as the engine ran it.

    `source` and `source_sequence` name it where it was recorded (an engine replica and its own count within the
    attempt, from 0): appends are idempotent by them. `sequence` is its place in the attempt, given by the store.
    A request with n > 1 is n calls with the same `request_id`, `choice` 0..n-1.
    `trainable` is False where the logprobs are not those of the plain policy (`untrainable_why`: the parameters that change what
    is sampled, as structured_outputs, a kind of media, prompt_logprobs_only, ...): such tokens never get a loss mask.
    `own_tokens`: with exact continuation how many of the prompt's first tokens are an earlier call's own, in place of those
    that the template rendered; 0 where the prompt is as it was rendered.
    A call that an upstream answered has no tokens, `policy` "upstream:NAME" and `untrainable_why` "upstream"; `response` is
    the reply's body (of a stream its events, as they came) and `cost` what it cost in US dollars by the config's prices.
    """

    rollout_id: str
    attempt: int
    source: str
    source_sequence: int
    request_id: str
    choice: int
    agent: str
    policy: str  # "policy"; an adapter by its name, "base"; "upstream:NAME"
    api: str  # chat | completions | responses | messages
    request: str  # JSON of the body as the client sent it
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    logprobs: list[float]  # len(response_token_ids), of the processed (sampled-from) distribution
    policy_versions: list[int]  # len(response_token_ids)
    sampling: str  # JSON of the sampling parameters the engine used
    temperature: float
    finish_reason: str  # stop | length | abort | error; an upstream's own
    trainable: bool
    untrainable_why: str
    own_tokens: int
    started: float
    finished: float
    sequence: int = -1
    response: str = ""
    cost: float = 0.0


@dataclass
class Span:
    """Any other event of an attempt. `kind`: log, stdout, tool, exception, note, agent, otlp. `attributes` is JSON."""

    rollout_id: str
    attempt: int
    source: str
    source_sequence: int
    kind: str
    name: str
    attributes: str
    started: float
    finished: float
    sequence: int = -1


@dataclass
class Reward:
    """A number for a rollout, one agent (`agent` != "") or one call: the `call_sequence`-th of the rollout, or of that agent, from
    0 in the order of the calls' `sequence`; -1: none."""

    rollout_id: str
    attempt: int
    source: str
    source_sequence: int
    value: float
    name: str = "reward"
    components: str = "{}"  # JSON object name -> number
    agent: str = ""
    call_sequence: int = -1
    time: float = 0.0
    sequence: int = -1


@dataclass
class Seal:
    """What a worker states when it ends an attempt: nothing of the attempt counts before the store has made it durable.

    `calls`, `spans`, `rewards` map a source to the number of records it made; the store refuses as "incomplete" an
    attempt that lacks one of them.
    """

    rollout_id: str
    attempt: int
    worker: str
    outcome: str  # SUCCEEDED, one of OUTCOMES, or one of INFRASTRUCTURE
    reward: float | None
    calls: dict[str, int] = field(default_factory=dict)
    spans: dict[str, int] = field(default_factory=dict)
    rewards: dict[str, int] = field(default_factory=dict)
    error: str = ""
    started: float = 0.0
    finished: float = 0.0


CALLS = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("attempt", pa.int32()),
        ("sequence", pa.int32()),
        ("source", pa.string()),
        ("source_sequence", pa.int32()),
        ("request_id", pa.string()),
        ("choice", pa.int32()),
        ("agent", pa.string()),
        ("policy", pa.string()),
        ("api", pa.string()),
        ("request", pa.large_string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response_token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("policy_versions", pa.list_(pa.int32())),
        ("sampling", pa.string()),
        ("temperature", pa.float32()),
        ("finish_reason", pa.string()),
        ("trainable", pa.bool_()),
        ("untrainable_why", pa.string()),
        ("own_tokens", pa.int32()),
        ("started", pa.float64()),
        ("finished", pa.float64()),
        ("response", pa.large_string()),
        ("cost", pa.float64()),
    ]
)
SPANS = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("attempt", pa.int32()),
        ("sequence", pa.int32()),
        ("source", pa.string()),
        ("source_sequence", pa.int32()),
        ("kind", pa.string()),
        ("name", pa.string()),
        ("attributes", pa.large_string()),
        ("started", pa.float64()),
        ("finished", pa.float64()),
    ]
)
REWARDS = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("attempt", pa.int32()),
        ("sequence", pa.int32()),
        ("source", pa.string()),
        ("source_sequence", pa.int32()),
        ("name", pa.string()),
        ("value", pa.float64()),
        ("components", pa.string()),
        ("agent", pa.string()),
        ("call_sequence", pa.int32()),
        ("time", pa.float64()),
    ]
)
ATTEMPTS = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("attempt", pa.int32()),
        ("worker", pa.string()),
        ("outcome", pa.string()),
        ("reward", pa.float64()),
        ("won", pa.bool_()),
        ("late", pa.bool_()),  # sealed after its rollout had ended, or its win undone by a rewind: kept, never trained
        ("calls", pa.int32()),
        ("spans", pa.int32()),
        ("rewards", pa.int32()),
        ("error", pa.string()),
        ("started", pa.float64()),
        ("finished", pa.float64()),
    ]
)
ROLLOUTS = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("task_id", pa.string()),
        ("group_id", pa.string()),
        ("mode", pa.string()),
        ("step", pa.int32()),
        ("index", pa.int32()),
        ("input", pa.large_string()),  # JSON
        ("private", pa.large_string()),  # JSON
        ("resource_version", pa.int32()),
        ("prompts", pa.large_string()),  # JSON: name -> {"version", "text"}
        ("status", pa.string()),
        ("outcome", pa.string()),
        ("winning_attempt", pa.int32()),  # 0 while none has won
        ("attempts", pa.int32()),
        ("reward", pa.float64()),
        ("trained_step", pa.int32()),  # the learner step that took it, -1 where none did
        ("queued", pa.float64()),
        ("ended", pa.float64()),
    ]
)
# Not of the log: the driver owns the file, and writes it whole (prompt_table.py).
PROMPTS = pa.schema(
    [
        ("name", pa.string()),
        ("version", pa.int32()),  # from 0, the first, within the name
        ("parents", pa.list_(pa.int32())),  # versions of the same name that it was made from
        ("text", pa.large_string()),
        ("origin", pa.string()),  # first | apo | gepa | bootstrap
        ("step", pa.int32()),  # in which it was made
        ("critique", pa.large_string()),  # of the parent, as the optimiser's model wrote it
        ("score", pa.float64()),  # mean reward on the selection tasks of the best candidate with it; null: not tried
        ("tasks", pa.int32()),  # selection tasks behind the score
        ("best", pa.bool_()),  # part of the best candidate
    ]
)
SCHEMAS = {"rollouts": ROLLOUTS, "attempts": ATTEMPTS, "calls": CALLS, "spans": SPANS, "rewards": REWARDS}


def to_batch(schema: pa.Schema, records: list[Any]) -> pa.RecordBatch:
    """Dataclass records (or dicts) as one record batch of `schema`."""
    rows = [record if isinstance(record, dict) else vars(record) for record in records]
    columns = {name: [utf8(row[name]) for row in rows] for name in schema.names}
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def to_json(value: Any) -> str:
    """`value` as JSON; what is no JSON as its text ("NaN" and "Infinity" among it, as OTLP has them), and `{"not_json": why}` for
    all of it where that cannot be."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
        if "NaN" in text or "Infinity" in text:
            whole = json.loads(text, parse_constant=str)
            text = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
        return utf8(text)
    except Exception as error:  # noqa: BLE001 - the __str__ of a user's object may raise anything
        return json.dumps({"not_json": f"{type(error).__name__}: {error}"})


def utf8(value: Any) -> Any:
    """A text with its lone surrogates, which UTF-8 has no bytes for, as JSON writes them: \\ud800. Else `value` itself."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def last_line(error: object) -> str:
    """Of an error's text what failed; before it stand a traceback, and Ray's stack of the actor it failed in."""
    return str(error).rstrip().rpartition("\n")[2]


@dataclass
class Sample:
    """One path of a trajectory as a learner takes it. All arrays have length T = len(token_ids).

    Position t holds a token, and what is known of its sampling: `loss_mask[t]` is True only where token t was sampled
    by a trained agent's policy and is counted in this sample (a token shared by several paths is masked in one alone).
    `logprobs[t]` is the engine's log-probability of token t given tokens < t, `advantages[t]` its advantage, and
    `policy_versions[t]` the version that sampled it, -1 where that was no policy of the run; all are 0 where the mask is False.
    With a critic `values[t]` is what it had expected before token t and `returns[t]` what it has to learn; else both are None.
    With a KL in the loss `reference[t]` is the reference's log-probability of token t; else it is None.
    `weight` multiplies the loss of each masked token (batch.weigh), and `share` is the part of the batch that the sample stands
    for: the shares of a batch sum to 1.
    """

    rollout_id: str
    group_id: str
    agent: str
    token_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    logprobs: np.ndarray  # float32 [T]
    advantages: np.ndarray  # float32 [T]
    policy_versions: np.ndarray  # int32 [T]
    temperature: np.ndarray  # float32 [T], the temperature token t was sampled at; 1 where the mask is False
    weight: float = 0.0
    share: float = 0.0
    values: np.ndarray | None = None  # float32 [T]
    returns: np.ndarray | None = None  # float32 [T]
    reference: np.ndarray | None = None  # float32 [T]

    def __len__(self) -> int:
        return len(self.token_ids)


def only(tables: dict[str, pa.Table], rollout_ids: set[str]) -> dict[str, pa.Table]:
    """What the tables hold of these rollouts."""
    wanted = pa.array(sorted(rollout_ids), pa.string())
    return {name: table.filter(pc.is_in(table["rollout_id"], value_set=wanted)) for name, table in tables.items()}
