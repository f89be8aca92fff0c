"""Files of questions and answers, and the configuration of a run on them."""

import json

from grpo_fast.config import GRPOConfig

GSM8K_ROWS = [
    {"question": "How many?", "answer": "3 * 400 = <<3*400=1200>>1,200 in all.\n#### 1,200"},
    {"question": "How much colder?", "answer": "5 less.\n#### -5"},
    {"question": "How much?", "answer": "Half of it.\n####  $2.50"},
]


def config(name, **fields):
    return GRPOConfig("m", dataset_name=str(name), reward_funcs=["exact_answer"], **fields)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
