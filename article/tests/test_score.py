"""``python -m rankwise_article score`` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from needs import needs_java
from rankwise_article import e2e_scores
from rankwise_article.__main__ import main


class Done(NamedTuple):
    """What a call left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.stdout)


@pytest.fixture
def article(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return call


PREDICTIONS = "MR\toutput\nname[The Mill]\tThe Mill is a pub.\nname[Vaults]\tVaults is a bar.\n"
REFERENCES = 'mr,ref\nname[The Mill],The Mill is a pub.\nname[The Mill],A pub.\nname[Vaults],"Vaults, a bar."\n'


@pytest.fixture
def e2e_files(tmp_path):
    (tmp_path / "p.tsv").write_text(PREDICTIONS)
    (tmp_path / "r.csv").write_text(REFERENCES)
    return ("--predictions", tmp_path / "p.tsv", "--references", tmp_path / "r.csv")


@needs_java
def test_e2e_prints_one_document(e2e_files, article):
    done = article("score", "e2e", *e2e_files, "--json")
    assert done.code == 0
    assert list(done.document) == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "count"]
    assert done.document["count"] == 2
    assert all(0 < done.document[name] == round(done.document[name], 4) for name in ("BLEU", "METEOR", "ROUGE_L"))


def test_e2e_without_java_says_in_one_line_what_is_missing(e2e_files, article, monkeypatch):
    monkeypatch.setattr(e2e_scores.shutil, "which", lambda name: None)
    done = article("score", "e2e", *e2e_files)
    assert done.code == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning RA236: METEOR, ROUGE_L, CIDEr")
    assert "install" in line
    assert "None" in done.stdout
    assert "BLEU" in done.stdout
    assert article("score", "e2e", *e2e_files, "--json").document["CIDEr"] is None


def test_gsm8k_prints_one_document(tmp_path, article):
    (tmp_path / "p.jsonl").write_text('{"prediction": "A: 18"}\n{"prediction": "none"}\n')
    (tmp_path / "r.jsonl").write_text('{"answer": "#### 18"}\n{"answer": "#### 3"}\n')
    files = ("--predictions", tmp_path / "p.jsonl", "--references", tmp_path / "r.jsonl")
    done = article("score", "gsm8k", *files, "--json")
    assert (done.code, done.document) == (0, {"correct": 1, "total": 2})
    told = article("score", "gsm8k", *files)
    assert told.stdout.split() == ["correct", "1", "total", "2"]
    assert told.stderr.startswith("warning RA235: 1 of 2 predictions hold no number")


def test_vicuna_takes_several_files(tmp_path, article):
    rows = [
        {"answer1_id": "r", "answer2_id": "s", "score": [8, 6]},
        {"answer1_id": "s", "answer2_id": "r", "score": [6, 6]},
    ]
    files = []
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"score": [-1, -1]}))
        files += ["--ratings", path]
    (tmp_path / "answers.jsonl").write_text('{"answer_id": "r"}\n')
    done = article("score", "vicuna", *files, "--reference-answers", tmp_path / "answers.jsonl", "--json")
    assert done.document == {"reference_first": 75.0, "system_first": 100.0, "mean": 87.5, "failed": 2}
    assert "RA241: 2 of 4" in done.stderr


def test_mistakes_are_one_line_and_exit_2(article, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = article("score", "e2e", "--predictions", "none.tsv", "--references", "none.csv", "--json")
    assert done.code == 2
    assert done.document["error"]["code"] == "RW201"
    assert "none.tsv" in done.document["error"]["message"]
    assert len(done.stderr.splitlines()) == 1
    for arguments, said in (
        (["e2e"], "--predictions, --references"),
        (["vicuna", "--ratings", "r"], "--reference-answers"),
        (["bleu"], "choose from e2e, gsm8k, vicuna"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["score", *arguments])
        assert said in capsys.readouterr().err.replace("'", "")
