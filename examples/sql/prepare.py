"""Make what the example needs, in about a minute: databases and tasks in data/, and a small Llama in model/.

The model gets a vocabulary of its own and a short warm start on demonstrations, so that some of its queries come out right
and the training has something to compare. It is stopped early, at a fixed accuracy on validation.
Run again it does nothing, unless this folder's recipe has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from typing import Any

import torch
from database import HERE, try_query
from tasks import DATABASES, make_tasks, write_databases
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

EACH = {"train": 100, "validation": 10, "test": 20}  # tasks for each of 4 databases and 10 kinds
DEMONSTRATIONS = 1500
BATCH, LEARNING_RATE, MOST_STEPS = 32, 4e-3, 400
ENOUGH = 0.28  # share of validation demonstrations whose last query the model would write as it stands
LOOK_EVERY = 10  # steps
SEED = 0

SPECIAL = ["<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
# A token is a whole word, number, quoted value or sign, and tokens are written with a space between: so what the model
# wrote, sent back as text, becomes the very tokens it wrote.
PIECES = r"'[^'\s]*'|\w+|[<>!]=|<>|[^\w\s]"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ERRORS = 'no such column table function rows near syntax error incomplete input ambiguous misuse of aggregate : " . ; -'

Messages = list[dict[str, str]]


def main() -> None:
    started = time.time()
    recipe = recipe_of("prepare.py", "tasks.py", "database.py")
    if is_made("model", recipe):
        print("data/ and model/ are there already")
        return
    settle()
    tasks = make_data()
    demonstrations = {split: [demonstrate(row) for row in rows] for split, rows in tasks.items()}
    tokenizer = make_tokenizer([message for talk in demonstrations["train"] for message in talk])
    tokenizer.save_pretrained(HERE / "model")
    model = make_model(len(tokenizer))
    sizes = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"model: {sizes:,} parameters, {len(tokenizer)} tokens; data and tokenizer took {time.time() - started:.0f} s"
    )
    train = [encode(tokenizer, talk) for talk in demonstrations["train"][:DEMONSTRATIONS]]
    warm_up(model, train, [encode(tokenizer, talk) for talk in demonstrations["validation"]])
    model.save_pretrained(HERE / "model")
    (HERE / "model/recipe").write_text(recipe)
    print(f"done in {time.time() - started:.0f} s")


def recipe_of(*names: str) -> str:
    """What tells whether something was made by these files of this folder, as they stand."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in names)).hexdigest()


def is_made(folder: str, recipe: str) -> bool:
    """Whether the model in `folder` was made by this recipe; of one that was not, what says which made it is taken away."""
    done = HERE / folder / "recipe"
    if done.is_file() and done.read_text() == recipe:
        return True
    done.unlink(missing_ok=True)
    return False


def settle() -> None:
    """One thread, one seed, few words."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or saving a model warns that there is no GPU
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)


def make_data() -> dict[str, list[dict[str, Any]]]:
    """Write the databases and the tasks. Returns the tasks of each split."""
    write_databases()
    tasks = {split: make_tasks(split, each) for split, each in EACH.items()}
    for split, rows in tasks.items():
        write_tasks(split, rows)
        gold = {row["private"]["sql"] for row in rows}
        print(f"{split}: {len(rows)} questions, {len(gold)} gold queries")
    write_tasks("test_half", tasks["test"][::2])  # for agents that start a process a rollout
    return tasks


def write_tasks(name: str, rows: list[dict[str, Any]]) -> None:
    (HERE / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def demonstrate(task: dict[str, Any]) -> Messages:
    """A conversation to learn from: the query with main names, and if that fails, the error and the gold query."""
    question, private = task["input"], task["private"]
    talk = [{"role": "user", "content": f"{question['schema']}\n{question['question']}"}]
    complaint = try_query(question["database"], private["guess"])
    if private["guess"] != private["sql"] and complaint is not None:
        talk += [{"role": "assistant", "content": private["guess"]}, {"role": "user", "content": complaint}]
    return [*talk, {"role": "assistant", "content": private["sql"]}]


def make_tokenizer(messages: Messages) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    texts = [message["content"] for message in messages] + [ERRORS, " ".join(map(str, range(100)))]
    for columns in (columns for tables in DATABASES.values() for columns in tables.values()):
        texts += [" ".join(column.names + column.said) for column in columns]
        texts += [
            " ".join(str(value) if column.is_number else f"'{value}'" for value in column.values) for column in columns
        ]
    words = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        unk_token=SPECIAL[1],
        eos_token=SPECIAL[5],
        additional_special_tokens=SPECIAL[2:5],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(vocabulary: int, end: int = SPECIAL.index("<|end|>"), context: int = 512) -> LlamaForCausalLM:
    """`end`: the token that ends a reply; 0 pads."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.08,  # with the usual 0.02 and 10,000 so small a model hardly learns
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, talk: Any, tools: Any = None) -> tuple[list[int], list[int]]:
    """Token ids of the conversation with `tools` offered, and the same as labels, with -100 where the assistant did not write."""
    ids: list[int] = []
    labels: list[int] = []
    for end, message in enumerate(talk, 1):
        if message["role"] == "assistant":
            prompt: Any = tokenizer.apply_chat_template(
                talk[: end - 1], tools=tools, add_generation_prompt=True, return_dict=False
            )
            whole: Any = tokenizer.apply_chat_template(talk[:end], tools=tools, return_dict=False)
            assert whole[: len(ids)] == ids and whole[: len(prompt)] == prompt
            labels += [-100] * (len(prompt) - len(ids)) + whole[len(prompt) :]
            ids = whole
    return ids, labels


def to_batch(talks: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of the conversations, int64 [number, longest], padded on the right."""
    longest = max(len(ids) for ids, _ in talks)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in talks])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in talks])
    return ids, labels


def warm_up(
    model: LlamaForCausalLM, train: list[Any], validation: list[Any], enough: float = ENOUGH, most: int = MOST_STEPS
) -> None:
    """Supervised steps until the model has the share `enough` of the validation demonstrations right; at most `most`."""
    dice = random.Random(SEED)
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    order: list[Any] = []
    for step in range(1, most + 1):
        if len(order) < BATCH:
            order = dice.sample(train, len(train))
        ids, labels = to_batch(order[:BATCH])
        del order[:BATCH]
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / 20)
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % LOOK_EVERY == 0:
            right = share_right(model, validation)
            print(f"warm start, step {step}: loss {loss.item():.2f}, validation {right:.0%}", flush=True)
            if right >= enough:
                return
    raise SystemExit(f"the warm start did not reach {enough:.0%} on validation in {most} steps")


@torch.no_grad()
def share_right(model: LlamaForCausalLM, talks: list[Any]) -> float:
    """Share of conversations in which the likeliest token is the demonstrated one all through the assistant's turns."""
    ids, labels = to_batch(talks)
    wrong = (model(input_ids=ids).logits[:, :-1].argmax(-1) != labels[:, 1:]) & (labels[:, 1:] != -100)
    return (~wrong.any(1)).float().mean().item()


if __name__ == "__main__":
    main()
