"""Exact continuation, on conversations in which tokens t and t + 100 mean the same (two ways to cut one text)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_tiny_model
from transformers import AutoTokenizer

from raygent.actors.continuation import Run, Said, continued, reader, tools_of

END, USER, ASSISTANT, THINK, THOUGHT = 0, 1, 2, 3, 4
ENDS = [END]
words = st.lists(st.integers(10, 99), min_size=1, max_size=5)


def read(tokens: list[int]) -> Said:
    if THOUGHT in tokens:
        split = tokens.index(THOUGHT)
        thinking, tokens = tokens[:split], tokens[split + 1 :]
    else:
        thinking = []
    text = " ".join(str(token % 100) for token in thinking if token != THINK)
    said = " ".join(str(token % 100) for token in tokens if token != THINK)
    return Said(text, said, [], "", "<think>" if tokens == [THINK] else said)


def rendered(turns: list[tuple[int, list[int]]]) -> list[int]:
    """A prompt: turns of who and what, each ended, and the header of the assistant's next."""
    return [token for who, said in turns for token in (who, *said, END)] + [ASSISTANT]


def run(prompt: list[int], reply: list[int], starts: tuple[int, ...] = ()) -> Run:
    return Run(np.asarray(prompt + reply, np.int32), (*starts, len(prompt)))


FIRST = rendered([(USER, [11, 12])])
EARLIER = run(FIRST, [20, 121, END])
AGAIN = [(USER, [11, 12]), (ASSISTANT, [120, 21]), (USER, [13])]


def test_a_reply_cut_otherwise_goes_on_from_what_was_sampled():
    found = continued(rendered(AGAIN), [EARLIER], ENDS, read)
    assert found.tokens.tolist() == [*EARLIER.tokens.tolist(), USER, 13, END, ASSISTANT]
    assert (found.own, found.starts) == (len(EARLIER.tokens), EARLIER.starts)


def test_the_same_tokens_stay_as_they_are():
    same = rendered([(USER, [11, 12]), (ASSISTANT, [20, 121]), (USER, [13])])
    found = continued(same, [EARLIER], ENDS, read)
    assert (found.tokens.tolist(), found.own, found.starts) == (same, 0, EARLIER.starts)


@pytest.mark.parametrize(
    "turns",
    [
        [(USER, [11, 12]), (ASSISTANT, [20, 22]), (USER, [13])],  # another reply
        [(USER, [111, 12]), (ASSISTANT, [20, 121]), (USER, [13])],  # what was not sampled is compared to the token
        [(USER, [9]), (USER, [11, 12]), (ASSISTANT, [20, 121]), (USER, [13])],  # something before
        [(USER, [11, 12]), (USER, [13])],  # the reply left out
        [(USER, [11, 12]), (ASSISTANT, [THINK, 5, THOUGHT, 20, 21]), (USER, [13])],  # thinking it did not think
        [(USER, [11, 12]), (ASSISTANT, []), (USER, [13])],  # the reply blanked
        [(USER, [11, 12]), (USER, [20, 121]), (USER, [13])],  # in another's mouth
        [(USER, [11, 12])],  # asked again
    ],
)
def test_an_edited_conversation_stays_as_it_was_rendered(turns):
    found = continued(rendered(turns), [EARLIER], ENDS, read)
    assert (found.tokens.tolist(), found.own, found.starts) == (rendered(turns), 0, ())


def test_thinking_that_a_template_leaves_out_stays_in_the_context():
    thought = run([*FIRST, THINK], [30, THOUGHT, 20, 21, END])  # a template may open the thinking
    found = continued(rendered(AGAIN), [thought], ENDS, read)
    assert found.tokens.tolist() == [*thought.tokens.tolist(), USER, 13, END, ASSISTANT]


def test_a_reply_cut_off_at_its_limit_gets_the_end_it_lacks():
    found = continued(rendered(AGAIN), [run(FIRST, [20, 121])], ENDS, read)
    assert found.tokens.tolist() == [*FIRST, 20, 121, END, USER, 13, END, ASSISTANT]
    assert found.own == len(FIRST) + 2


def test_the_longest_of_several_goes_on():
    second = run([*EARLIER.tokens.tolist(), USER, 13, END, ASSISTANT], [140, END], EARLIER.starts)
    other = run(FIRST, [50, END])
    found = continued(rendered([*AGAIN, (ASSISTANT, [40]), (USER, [14])]), [other, EARLIER, second], ENDS, read)
    assert found.own == len(second.tokens)
    assert found.starts == second.starts


def test_one_that_is_equal_goes_before_one_that_only_says_the_same():
    thought = run(FIRST, [THINK, 30, THOUGHT, 20, 121, END])
    same = rendered([(USER, [11, 12]), (ASSISTANT, [20, 121]), (USER, [13])])
    for runs in ([EARLIER, thought], [thought, EARLIER]):
        assert continued(same, runs, ENDS, read).own == 0


def test_an_end_that_says_whose_the_next_turn_is_has_to_be_the_same():
    other_end = [token if token != END else 5 for token in rendered(AGAIN)]
    assert continued(other_end, [run([1, 11, 12, 5, 2], [20, 121, END])], [END, 5], read).own == 0


@given(
    asked=st.lists(words, min_size=2, max_size=6),
    said=st.lists(words, min_size=6, max_size=6),
    other_cut=st.lists(st.booleans(), min_size=30, max_size=30),
    edited=st.integers(-1, 5),
)
def test_a_conversation_of_any_length(asked, said, other_cut, edited):
    """Each call extends the one before, whatever its replies are rendered to; one after an edited turn does not."""
    runs: list[Run] = []
    turns: list[tuple[int, list[int]]] = []
    for number, question in enumerate(asked):
        if number == edited and number:
            turns[-1] = (ASSISTANT, [*turns[-1][1], 7])
        turns.append((USER, question))
        prompt = continued(rendered(turns), runs, ENDS, read)
        before = runs[-1].tokens if runs else np.empty(0, np.int32)
        extends = np.array_equal(prompt.tokens[: len(before)], before)
        assert extends == (number != edited or number == 0)
        if number == edited and number > 1:  # from the last that was not edited
            assert np.array_equal(prompt.tokens[: len(runs[-2].tokens)], runs[-2].tokens)
        runs.append(run(prompt.tokens.tolist(), [*said[number], END], prompt.starts))
        cuts = other_cut[number * 5 :]
        turns.append((ASSISTANT, [word + 100 * cut for word, cut in zip(said[number], cuts, strict=False)]))


def test_the_same_turns_are_read_once(tokenizer):
    """However long the conversation gets and however many calls are compared."""
    known: dict = {}
    say = reader(None, tokenizer, [], known)
    assert say([72, 105]) is say([72, 105]) and len(known) == 1
    assert reader(None, tokenizer, [{"type": "function"}], known)([72, 105]) == say([72, 105]) and len(known) == 2
    counted: list[int] = []

    def read_counted(tokens: list[int]) -> Said:
        counted.append(1)
        return read(tokens)

    turns: list[tuple[int, list[int]]] = []
    runs: list[Run] = []
    calls: list[int] = []
    for number in range(30):
        turns += [(USER, [10 + number % 5])]
        prompt = continued(rendered(turns), runs, ENDS, read_counted)
        calls.append(len(counted))
        said = [20 + number % 5, 121]
        runs.append(Run(np.array([*prompt.tokens, *said, END], np.int32), (*prompt.starts, len(prompt.tokens))))
        turns += [(ASSISTANT, [20 + number % 5, 21])]
    assert np.diff(calls).max() <= 4 * 30  # of the newest call alone, not of all


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_tiny_model(tmp_path_factory.mktemp("model")))


def test_tool_calls_are_compared_as_json(tokenizer):
    from vllm.parser import ParserManager

    tools = tools_of({"tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]})
    say = reader(ParserManager.get_parser("hermes", None, True), tokenizer, tools, {})
    told = [
        say(tokenizer(f"Now.\n<tool_call>\n{call}\n</tool_call>")["input_ids"])
        for call in ('{"name":"add","arguments":{"a":1,"b":2}}', '{"arguments": {"b": 2, "a": 1}, "name": "add"}')
    ]
    assert [(reply.content, reply.calls) for reply in told] == [("Now.", [("add", '{"a": 1, "b": 2}')])] * 2
    flag, tail = (
        say(tokenizer(f"Now.\n<tool_call>\n{call}\n</tool_call>{tail}")["input_ids"])
        for call, tail in (
            ('{"name": "add", "arguments": {"a": true, "b": 2}}', ""),
            ('{"name": "add", "arguments": {"a": 1, "b": 2}}', " Or not."),
        )
    )
    assert flag.calls != told[0].calls and tail.tail != told[0].tail
    plain = reader(None, tokenizer, [], {})
    assert plain(tokenizer(" Grüße \n")["input_ids"]).content == "Grüße"
    assert plain(tokenizer("Grüß")["input_ids"][:-1]).content == "Grü"  # as the client has it


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
def test_thinking_is_told_from_what_is_said(tokenizer, parser):
    from vllm.parser import ParserManager

    tokenizer.add_tokens(["<think>", "</think>"])  # some parsers look for their ids
    say = reader(ParserManager.get_parser(None, parser, False), tokenizer, [], {})
    for text, told in (
        ("<think>\nHm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
        ("Hm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
        ("Yes <b>we</b> can.", ("", "Yes <b>we</b> can.")),
        ("<think>\nThe password is x", ("The password is x", "")),
    ):
        reply = say(tokenizer(text)["input_ids"])
        assert (reply.reasoning, reply.content) == told


def test_a_thinking_model_that_talks_before_its_call(tokenizer):
    """Rendered without the thinking, qwen3's parser takes what stands before the call for it."""
    from vllm.parser import ParserManager

    tools = tools_of({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]})
    say = reader(ParserManager.get_parser("hermes", "qwen3", True), tokenizer, tools, {})
    called = 'Ok <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    sampled, rendered = (
        say(tokenizer(f"{before}{called}")["input_ids"]) for before in ("<think>\nHm.\n</think>\n\n", "")
    )
    assert (sampled.reasoning, sampled.content, sampled.calls) == ("Hm.", "Ok", [("f", "{}")])
    assert (rendered.reasoning, rendered.content, rendered.calls) == ("", "Ok", [("f", "{}")])


def test_the_tools_of_each_api():
    chat: dict = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
    responses = {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}, {"type": "web_search"}]}
    messages = {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    assert tools_of(chat) == tools_of(responses) == tools_of(messages) != []
    assert tools_of({}) == tools_of({"tools": None}) == tools_of({"tools": 5}) == tools_of({"tools": [3]}) == []
