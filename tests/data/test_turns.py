"""Which tokens a model is asked for: the assistant's own, exactly, whatever the template and the tokenizer do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.examples import Example, read_examples, split_examples, without, write_examples
from polyformer.data.rows import TextBatch
from polyformer.data.turns import Renderer, TurnRecipe, TurnRows, encode_turns, packed
from polyformer.errors import DataError
from polyformer.loaded import load
from polyformer.parts.model import TransformerPart
from polyformer.train.objectives import batch_loss
from tests.train.toy_tune import conversations, decoder, write_jsonl, write_tokenizer

HEAD = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
THINKING = (
    HEAD + "{% set content = message.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ content | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
SPACED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ 'A: ' }}"
    "{% generation %}{{ message.content + ' <|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ 'Q: ' + message.content + '\n' }}{% endif %}{% endfor %}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the house reads it. 🙂👨‍👩‍👧"}],
    [
        {"role": "system", "content": "the bridge"},
        {"role": "user", "content": " do it  "},
        {"role": "assistant", "content": "<think>so</think>\n\n no\n\nand no "},
        {"role": "user", "content": "the house reads it. 🙂👨‍👩‍👧"},
        {"role": "assistant", "content": "  yes <|im_end|> 看 "},
    ],
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder)
    return TextTokenizer.load(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TransformerPart:
    return load(decoder(tmp_path_factory.mktemp("decoder"))).model


def chats(count: int = 12) -> list[Example]:
    return [Example(row, f"chats.jsonl, line {i + 1}") for i, row in enumerate(conversations(count))]


class TestMasks:
    @pytest.mark.parametrize("template", [None, THINKING, SPACED])
    def test_they_are_those_of_the_reference(self, template: str | None, tmp_path: Path) -> None:
        """The reference takes what stands in `{% generation %}`; ours are found without, and are the same."""
        transformers = pytest.importorskip("transformers")
        if template is None:
            write_tokenizer(tmp_path)
        else:
            write_tokenizer(tmp_path, template)
        ours, theirs = TextTokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        renderer = Renderer(ours, "chat")
        for messages in CHATS:
            said = [{**one, "content": one["content"].replace("<|im_end|>", "")} for one in messages]
            expected = theirs.apply_chat_template(said, return_dict=True, return_assistant_tokens_mask=True)
            (ids, asked), ended = renderer.turns(Example({"messages": said}, "x"))
            assert ids == expected["input_ids"]
            assert asked == [bool(one) for one in expected["assistant_masks"]]
            assert ended

    def test_without_marks_too(self, words: TextTokenizer, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, THINKING.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
        write_tokenizer(tmp_path / "marked", THINKING)
        for messages in CHATS:
            found = [
                Renderer(TextTokenizer.load(folder), "chat").turns(Example({"messages": messages}, "x"))
                for folder in (tmp_path, tmp_path / "marked")
            ]
            assert found[0] == found[1]

    def test_what_is_asked_for_is_what_was_said(self, words: TextTokenizer) -> None:
        """A control token that somebody typed stays text, and is asked for as such."""
        (ids, asked), _ = Renderer(words, "chat").turns(Example({"messages": CHATS[1]}, "x"))
        own = [one for one, wanted in zip(ids, asked, strict=True) if wanted]
        said = [m["content"] for m in CHATS[1] if m["role"] == "assistant"]
        assert words.decode(own, keep_control=True) == "".join(f"{one}<|im_end|>" for one in said)
        assert own.count(words.token_id("<|im_end|>")) == 2

    @given(st.lists(st.tuples(st.text(max_size=9), st.text(min_size=1, max_size=9)), min_size=1, max_size=3))
    def test_whatever_is_said(self, words: TextTokenizer, turns: list[tuple[str, str]]) -> None:
        messages = [
            {"role": role, "content": text}
            for pair in turns
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        if any("\ud800" <= letter <= "\udfff" for pair in turns for text in pair for letter in text):
            return
        (ids, asked), ended = Renderer(words, "chat").turns(Example({"messages": messages}, "x"))
        own = [one for one, wanted in zip(ids, asked, strict=True) if wanted]
        assert ended
        assert words.decode(own, keep_control=True) == "".join(f"{answer}<|im_end|>" for _, answer in turns)

    def test_completions(self, words: TextTokenizer) -> None:
        example = Example({"prompt": "What does the house do?", "completion": " The house reads."}, "x")
        (ids, asked), _ = Renderer(words, "plain").turns(example)
        start = len(words.encode("What does the house do?"))
        assert ids == [*words.encode("What does the house do?"), *words.encode(" The house reads."), words.eos_id]
        assert asked == [False] * start + [True] * (len(ids) - start)
        (ids, asked), _ = Renderer(words, "chat").turns(example)
        assert words.decode(ids, keep_control=True).startswith("<|im_start|>user\nWhat does")
        assert Renderer(words, "plain").prompt(example.data)[0] == words.encode("What does the house do?")

    def test_a_turn_without_an_end_is_counted(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
        data = encode_turns(Renderer(TextTokenizer.load(tmp_path), "chat"), chats(), 200)
        assert data.endless == len(data) == 12
        assert "doesn't end by a control token: 12" in data.notes[-1]


class TestRows:
    @pytest.mark.parametrize("packing", ["apart", "padded"])
    def test_packed_is_separate(self, packing: str, words: TextTokenizer, model: TransformerPart) -> None:
        """The gradients of all rows are those of the conversations, each alone."""
        data = encode_turns(Renderer(words, "chat"), chats(), 100)
        recipe = TurnRecipe.from_data({"length": 100, "tokens": 300, "packing": packing})
        rows = TurnRows(data, recipe, 100)
        model.train()
        found = _gradients(model, list(rows.in_order()))
        alone = TurnRows(data, TurnRecipe(100, 100, "padded"), 100)
        batches = [alone.collate(np.array([i])) for i in range(len(data))]
        expected = _gradients(model, batches)
        assert sum(len(row) for row in rows.rows) == len(data)
        assert any(len(row) > 1 for row in rows.rows) == (packing == "apart")
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)

    def test_joined_is_not(self, words: TextTokenizer, model: TransformerPart) -> None:
        data = encode_turns(Renderer(words, "chat"), chats(), 100)
        batch = next(TurnRows(data, TurnRecipe(100, 300, "joined"), 100).in_order())
        assert batch.document_ids is None

    def test_every_example_comes_once(self, words: TextTokenizer) -> None:
        data = encode_turns(Renderer(words, "chat"), chats(), 100)
        rows = TurnRows(data, TurnRecipe(100, 200), 100)
        for _ in range(2):
            some = [next(rows) for _ in range(len(rows))]
            assert sum(one.target_tokens for one in some) == int(data.asked.sum())
            assert sorted(int(row) for one in some for row in one.rows) == list(range(len(rows.rows)))

    def test_a_position_is_gone_back_to(self, words: TextTokenizer) -> None:
        data = encode_turns(Renderer(words, "chat"), chats(), 100)
        rows, other = (TurnRows(data, TurnRecipe(100, 200), 100) for _ in range(2))
        for _ in range(len(rows) + 1):
            next(rows)
        other.restore(rows.state())
        assert torch.equal(next(rows).input_ids, next(other).input_ids)

    @given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
    def test_packing(self, lengths: list[int]) -> None:
        rows = packed(np.asarray(lengths), 20)
        assert sorted(one for row in rows for one in row) == list(range(len(lengths)))
        filled = [sum(lengths[one] for one in row) for row in rows]
        assert max(filled) <= 20
        assert len(rows) <= 2 * (-(-sum(lengths) // 20))  # no two rows could be one


def _gradients(model: TransformerPart, batches: list[TextBatch]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        batch_loss(model, batch, 0.0).objective.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class TestTruncation:
    def test_it_is_counted(self, words: TextTokenizer) -> None:
        long = {"messages": [{"role": "user", "content": "the house " * 50}, {"role": "assistant", "content": "x"}]}
        data = encode_turns(Renderer(words, "chat"), [*chats(4), Example(long, "x")], 40)
        assert (data.lost, len(data)) == (1, 4)
        assert "the whole answer was cut away: 1" in "\n".join(data.notes)
        assert int(data.ids.lengths.max()) == 41

    def test_all_of_them_is_an_error(self, words: TextTokenizer) -> None:
        with pytest.raises(DataError, match=r"all 12 answers stand behind the 8 tokens of a row.*raise batch.length"):
            encode_turns(Renderer(words, "chat"), chats(), 8)


class TestRefusals:
    @pytest.mark.parametrize(
        ("messages", "told"),
        [
            ([{"role": "user", "content": "x"}], "x.jsonl, line 3: the conversation has no turn of the assistant"),
            ([{"role": "assistant", "content": ""}], "x.jsonl, line 3: the assistant's turns are empty"),
            (["hello", {"role": "assistant", "content": "x"}], "line 3: message 1 is a str, not a table"),
            ([{"role": "a b", "content": "x"}, {"role": "assistant", "content": "x"}], "line 3: message 1 has no role"),
        ],
    )
    def test_conversations(self, messages: list[Any], told: str, words: TextTokenizer) -> None:
        with pytest.raises(DataError, match=told):
            Renderer(words, "chat").turns(Example({"messages": messages}, "x.jsonl, line 3"))

    def test_roles_that_the_template_leaves_out(self, tmp_path: Path) -> None:
        write_tokenizer(
            tmp_path,
            HEAD + "{% if message.role in ['user', 'assistant'] %}{{ message.content }}{% endif %}{% endfor %}",
        )
        messages = [{"role": "critic", "content": "x"}, {"role": "assistant", "content": "y"}]
        with pytest.raises(DataError, match=r"line 3: the chat template writes nothing .* role is 'critic'"):
            Renderer(TextTokenizer.load(tmp_path), "chat").turns(Example({"messages": messages}, "x.jsonl, line 3"))

    def test_a_template_that_refuses(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, "{{ raise_exception('only user and assistant') }}")
        with pytest.raises(DataError, match=r"x.jsonl, line 3: the chat template, line 1: .*only user and assistant"):
            Renderer(TextTokenizer.load(tmp_path), "chat").turns(
                Example({"messages": [{"role": "assistant", "content": "y"}]}, "x.jsonl, line 3")
            )

    def test_no_template(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, None)
        with pytest.raises(DataError, match="no chat template; give prompt and completion"):
            Renderer(TextTokenizer.load(tmp_path), "chat").turns(chats(1)[0])


class TestFiles:
    @pytest.mark.parametrize(
        ("lines", "told"),
        [
            ([""], "has no examples: all its lines are blank"),
            (["{"], "line 1: no valid JSON"),
            (["[1]"], "line 1 should be an object"),
            (['{"massages": []}'], "line 1 has the keys massages .did you mean 'messages'"),
            (['{"messages": []}'], "line 1: 'messages' should be a list of messages"),
            (['{"prompt": "a", "completion": 3}'], "line 1: 'completion' should be text, not int"),
            (['{"text": null}'], "line 1: 'text' is null"),
            (['{"text": "a", "label": 1.5}'], "line 1: 'label' should be text or a whole number, not float"),
            (['{"tokens": ["a"], "tags": []}'], "line 1 has 1 tokens, but 0 tags"),
            (
                ['{"text": "a"}', "", '{"prompt": "a", "completion": "b"}'],
                "line 3 has prompt and completion, but .*line 1",
            ),
        ],
    )
    def test_what_is_refused(self, lines: list[str], told: str, tmp_path: Path) -> None:
        file = tmp_path / "x.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=told):
            read_examples(file)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_bytes(b"")
        with pytest.raises(DataError, match=r"x.jsonl is empty"):
            read_examples(tmp_path / "x.jsonl")

    def test_tables(self, tmp_path: Path) -> None:
        (tmp_path / "x.tsv").write_text("good\tyes\n\nbad\tno\n", encoding="utf-8")
        found = read_examples(tmp_path / "x.tsv")
        assert [one.data for one in found.rows] == [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
        (tmp_path / "x.tsv").write_text("good\n", encoding="utf-8")
        with pytest.raises(DataError, match="line 1 has 0 tabs; source and target should be separated by one"):
            read_examples(tmp_path / "x.tsv", "answered")

    def test_other_keys_are_told(self, tmp_path: Path) -> None:
        found = read_examples(write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "id": 1}, {"text": "b", "of": 2}]))
        assert found.unread == ("id", "of")


class TestSplits:
    def test_nothing_leaks(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"Question {i // 3}?" + " " * (i % 2), "completion": f"a{i}"} for i in range(60)]
        split = split_examples(read_examples(write_jsonl(tmp_path / "x.jsonl", [*rows, rows[0]])), 0.2, 0)
        train, held = (
            {" ".join(one.data["prompt"].split()) for one in part} for part in (split.train, split.validation)
        )
        assert not train & held
        assert len(split.train) + len(split.validation) == 60
        assert split.duplicates == 1
        assert 3 <= len(split.validation) <= 24

    def test_its_order_does_not_matter(self, tmp_path: Path) -> None:
        rows = conversations(30)
        files = [write_jsonl(tmp_path / name, some) for name, some in (("a.jsonl", rows), ("b.jsonl", rows[::-1]))]
        one, other = (split_examples(read_examples(file), 0.2, 0) for file in files)
        assert [x.data for x in one.validation] == [x.data for x in other.validation]
        assert [x.data for x in one.train] == [x.data for x in other.train]

    def test_too_few(self, tmp_path: Path) -> None:
        examples = read_examples(write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}]))
        with pytest.raises(DataError, match=r"1 examples that ask for 1 different things are too few"):
            split_examples(examples, 0.2, 0)

    def test_a_file_of_its_own(self, tmp_path: Path) -> None:
        rows = [{"text": f"text {i}"} for i in range(6)]
        train = read_examples(write_jsonl(tmp_path / "a.jsonl", rows))
        held = read_examples(write_jsonl(tmp_path / "b.jsonl", rows[:2]))
        split = without(train, held)
        assert len(split.train) == 4
        assert "2 that ask for what a held-out one asks for" in str(split)
        with pytest.raises(DataError, match="none is left"):
            without(held, train)
        other = read_examples(write_jsonl(tmp_path / "c.jsonl", conversations(2)))
        with pytest.raises(DataError, match=r"c.jsonl, line 1 has messages, but .*a.jsonl, line 1 has text"):
            without(train, other)

    def test_written_and_read(self, tmp_path: Path) -> None:
        found = read_examples(write_jsonl(tmp_path / "x.jsonl", conversations(3)))
        write_examples(tmp_path / "y.jsonl", found.rows)
        assert [one.data for one in read_examples(tmp_path / "y.jsonl").rows] == [one.data for one in found.rows]
