"""Files of answers: cut anywhere, in parts of any length, and never over somebody else's."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vitrail.core.errors import UserError
from vitrail.inference import answers_parquet
from vitrail.inference.answers import Answer, kind_of

MADE = {"model": "m", "top": 2}
ODD = (
    Answer('a,"b"\n\n.png', (("x\r\ny", 0.5), ('"', 0.25))),
    Answer("c\rd.png", problem='it said "no",\nand that was that'),
    Answer("a", (("x", 1.0), ("y", 0.0))),
    Answer("a", (("x", 1.0), ("y", 0.0))),
)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_text_may_be_cut_at_any_byte(tmp_path: Path, suffix: str) -> None:
    names = [answer.picture for answer in ODD]
    path = tmp_path / f"a.{suffix}"
    with kind_of(path)(path, MADE, names) as out:
        out.add(ODD)
    whole = path.read_bytes()
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        with kind_of(path)(path, MADE, names) as out:
            assert 0 <= out.done < len(ODD)
            out.add(ODD[out.done :])
            assert out.lost == 1
        assert path.read_bytes() == whole, end


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("jsonl", b"{}\n"),
        ("jsonl", b"no\n"),
        ("csv", b"a,b\n"),
        ("csv", b'picture,rank,class,probability,reason\n"a"b,1\n'),
    ],
)
def test_foreign_contents_are_never_cut(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    with kind_of(path)(path, MADE, ["a"]):
        pass
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged behind answer 0"):
        kind_of(path)(path, MADE, ["a"])
    assert path.read_bytes() == content


def test_parts_of_any_length_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_parquet, "GROUP_ROWS", 7)
    given = [Answer(str(number), (("x", number / 40), ("y", 0.0))) for number in range(40)]
    files = []
    for rows in (100, 1, 3):
        monkeypatch.setattr(answers_parquet, "PART_ROWS", rows)
        path = tmp_path / f"{rows}.parquet"
        with kind_of(path)(path, MADE, [answer.picture for answer in given]) as out:
            for first in range(0, 40, 2):
                out.add(given[first : first + 2])
        files.append(path.read_bytes())
        assert [group.num_rows for group in map(pq.ParquetFile(path).metadata.row_group, range(6))] == [7] * 5 + [5]
        assert pq.read_table(path)["probabilities"].to_pylist() == [[number / 40, 0.0] for number in range(40)]
    assert files[0] == files[1] == files[2]


def test_a_missing_part_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_parquet, "PART_ROWS", 1)
    path, names = tmp_path / "a.parquet", ["0", "1", "2", "3"]
    out = kind_of(path)(path, MADE, names)
    for name in names[:3]:
        out.add([Answer(name, (("x", 1.0), ("y", 0.0)))])
    out.close()
    parts = sorted((tmp_path / "a.parquet.parts").glob("*.parquet"))
    parts[1].unlink()
    with pytest.raises(UserError, match="is damaged behind answer 1"):
        kind_of(path)(path, MADE, names)
    parts[0].write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is damaged behind answer 0"):
        kind_of(path)(path, MADE, names)
