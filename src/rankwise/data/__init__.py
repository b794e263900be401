"""Training data: read and check rows, format them with a chat template, and tokenize them.

rows = read_rows("train.jsonl")                             # every row checked, bad ones named by line
encoded = encode_rows(rows, tokenizer, max_length=1024)     # input_ids and labels, and a report
"""

from rankwise.data.encoding import Encoded, EncodingReport, Preview, encode_rows, first_good_row, preview_row
from rankwise.data.files import kind_of, read_file, read_text
from rankwise.data.formats import BadRow, rows_from_records
from rankwise.data.objectives import encode_preferences
from rankwise.data.readers import check_there, limited, read_rows, stdlib_rows, warn_of_overlap
from rankwise.data.rows import Row, Rows
from rankwise.data.templates import Segment, chat_text, read_template

__all__ = [
    "BadRow",
    "Encoded",
    "EncodingReport",
    "Preview",
    "Row",
    "Rows",
    "Segment",
    "chat_text",
    "check_there",
    "encode_preferences",
    "encode_rows",
    "first_good_row",
    "kind_of",
    "limited",
    "preview_row",
    "read_file",
    "read_rows",
    "read_template",
    "read_text",
    "rows_from_records",
    "stdlib_rows",
    "warn_of_overlap",
]
