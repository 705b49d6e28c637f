"""Every form that datasets come in: the columns that are found, and what is read from a row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

import clt.harvest.run
from clt.cache_format import open_cache
from clt.harvest.columns import describe_columns
from clt.harvest.config import HarvestConfig
from clt.harvest.hub import BLOCK, Stream, _with_bytes, open_stream
from clt.harvest.rows import BadSample, open_rows
from clt.harvest.run import harvest
from clt.harvest.samples import Sample, parse_sample

# name: (row, columns as printed, turns as (role, parts), references)
FORMS: dict[str, tuple[dict[str, Any], str, list[tuple[str, list[str | None]]], list[Any]]] = {
    "LLaVA-Instruct": (
        {"id": "1", "image": "a.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
        "conversation: conversations, image: image, id: id",
        [("user", [None, "What?"]), ("assistant", ["A cat."])],
        ["a.jpg"],
    ),
    "ShareGPT": (
        {"id": "x_0", "model": "m", "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Ho"}]},
        "conversation: conversations, id: id; not used: model",
        [("system", ["Be brief."]), ("user", ["Hi"]), ("assistant", ["Ho"])],
        [],
    ),
    "chat messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        "conversation: messages",
        [("user", ["Hi"]), ("assistant", ["Ho"])],
        [],
    ),
    "chat messages in parts": (
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"},
                {"type": "image_url", "image_url": {"url": "b.png"}}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]},
        "conversation: messages",
        [("user", [None, "What?", None]), ("assistant", ["A cat."])],
        ["a.png", "b.png"],
    ),
    "chat messages, pictures beside": (
        {"images": ["a.png", "b.png"], "messages": [
            {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Cats."}]},
        "conversation: messages, image: images",
        [("user", [None, None, "What?"]), ("assistant", ["Cats."])],
        ["a.png", "b.png"],
    ),
    "pairs of user and assistant": (
        {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "s"}]},
        "conversation: texts, image: images",
        [("user", [None, "What?"]), ("assistant", ["A cat."])],
        ["a.png"],
    ),
    "AMBER": (
        {"id": 7, "image": "AMBER_7.jpg", "query": "Describe this image."},
        "question: query, image: image, id: id",
        [("user", [None, "Describe this image."])],
        ["AMBER_7.jpg"],
    ),
    "VQA": (
        {"question_id": 3, "image": "a.jpg", "question": "What?", "answers": [
            {"answer": "cat"}, {"answer": "a cat"}]},
        "question: question, answer: answers, image: image, id: question_id",
        [("user", [None, "What?"]), ("assistant", ["cat\na cat"])],
        ["a.jpg"],
    ),
    "Alpaca": (
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        "question: instruction, context: input, answer: output",
        [("user", ["Translate.\nchat"]), ("assistant", ["cat"])],
        [],
    ),
    "captions": (
        {"image": "a.jpg", "caption": ["A cat.", "A grey cat."]},
        "caption: caption, image: image",
        [("user", [None]), ("assistant", ["A cat.\nA grey cat."])],
        ["a.jpg"],
    ),
    "several images": (
        {"image": ["a.png", "b.png"], "conversations": [
            {"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "Both."}]},
        "conversation: conversations, image: image",
        [("user", [None, " or ", None, "?"]), ("assistant", ["Both."])],
        ["a.png", "b.png"],
    ),
}  # fmt: skip


def turns_of(sample: Sample) -> list[tuple[str, list[str | None]]]:
    return [tuple(turn) for turn in sample.turns]


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_understood(name: str) -> None:
    row, columns, turns, references = FORMS[name]
    assert describe_columns([tuple(row)], None) == columns
    sample = parse_sample(row, 4, None)
    assert turns_of(sample) == turns
    assert sample.references == references


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("container", ["jsonl", "json", "parquet", "folder", "stream"])
def test_each_form_is_read_from_each_container(
    tmp_path: Path, name: str, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a container does to a row (nulls, other types) does not change the sample."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    row, _, turns, references = FORMS[name]
    sample = parse_sample(CONTAINERS[container](tmp_path, row), 0, None)
    assert turns_of(sample) == turns
    assert sample.references == references


def _from_file(suffix: str, write: Callable[[Path, dict[str, Any]], object]) -> Callable[..., Any]:
    def read(folder: Path, row: dict[str, Any]) -> Any:
        path = folder / f"data{suffix}"
        write(path, row)
        return open_rows(str(path), "train")[0]

    return read


def _from_stream(folder: Path, row: dict[str, Any]) -> Any:
    stream = datasets.Dataset.from_list([row]).to_iterable_dataset()
    return Stream(_with_bytes(stream), "").head()[0]


CONTAINERS: dict[str, Callable[..., Any]] = {
    "jsonl": _from_file(".jsonl", lambda path, row: path.write_text(json.dumps(row))),
    "json": _from_file(".json", lambda path, row: path.write_text(json.dumps([row]))),
    "parquet": _from_file(".parquet", lambda path, row: datasets.Dataset.from_list([row]).to_parquet(path)),
    "folder": _from_file("", lambda path, row: datasets.Dataset.from_list([row]).save_to_disk(path)),
    "stream": _from_stream,
}


def test_plain_text_and_a_named_column(tmp_path: Path) -> None:
    assert parse_sample({"text": "one\ntwo"}, 0, None).text == "one\ntwo"
    row = {"body": "words", "text": "other", "id": "a"}
    assert describe_columns([tuple(row)], "body") == "text: body, id: id; not used: text"
    assert parse_sample(row, 0, "body").text == "words"


def test_cocos_own_file(tmp_path: Path) -> None:
    """A row for each caption; the pictures are found by number."""
    content = {
        "info": {},
        "images": [{"id": 5, "file_name": "000005.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 5, "caption": "A cat."},
            {"id": 2, "image_id": 5, "caption": "A grey cat."},
            {"id": 3, "image_id": 6, "caption": "A dog."},
        ],
    }
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps(content))
    samples = [parse_sample(open_rows(str(path), "train")[number], number, None) for number in range(3)]
    assert [sample.id for sample in samples] == ["1", "2", "3"]
    assert samples[1].references == ["000005.jpg"]
    assert turns_of(samples[1]) == [("user", [None]), ("assistant", ["A grey cat."])]
    assert samples[2].references == ["an image that `images` does not list"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": 2}', "expected a JSON list of samples, or COCO's .*, found an object of a, b"),
        ("[]", "found an empty one"),
        ('"text"', "found b'\"text\"'"),
        ("[1, 2", "expected one JSON list of samples"),
        ("", "is empty; expected one JSON list of samples"),
    ],
)
def test_a_json_file_of_another_kind_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_rows(str(tmp_path / "a.json"), "train")


def test_columns_that_nobody_understands_are_an_error_with_the_first_rows_keys(tmp_path: Path) -> None:
    """Before a model is loaded: there is none here."""
    path = tiny.write_rows(tmp_path, [{"prompt_text": "x", "jpg_file": "y"}] * 3)
    config = HarvestConfig(model=str(tmp_path), dataset=str(path), cache=tmp_path / "c")
    with pytest.raises(
        ValueError, match=r"train.jsonl: expected a column .*first row prompt_text, jpg_file; .*--text-column"
    ):
        harvest(config)
    with pytest.raises(ValueError, match=r"expected a column `body`, found in the first row prompt_text"):
        harvest(
            HarvestConfig(model=str(tmp_path), dataset=str(path), cache=tmp_path / "c", text_column="body")
        )


def test_columns_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all forms that the first rows have; on stderr, so that --json stays one object."""
    rows = [FORMS["AMBER"][0], FORMS["LLaVA-Instruct"][0]]
    path = tiny.write_rows(tmp_path, rows)
    config = HarvestConfig(model="m", dataset=str(path), cache=tmp_path / "c")
    clt.harvest.run.say_columns(open_rows(str(path), "train"), config)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "columns: conversation: conversations, question: query, image: image, id: id\n"


BAD_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"conversations": "hello"}, "conversations: expected a list that is not empty, found str"),
    ({"conversations": {"from": "human"}}, "found dict"),
    ({"conversations": [["human", "x"]]}, "conversations: expected"),
    ({"conversations": [{"from": "human"}]}, "conversations: expected"),
    ({"conversations": [{"from": None, "value": "x"}]}, "found 'None'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "expected `role` to be one of"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "found 'audio'"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "parts of type text"),
    ({"question": 3, "image": "a.png"}, "question: expected text, found int"),
    ({"question": "x", "answer": {"a": 1}}, "answer: expected text, found dict"),
    ({"caption": [3], "image": "a.png"}, "caption: expected text, found int"),
    ({"text": ["a", None]}, "text: expected text, found NoneType"),
    ({"text": "  \n"}, "no text"),
    ({"text": ""}, "no text"),
    ({"text": None}, "expected a column"),
    ({"text": "\ud800"}, "half a surrogate pair at character 0"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_TYPES)
def test_wrong_types_are_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        parse_sample(row, 0, None)


def test_empty_turns_are_left_as_they_are() -> None:
    """A turn without words among turns with some is no fault: the template writes it."""
    row = {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "words"}]}
    assert turns_of(parse_sample(row, 0, None)) == [("user", []), ("assistant", ["words"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forms")
    tiny.save_llava(root / "model")
    tiny.write_dataset(root / "data", n_pictures=4, n_texts=3)
    return root


def tokens_of(cache: Path) -> set[tuple[Any, ...]]:
    """(sample id, position, token, kind, hash of the picture) of every stored token."""
    opened = open_cache(cache)
    tokens, lines = opened["train"].tokens(), opened.samples()
    names = ("sample", "position", "token_id", "kind")
    found = set()
    for number, *rest in zip(*(tokens[name].tolist() for name in names), strict=True):
        line = lines[number]
        found.add((line["id"], *rest, *(image["sha256"] for image in line["images"])))
    return found


def embedded(folder: Path) -> datasets.Dataset:
    """The dataset with its pictures' bytes inside, as a column of type Image."""
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        if name := row.get("image"):
            row["image"] = {"bytes": (folder / "data" / name).read_bytes(), "path": None}
        else:
            row["image"] = None
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_each_container_of_pictures_gives_the_same_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beside its pictures; parquet, a saved folder and a hub's stream with the bytes inside."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    table = embedded(folder)
    table.to_parquet(tmp_path / "d.parquet")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "d")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    loaded = datasets.load_dataset

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        if name != "someone/pictures":
            return loaded(name, *arguments, **options)
        assert options["streaming"]
        return table.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = {}
    for name in (
        str(folder / "data" / "train.jsonl"),
        str(tmp_path / "d.parquet"),
        str(tmp_path / "d"),
        "someone/pictures",
    ):
        cache = tmp_path / f"cache-{len(found)}"
        report = harvest(
            HarvestConfig(model=str(folder / "model"), dataset=name, cache=cache, window=64, val_fraction=0.0)
        )
        assert report.rejected == 0
        found[name] = tokens_of(cache)
    first, *others = found.values()
    assert len(first) > 100
    assert all(other == first for other in others)


class FakeHub:
    def dataset_info(self, name: str) -> Any:
        assert name == "someone/pictures"
        return type("Info", (), {"sha": "abc123"})()


def numbered(count: int) -> Stream:
    return Stream(
        datasets.Dataset.from_dict({"text": [str(n) for n in range(count)]}).to_iterable_dataset(), ""
    )


@pytest.mark.parametrize("world", [1, 3])
def test_a_stream_is_shared_and_resumed_anywhere(world: int) -> None:
    """Every row to one rank; from any start on, the rest of the same order."""
    stream = numbered(2 * BLOCK + 100)
    whole = [(one.number, one.read()["text"]) for one in stream.walk(3, 0, 1)]
    assert sorted(int(text) for _, text in whole) == list(range(2 * BLOCK + 100))
    assert [number for number, _ in whole] == list(range(2 * BLOCK + 100))
    assert whole != [(one.number, one.read()["text"]) for one in stream.walk(4, 0, 1)]
    for start in (0, 5, BLOCK - 1, BLOCK, BLOCK + 7):
        parts = [
            [(one.number, one.read()["text"]) for one in stream.walk(3, start + rank, world)]
            for rank in range(world)
        ]
        assert sorted(pair for part in parts for pair in part) == whole[start:]


def test_a_stream_names_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    asked = []

    def load(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options.get("revision")))
        return datasets.Dataset.from_list([{"text": "x"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_stream("someone/pictures:part", "train").fingerprint == "abc123"
    assert asked[-1] == ("someone/pictures", "part", "abc123")
