"""Files in every form the official scorer reads, and the ones it should not."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from rankwise.errors import DataError, RankwiseWarning
from rankwise_article.e2e_scores import read_e2e

MILL, VAULTS = "name[The Mill], eatType[pub], priceRange[£20-25]", "name[The Vaults], food[Fast food]"
REFS_CSV = f'"mr","ref"\n"{MILL}","The Mill is a pub."\n"{MILL}","A pub, ""The Mill""."\n"{VAULTS}",Vaults\n'
REFS_BLANK = 'The Mill is a pub.\nA pub, "The Mill".\n\nVaults\n'
REFS_LORA = f'{MILL}||The Mill is a pub .\n{VAULTS}||Vaults\n{MILL}||A pub , "The Mill" . \n'
FIRST, SECOND = ["The Mill is a pub.", 'A pub, "The Mill".'], ["Vaults"]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.fixture
def references(tmp_path: Path) -> Path:
    return write(tmp_path, "refs.csv", REFS_CSV)


FORMS = [
    ("a.tsv", f'MR\toutput\n"{MILL}"\tone "two"\n{VAULTS}\tthree\n'),
    ("a.tsv", f'MR\toutput\r\r\n{MILL}\t"one ""two"""\r\r\n{VAULTS}\tthree\r\r\n'),
    ("a.tsv", f'\ufeffid\tMR\tsystem output\n\n1\t{MILL}\tone "two"\n\n2\t{VAULTS}\tthree'),
    ("a.csv", f'source,output\n"{MILL}","one ""two"""\n"{VAULTS}",three\n'),
    ("a.txt", 'one "two"\nthree\n'),
    ("a.txt.gz", ' one "two" \r\nthree'),
    ("a.jsonl", '{"prediction": "one \\"two\\""}\n\n{"prediction": "three"}\n'),
]
# A table names its meaning representations, which blank lines between groups do not.
MEETINGS = [
    (*form, *refs)
    for form in FORMS
    for refs in (("r.csv", REFS_CSV), ("r.txt", REFS_BLANK), ("r.txt", REFS_LORA))
    if not (form[0].endswith("sv") and refs[1] is REFS_BLANK)
]


@pytest.mark.parametrize(("name", "text", "refs_name", "refs"), MEETINGS)
def test_every_form_of_predictions_meets_every_form_of_references(name, text, refs_name, refs, tmp_path):
    predictions, groups = read_e2e(write(tmp_path, name, text), write(tmp_path, refs_name, refs))
    assert predictions == ['one "two"', "three"]
    assert [[text.replace(" ", "") for text in group] for group in groups] == [
        [text.replace(" ", "") for text in group] for group in (FIRST, SECOND)
    ]


def test_a_line_of_pairs_without_its_reference_is_refused(tmp_path):
    references = write(tmp_path, "r.txt", f"{MILL}||A pub\nVaults\n")
    with pytest.raises(DataError, match="RA231.*line 2 is no `context"):
        read_e2e(write(tmp_path, "a.txt", "one\n"), references)


def test_predictions_in_another_order_get_their_own_references(tmp_path, references):
    file = write(tmp_path, "a.tsv", f"MR\toutput\n{VAULTS}\tv\n{MILL}\tm\n")
    assert read_e2e(file, references) == (["v", "m"], [SECOND, FIRST])


def test_a_file_of_one_reference_each_needs_no_empty_lines(tmp_path):
    predictions, references = write(tmp_path, "a.txt", "a\nb\nc\n"), write(tmp_path, "r.txt", "x\ny\nz\n")
    assert read_e2e(predictions, references) == (["a", "b", "c"], [["x"], ["y"], ["z"]])


def test_broken_characters_are_mended_in_tables(tmp_path, references):
    file = write(tmp_path, "a.tsv", f"MR\toutput\n{MILL}\tÂ£20 Ł20\n{VAULTS}\tCafÃ©\n")
    assert read_e2e(file, references)[0] == ["£20 £20", "Café"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", f"MR\toutput\n{MILL}\t\n{VAULTS}\tv\n"),
        ("a.tsv", f'MR\toutput\n{MILL}\t""\n{VAULTS}\tv\n'),
        ("a.txt", "\nv\n"),
        ("a.jsonl", '{"prediction": ""}\n{"prediction": "v"}\n'),
    ],
)
def test_empty_predictions_are_kept_and_warned_about(name, text, tmp_path, references):
    with pytest.warns(RankwiseWarning, match="RA235.*1 of 2"):
        assert read_e2e(write(tmp_path, name, text), references)[0] == ["", "v"]


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("a.txt", "one\n", "RA232", "1 predictions and .* 2 groups"),
        ("a.txt", "one\ntwo\nthree\n", "RA232", "3 predictions and .* 2 groups"),
        ("a.tsv", f"MR\toutput\n{MILL}\tm\n", "RA232", "1 predictions"),
        ("a.tsv", f"MR\toutput\n{MILL}\tm\nname[Other]\to\n", "RA233", "1 of 2.*Other"),
        ("a.tsv", f"MR\toutput\n{MILL}\tm\n{VAULTS}\tv\n{MILL}\tn\n", "RA234", "The Mill.*more than once"),
        ("a.tsv", f"MR\toutput\n{MILL}\tm\tx\n{VAULTS}\tv\n", "RA231", "row 1"),
        ("a.tsv", f'MR\toutput\n{MILL}\t"m\n{VAULTS}\tv\n', "RA232", "1 predictions"),
        ("a.tsv", "number\toutput\n1\tm\n2\tv\n", "RA231", "'number'"),
        ("a.tsv", f"MR\toutput\treference\n{MILL}\tm\tx\n", "RA231", "output"),
        ("a.jsonl", '{"mr": "x"}\n', "RA238", "line 1.*no text in prediction"),
        ("a.jsonl", '{"prediction": ["x"]}\n', "RA238", "no text in prediction"),
        ("a.jsonl", '{"prediction": \n', "RA238", "line 1.*invalid JSON"),
        ("a.jsonl", "[1]", "RA238", "expected a JSON object.*found 1"),
        ("a.txt", "", "RA239", "empty"),
        ("a.tsv", "MR\toutput\n", "RA239", "empty"),
    ],
)
def test_bad_files_are_refused_with_the_place(name, text, code, said, tmp_path, references):
    with pytest.raises(DataError, match=said) as caught:
        read_e2e(write(tmp_path, name, text), references)
    assert caught.value.code == code
