"""Make tool_model/, for the agents that call tools: a small Llama as prepare.py's, that knows their protocols.

Its demonstrations are what the agents here do, unchanged, on an oracle in the place of a vendor: so each prompt is the
framework's own. Two or three minutes; run again it does nothing, unless this folder's recipe has changed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anthropic_agent
import autogen_chat
import langgraph_agent
import openai_agents
from database import HERE
from oracle import oracle_of
from prepare import SEED, encode, is_made, make_data, make_model, recipe_of, settle, warm_up
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# The Responses API, the MCP server and the program in JavaScript lead to the prompts of these.
RECORDED: list[tuple[Callable[..., Any], int]] = [  # agent, tasks of train
    (openai_agents.answer, 200),
    (anthropic_agent.answer, 1500),
    (langgraph_agent.answer, 900),
    (autogen_chat.answer, 150),
]
VALIDATION = 40  # tasks of each
AUTHORS = ("sql", "policy", "rewriter")  # whose conversations of validation count: they correct themselves
MOST_CALLS = 8  # of an agent on a task
HANDOFFS = 60  # all alike: so few will do
VOCABULARY, CONTEXT = 1500, 768
ENOUGH, MOST_STEPS = 0.3, 500
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TOOL_CALL = ["<tool_call>", "</tool_call>"]
CHAT_TEMPLATE = """{%- if tools %}<|im_start|>tools
{% for tool in tools %} {{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def main() -> None:
    started = time.time()
    sources = ["prepare_tools.py", "oracle.py", "sql_tool.py", "agent.py"]
    sources += ["openai_agents.py", "anthropic_agent.py", "langgraph_agent.py", "autogen_chat.py"]
    recipe = recipe_of("prepare.py", "tasks.py", "database.py", *sources)
    if is_made("tool_model", recipe):
        print("tool_model/ is there already")
        return
    settle()
    tasks = make_data()
    train, validation = asyncio.run(record_splits(tasks))
    validation = [talk for talk in validation if talk["model"] in AUTHORS]
    handoffs = [talk for talk in train if talk["model"] == openai_agents.TRIAGE][:HANDOFFS]
    train = [talk for talk in train if talk["model"] != openai_agents.TRIAGE] + handoffs
    random.Random(SEED).shuffle(train)
    teach("tool_model", recipe, train, validation)
    print(f"done in {time.time() - started:.0f} s")


def teach(
    folder: str,
    recipe: str,
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    encode: Callable[..., tuple[list[int], list[int]]] = encode,
    context: int = CONTEXT,
    enough: float = ENOUGH,
    most: int = MOST_STEPS,
) -> None:
    """Make the tokenizer and the model of `folder` from recorded conversations, until it has the share `enough` of `validation`
    right. `encode`: the tokens and labels of one."""
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(HERE / folder)
    model = make_model(len(tokenizer), SPECIAL.index("<|im_end|>"), context)
    encoded, held_out = (
        [encode(tokenizer, talk["messages"], talk["tools"]) for talk in talks] for talks in (train, validation)
    )
    print(
        f"{len(train)} conversations of {sum(len(ids) for ids, _ in encoded) / len(train):.0f} tokens, at most "
        f"{max(len(ids) for ids, _ in encoded)}; model: {model.num_parameters():,} parameters, {len(tokenizer)} tokens"
    )
    warm_up(model, encoded, held_out, enough, most)
    model.save_pretrained(HERE / folder)
    (HERE / folder / "recipe").write_text(recipe)


async def record_splits(tasks: dict[str, list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Conversations of train and of validation; in one event loop, since the agents keep their clients."""
    return [
        await record(tasks["train"], RECORDED),
        await record(tasks["validation"], [(agent, VALIDATION) for agent, _ in RECORDED]),
    ]


async def record(tasks: list[dict[str, Any]], agents: list[tuple[Callable[..., Any], int]]) -> list[dict[str, Any]]:
    """What the agents said with the oracle, each on so many tasks of its own: their conversations, as the oracle's
    `seen` has them, with the last reply at the end of `messages`."""
    left = iter(tasks)
    with oracle_of(tasks) as oracle:
        for agent, number in agents:
            for _, task in zip(range(number), left, strict=False):
                at = {"base_url": f"{oracle.url}/v1", "anthropic_base_url": oracle.url}
                await agent(task["input"], SimpleNamespace(**at, api_key=task["id"], model="policy"))
    whole = [
        call
        for place, call in enumerate(oracle.seen)
        if not any(goes_on(later, call) for later in oracle.seen[place + 1 : place + MOST_CALLS])
    ]
    return [call | {"messages": [*call["messages"], call["reply"]]} for call in whole]


def goes_on(later: dict[str, Any], call: dict[str, Any]) -> bool:
    """Whether the later call is of the same conversation."""
    same = all(later[name] == call[name] for name in ("task", "model"))
    return same and later["messages"][: len(call["messages"])] == call["messages"]


def make_tokenizer(talks: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: what a model writes is text that comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
    texts = [fast.apply_chat_template(talk["messages"], tools=talk["tools"], tokenize=False) for talk in talks]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL + TOOL_CALL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=SPECIAL[1:2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


if __name__ == "__main__":
    main()
