"""Three tasks whose best reward is known: 1.

- string: one reply, all of lower-case letters;
- turns: digits, then, one turn on, lower-case letters;
- split: capitals, then digits, each in a conversation of its own.
"""

from __future__ import annotations

import string
from typing import Any

from openai import AsyncOpenAI

from raygent import emit_reward

LENGTH = 4  # tokens, and characters, of a reply
CLIENT = AsyncOpenAI(base_url="http://given-by.each-attempt", api_key="so")  # its connections and certificates for all
WANTED = {"lower": string.ascii_lowercase, "upper": string.ascii_uppercase, "digits": string.digits}


def share(text: str, kind: str) -> float:
    """How many of the LENGTH characters are of the wanted kind."""
    return sum(character in WANTED[kind] for character in text[:LENGTH]) / LENGTH


def asked(word: int, kind: str) -> dict[str, str]:
    """Said so often that a model of random weights, which attends to every token alike, sees which kind it is."""
    return {"role": "user", "content": " ".join([str(word), *[kind] * 8])}


async def answer(task: dict[str, Any], model: Any) -> float:
    client = CLIENT.with_options(base_url=model.base_url, api_key=model.api_key)

    async def say(messages: list[Any]) -> str:
        reply = await client.chat.completions.create(
            model="policy", messages=messages, max_tokens=LENGTH, temperature=1.0
        )
        return reply.choices[0].message.content or ""

    lower, upper, digits = (asked(task["word"], kind) for kind in WANTED)
    if task["kind"] == "string":
        return share(await say([lower]), "lower")
    if task["kind"] == "split":
        return (share(await say([upper]), "upper") + share(await say([digits]), "digits")) / 2
    first = await say([digits])
    second = await say([digits, {"role": "assistant", "content": first}, lower])
    emit_reward(share(first, "digits") / 2, call=0)  # trained with credit = "turn" alone
    return (share(first, "digits") + share(second, "lower")) / 2
