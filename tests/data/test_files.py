"""Files that no reader may take for something else: each is refused in one line, or read whole."""

import gzip
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafl_app.data.delimited import LONGEST_CELL
from hafl_app.data.errors import DataError
from hafl_app.data.files import read_names, read_table
from hafl_app.data.folders import both_files, train_file

COLUMNS = ("text", "label")
ROWS = [f"hello {i},{'ab'[i % 2]}" for i in range(120)]


def as_csv(rows, header="text,label"):
    return "\n".join([header, *rows, ""])


@pytest.fixture
def read(tmp_path):
    def read(content, name="my.csv", label_column="label"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_table(path, COLUMNS, label_column)

    return read


def refused(read, content, match, name="my.csv", **options):
    with pytest.raises(DataError, match=match) as caught:
        read(content, name, **options)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def replaced(number, row):
    return [*ROWS[:number], row, *ROWS[number + 1 :]]


class TestRaggedRows:
    @pytest.mark.parametrize(
        ("row", "count"),
        [("hi, there,a", 3), ("hello 4,a,", 3), ("hello 4", 1), ('"hello 4,a"', 1), (",,", 3)],
    )
    def test_are_named_by_row_and_line(self, read, row, count):
        refused(
            read,
            as_csv(replaced(4, row)),
            rf"line 6: row 5 has {count} fields?, the header has 2",
        )

    def test_one_field_more_in_every_row_is_no_index(self, read):
        rows = [f"{i},{row}" for i, row in enumerate(ROWS)]
        refused(read, as_csv(rows), "line 2: row 1 has 3 fields, the header has 2")

    def test_a_line_is_counted_after_fields_over_several(self, read):
        refused(read, as_csv(['"x\n\ny",a', "z"]), "line 5: row 2 has 1 field")

    def test_an_index_column_has_a_header_without_a_name(self, read):
        table = read(as_csv([f"{i},{row}" for i, row in enumerate(ROWS)], ",text,label"))

        assert list(table.columns) == ["Unnamed: 0", *COLUMNS]
        assert (table["text"][7], table["label"][7]) == ("hello 7", "b")

    def test_blank_lines_are_no_rows(self, read):
        assert len(read("\n" + as_csv([*ROWS[:3], "", "  ", *ROWS[3:], "\n"]))) == 120

    @pytest.mark.parametrize("end", ["\r\n", "\r"])
    def test_every_end_of_line_is_one(self, read, end):
        pd.testing.assert_frame_equal(
            read(as_csv(ROWS).replace("\n", end)), read(as_csv(ROWS), "a.csv")
        )


class TestStrayQuotes:
    @pytest.mark.parametrize(("first", "last"), [(10, 60), (10, 11), (0, 119)])
    def test_that_swallow_rows_are_refused(self, read, first, last):
        rows = replaced(first, f'"hello {first},a')
        rows[last] = rows[last].replace(",", '",')
        # Between them they make one legal field of all the rows from one to the other.
        refused(read, as_csv(rows), f"line {first + 2}: a quoted field runs to line {last + 2}")

    def test_in_the_label_are_refused(self, read):
        rows = replaced(10, 'hello 10,"a')
        rows[14] += '"'
        refused(read, as_csv(rows), "line 12: a quoted field runs to line 16")

    def test_in_another_column_are_refused(self, read):
        rows = [f"{row},note {i}" for i, row in enumerate(ROWS)]
        rows[3], rows[8] = 'hello 3,b,"note 3', f'{rows[8]}"'
        refused(read, as_csv(rows, "text,label,note"), "line 5: a quoted field runs to line 10")

    def test_without_labels_rows_alike_are_refused(self, read):
        rows = replaced(3, '"hello 3,b')
        rows[8] = rows[8].replace(",", '",')
        refused(read, as_csv(rows), "line 5: a quoted field runs to line 10", label_column="")

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ('"hello 4,a', "a double quote opens a field that is never closed"),
            ('"hello" 4,a', "a stray double quote"),
            (r'"he said \"hi\", then",a', "a stray double quote"),
        ],
    )
    def test_that_leave_no_legal_field_are_refused(self, read, row, reason):
        refused(read, as_csv(replaced(4, row)), f"line 6: {reason}")

    def test_in_the_header_are_refused(self, read):
        refused(read, as_csv(ROWS, 'text,"label').replace("hello 9,b", 'hello 9,"b'), "line 1: ")
        content = as_csv(ROWS, 'text,"label').replace("hello 9,b", 'hello 9,b"')
        refused(read, content, "the header runs to line 11")

    @pytest.mark.parametrize(
        ("row", "text"),
        [
            ('"dear x,\nthank you, yes\n\nbye, x",a', "dear x,\nthank you, yes\n\nbye, x"),
            ('"he said ""hi, a""",a', 'he said "hi, a"'),
            ('5" disk,a', '5" disk'),
            ('"a,d\nc",a', "a,d\nc"),
        ],
    )
    def test_legal_fields_are_kept(self, read, row, text):
        table = read(as_csv(replaced(4, row)))

        assert len(table) == 120
        assert table["text"][4] == text


class TestColumns:
    @pytest.mark.parametrize(
        ("name", "content"),
        [("a.csv", "text,label,label\nx,y,z\n"), ("a.tsv", "text\tlabel\tlabel\nx\ty\tz\n")],
    )
    def test_of_one_name_are_refused(self, read, name, content):
        refused(read, content, "2 columns are named 'label'", name)

    def test_of_one_name_in_parquet_are_refused(self, read, tmp_path):
        table = pa.table([["x"], ["y"], ["z"]], names=["text", "label", "label"])
        pq.write_table(table, tmp_path / "b.parquet")
        refused(read, (tmp_path / "b.parquet").read_bytes(), "2 columns are named", "a.parquet")

    def test_one_key_twice_is_refused(self, read):
        line = '{"text": "x", "text": "y", "label": 1}'
        refused(read, f"{line}\n", "line 1: .*'text' stands twice", "a.jsonl")
        refused(read, f"[{line}]", "'text' stands twice", "a.json")

    @pytest.mark.parametrize("separator", [";", "\t", "|"])
    def test_another_separator_is_named(self, read, separator):
        refused(read, as_csv(ROWS).replace(",", separator), "one column, .*fields are separated")

    def test_whole_numbers_are_numbers_and_all_else_is_as_written(self, read):
        table = read("text,label,id,code,part\nx,1,1,01,1.50\ny,2,,2,3\n")

        assert table["id"].tolist() == [1, None]
        assert table["code"].tolist() == ["01", "2"]
        assert table["part"].tolist() == ["1.50", "3"]
        assert table["label"].tolist() == ["1", "2"]

    def test_large_numbers_beside_a_null_stay_what_they_are(self, read):
        ids = [2**53, 2**53 + 1]  # one float
        rows = [{"text": "x", "label": 1, "id": number} for number in [*ids, None]]
        table = read("".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")

        assert table["id"].tolist() == [*ids, None]


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_wide_ones_are_named_with_the_way_out(self, read, encoding):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        refused(
            read,
            as_csv(ROWS).encode(encoding),
            rf"is {name}, expected UTF-8; convert it: iconv -f {name} -t utf-8 my.csv > my-utf8",
        )

    @pytest.mark.parametrize(
        ("encoding", "character", "name"), [("latin-1", "é", "LATIN1"), ("cp1252", "€", "CP1252")]
    )
    @pytest.mark.parametrize("kind", ["csv", "txt", "jsonl", "json"])
    def test_narrow_ones_are_named_with_line_and_way_out(
        self, read, encoding, character, name, kind
    ):
        content = as_csv(replaced(3, f"caf{character},a")).encode(encoding)
        refused(read, content, f"line 5: byte .*convert it: iconv -f {name} -t utf-8", f"a.{kind}")

    def test_packed_ones_are_to_be_unpacked(self, read):
        content = gzip.compress("text,label\né,a\n".encode("latin-1"))
        refused(read, content, "unpack it and convert it: iconv .* a.csv > a-utf8", "a.csv.gz")

    def test_a_nul_byte_is_refused(self, read):
        refused(read, as_csv(replaced(3, "x\0y,a")), "line 5: a NUL byte")

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (gzip.compress(as_csv(ROWS).encode()), r"gzip data: .*\.gz"),
            (b"PK\x03\x04" + bytes(99), "a zip archive or a spreadsheet"),
        ],
    )
    def test_a_container_is_named(self, read, content, what):
        refused(read, content, what)

    def test_names_of_labels_are_read_alike(self, tmp_path):
        (tmp_path / "names.json").write_bytes('["café"]'.encode("latin-1"))
        with pytest.raises(DataError, match="iconv -f LATIN1"):
            read_names(tmp_path / "names.json")


class TestCells:
    def test_a_huge_one_is_read(self, read):
        assert len(read(as_csv(["x" * 300_000 + ",a", *ROWS]))["text"][0]) == 300_000

    def test_a_limit_is_named(self, read):
        refused(read, f"text,label\n{'x' * (LONGEST_CELL + 1)},a\n", "line 2: a field of more than")


class TestJson:
    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("a.json", '[{"text": "x", "label": 1}] trailing', "not JSON .*Extra data"),
            ("a.json", '{"text": "x"}\n]', "line 2: not a JSON object"),
            ("a.json", "[" * 100_000, "recursion"),
            ("a.jsonl", '{"text": "x", "label": ' + "[" * 100_000, "line 1: .*recursion"),
            ("a.json", '[{"text": "x", "label": 1}, 5]', "row 2: int, expected"),
            ("a.jsonl", '{"text": "x", "label": 1}\n\n"x"', "line 3: str, expected"),
        ],
    )
    def test_what_is_not_rows_is_named(self, read, name, content, match):
        refused(read, content, match, name)


class TestTxt:
    def test_is_a_label_a_tab_and_a_text_a_line(self, read):
        table = read('a\tone, two\n\nb\tthr"ee\r\n', "my.txt")

        assert table.to_dict("records") == [
            {"label": "a", "text": "one, two"},
            {"label": "b", "text": 'thr"ee'},
        ]

    def test_a_header_of_the_two_words_is_none_of_the_rows(self, read):
        assert read("label\ttext\na\tx\n", "my.txt")["label"].tolist() == ["a"]

    @pytest.mark.parametrize(("line", "tabs"), [("x", 0), ("a\tb\tc", 2)])
    def test_other_lines_are_refused(self, read, line, tabs):
        refused(read, f"a\tx\n{line}\n", f"line 2: {tabs} tabs, expected one", "my.txt")


class TestFolders:
    def test_files_of_unknown_endings_are_named_with_the_formats_known(self, tmp_path):
        for name in ("train.xlsx", "test.doc", *(f"{i}.bin" for i in range(9))):
            (tmp_path / name).touch()

        with pytest.raises(
            DataError, match=r"which holds 0.bin, 1.bin, .* and 6 more; .*\.csv, \.tsv, \.txt"
        ):
            train_file(tmp_path)

    def test_a_missing_test_file_is_named_alike(self, tmp_path):
        (tmp_path / "train.csv").touch()
        with pytest.raises(DataError, match=r"no test file in .*which holds train\.csv; expected"):
            both_files(tmp_path)

    def test_an_empty_folder_says_so(self, tmp_path):
        with pytest.raises(DataError, match="which holds nothing"):
            train_file(tmp_path)
