"""The agent of the tests that run whole trainings: two turns, and a line in a ledger of its own for every reply it got."""

import json
import os

import openai

LEDGER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ledger.jsonl")


def note(**fields):
    """One line, one write: lines of several processes do not mix, and a kill leaves whole lines or one cut at the end."""
    file = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, json.dumps(fields).encode() + b"\n")
    finally:
        os.close(file)


async def answer(task, model):
    async with openai.AsyncOpenAI(base_url=model.base_url, api_key=model.api_key, max_retries=0) as client:
        messages = [{"role": "user", "content": task}]
        for _ in range(2):
            reply = await client.chat.completions.create(
                model=model.model, messages=messages, max_tokens=8, extra_body={"return_token_ids": True}
            )
            choice = reply.choices[0]
            note(call=reply.id, tokens=choice.model_extra["token_ids"], key=model.api_key)
            messages += [{"role": "assistant", "content": choice.message.content}, {"role": "user", "content": "more"}]
    return choice.message.content


def grade(output):
    """Something to learn: the share of letters in what was said."""
    return sum(letter.isalpha() for letter in output) / max(len(output), 1)
