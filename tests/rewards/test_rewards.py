import json
import math
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest

from grpo_fast.errors import UserError
from grpo_fast.rewards import (
    RESERVED_COLUMNS,
    RewardModel,
    answer_format,
    boxed_answer,
    countdown_equation,
    digits_included,
    digits_ordered,
    final_number,
    gsm8k_answer,
    load_reward,
    soft_answer_format,
    think_format,
)

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("prompt", "completion", "included", "ordered"),
    [
        ("3142>", "1234", 1.0, 1.0),
        ("3142>", "4321", 1.0, 0.0),
        ("3142>", "1243", 1.0, 2 / 3),
        ("3142>", "", 0.0, 0.0),
        ("3142>", "1", 0.25, 0.0),
        ("3142>", "1111", 0.25, 0.25),
        ("3142>", "5678", 0.0, 0.0),  # perfect order of the wrong digits earns nothing
        ("3142>", "12344", 0.8, 0.8),  # one digit too many
        ("3142>", "12>34", 0.8, 0.8 * 2 / 4),
        ("2255>", "2255", 1.0, 1.0),
        ("2255>", "2555", 0.75, 0.75),
    ],
)
def test_partial_rewards_of_sorting(prompt, completion, included, ordered):
    assert digits_included([prompt], [completion]) == [pytest.approx(included)]
    assert digits_ordered([prompt], [completion]) == [pytest.approx(ordered)]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("7", "7", 1),
        ("3 + 4 = 7.", "7", 1),
        ("7 is 3 + 4", "7", 0),
        ("", "7", 0),
        ("so the total is 1,234.50 dollars", "1234.5", 1),
        ("#### 72", "Natalia sold ... #### 72", 1),
        ("#### 72 and not 5", "#### 5", 1),
        ("12 apples #### 5", "#### 5", 1),
        ("-3", "3", 0),
        ("-3", "#### -3", 1),
        ("72", "#### 1,072", 0),
        (".5", "0.5", 1),
        ("it is -.25", "-0.25", 1),
        ("-.25", "25", 0),
        ("\u22123", "-3", 1),
        ("\u22123", "3", 0),
        ("1e3", "1000", 1),
        ("1e-3", "0.001", 1),
        ("1e3", "3", 0),
        ("3,4", "34", 0),
        ("3,4", "4", 0),
        ("1,2001", "1200", 0),
        ("10-3", "-3", 0),
        ("10-3", "3", 0),
        ("pages 10\u201312", "-12", 0),
        ("2", "1/2", 0),
        ("3/2", "1/2", 0),
        ("1/2", "2", 0),
        ("1/2", "0.5", 1),
        (r"\frac{1}{2}", "1/2", 1),
        (r"\frac{1}{2}", "2", 0),
        ("2 1/2", "2.5", 1),
        ("2 1/2", "1/2", 0),
        ("12:30", "4:10", 0),
        ("10", "4:10", 0),
        ("12:30", "30", 0),
        ("at 4:10", "4:10", 1),
        ("123456789012345678901", "123456789012345678902", 0),
        ("123456789012345678901", "#### 123,456,789,012,345,678,901", 1),
        ("0.1234567890123456788", "0.1234567890123456789", 0),
        ("9" * 5000, "9" * 5000, 1),
        ("9" * 5000, "9" * 4999, 0),
        ("2*8", "8", 0),
        ("72%", "72", 1),
        ("7.0", "7", 1),
        ("答案是42。", "42", 1),
        ("\uff17\uff12", "72", 1),
        ("a 5-year-old", "5", 1),
        ("1/0", "0", 0),
        ("so 72 " + "and no other number " * 200, "72", 1),
        ("5" + "7" * 3000, "7" * 1999, 0),
    ],
)
def test_final_number(completion, answer, reward):
    assert final_number(["q"], [completion], answer=[answer]) == [reward]
    assert final_number([[]], [[{"role": "assistant", "content": completion}]], answer=[answer]) == [reward]


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside this checkout")
def test_final_number_reads_every_gsm8k_answer():
    for name, size in (("train", 7473), ("test", 1319)):
        answers = [json.loads(line)["answer"] for line in (GSM8K / f"{name}.jsonl").open(encoding="utf-8")]
        assert len(answers) == size
        finals = [answer.rpartition("####")[2].strip() for answer in answers]
        assert sum(final_number(finals, finals, answer=answers)) == size


def test_weighted_sum_and_none():
    def abstains(prompts, completions, **columns):
        return [None, 1.0]

    model = RewardModel(["digits_included", "exact_answer"], [2.0, 0.5])
    model.functions[1] = abstains
    scored = model(["12>", "12>"], ["12", "1"], {"answer": ["12", "12"]})
    assert scored.total.tolist() == [2.0, 1.5]
    assert scored.each.isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0.0]", "returned 1 rewards for 2 completions"),
        ("return [0.0, float('nan')]", "returned nan for completion 1"),
        ("return [float('inf'), 0.0]", "returned inf for completion 0"),
        ("return ['good', 0.0]", "returned 'good' for completion 0"),
        ("return 1.0", "must return a list of numbers, got float"),
        ("return 'ab'", "must return a list of numbers, got str"),
        ("return [0.0, 1e300]", r"returned 1e\+300 for completion 1"),
        ("return [0.0, 10**400]", "returned 1000000"),
        ("raise SystemExit(0)", "raised SystemExit: 0"),
        ("raise KeyError('a\\nb')", "raised KeyError: 'a"),
        ("return [1 / 0]", r"raised ZeroDivisionError: division by zero \(mine.py, line 2"),
    ],
)
def test_wrong_rewards_are_named(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def mine(prompts, completions, **columns):\n    {body}\n")
    model = RewardModel([f"{tmp_path / 'mine.py'}:mine"], None, on_error="raise")
    with pytest.raises(UserError, match=f"reward function 'mine' {message}.* for the prompt '[ab]'"):
        model(["a", "b"], ["c", "d"], {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_anser", "did you mean 'exact_answer'"),
        ("no_such_module.reward", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("json.no_such_reward", "no callable 'no_such_reward'"),
        ("missing.py:reward", "no such file: missing.py"),
        ("kimi_length", r"kimi_length\(\) is not allowed: write kimi_length\(judge\)"),
        ("soft_overlong(10)", r"write soft_overlong\(max_completion_len, soft_punish_cache\)"),
        ("soft_overlong(10, ten)", r"write soft_overlong\(max_completion_len, soft_punish_cache\)"),
        ("soft_overlong(10, 20)", "must be from 1 to the first"),
    ],
)
def test_unknown_rewards_are_named(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mine(:", "cannot be loaded: SyntaxError"),
        ("import no_such_module_here", "No module named 'no_such_module_here'"),
        ("mine = 3", "no callable 'mine'"),
    ],
)
def test_broken_reward_files_are_named(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_reward(f"{tmp_path / 'broken.py'}:mine")


def test_a_reward_file_imports_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 2.0")
    (tmp_path / "with_neighbour.py").write_text(
        "from neighbour_of_mine import VALUE\ndef mine(prompts, **columns):\n    return [VALUE] * len(prompts)"
    )
    model = RewardModel([f"{tmp_path / 'with_neighbour.py'}:mine"], None)
    assert model(["a"], ["b"], {}).total.item() == 2


def reward_file(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"def score(prompts, **columns):\n    return [{value}] * len(prompts)\n")
    return f"{path}:score"


def test_two_reward_files_may_have_functions_of_one_name(tmp_path):
    maths, code = reward_file(tmp_path / "maths.py", 1.0), reward_file(tmp_path / "code.py", 2.0)
    model = RewardModel([maths, "exact_answer", code, "kimi_length(maths.score)"], None)
    assert model.names == ["maths.score", "exact_answer", "code.score", "kimi_length"]
    assert model(["q"], ["a"], {"answer": ["b"], "completion_ids": [[1]]}, 1).each.tolist() == [[1, 0, 2, 0]]
    assert RewardModel([maths], None).names == ["score"]


def test_reward_names_take_as_much_of_their_source_as_tells_them_apart(tmp_path):
    sources = [reward_file(tmp_path / folder / "rewards.py", 1.0) for folder in ("easy", "hard")]
    assert RewardModel(sources, None).names == ["easy.rewards.score", "hard.rewards.score"]
    (tmp_path / "mine.py").write_text("def exact_answer(prompts, **columns):\n    return [0.5] * len(prompts)\n")
    mine = f"{tmp_path / 'mine.py'}:exact_answer"
    assert RewardModel(["exact_answer", mine], None).names == ["exact_answer", "mine.exact_answer"]
    lengths = ["exact_answer", "final_number", "kimi_length(exact_answer)", "kimi_length(final_number)"]
    assert RewardModel(lengths, None).names == lengths


def test_a_reward_function_that_is_there_twice_is_refused():
    with pytest.raises(UserError, match="'exact_answer' is listed 2 times; set its weight in reward_weights"):
        RewardModel(["exact_answer", "exact_answer"], None)


def test_reward_files_with_different_neighbours_of_one_name_are_refused(tmp_path):
    """Otherwise the second file would import the first one's."""
    sources = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared_helper.py").write_text(f"VALUE = {name!r}")
        (tmp_path / name / "rewards.py").write_text(f"import shared_helper\ndef {name}(prompts, **columns): ...\n")
        sources.append(f"{tmp_path / name / 'rewards.py'}:{name}")
    RewardModel(sources[:1], None)
    with pytest.raises(
        UserError, match=r"first/shared_helper.py and .*second/shared_helper.py are modules of the same name"
    ):
        RewardModel(sources, None)


def test_signatures_and_columns_are_checked_before_anything_is_sampled():
    model = RewardModel(["exact_answer"], None)
    model.check_columns(["answer", "level"])
    with pytest.raises(UserError, match=r"reward function 'exact_answer'.*missing a required argument: 'answer'"):
        model.check_columns(["level"])


class Counted:
    """A reward function that is an object, whose method has a ``self``."""

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completions, **columns):
        self.seen.append((prompts, completions, columns))
        return [0.0] * len(prompts)

    def method(self, prompts, completions, **columns):
        return self(prompts, completions, **columns)


@pytest.mark.parametrize("bound", [False, True], ids=["object", "method"])
def test_a_column_may_have_any_name(bound):
    model, counted, said = RewardModel(["exact_answer", "kimi_length(exact_answer)"], None), Counted(), []
    model.functions[0], model.warn = counted.method if bound else counted, said.append
    names = ["self", "index", "columns", "name", "function", "the question", "prompts", "completions", "completion_ids"]
    columns = {name: [f"{name} 1", f"{name} 2"] for name in [*names, "correct", "reward_timeout", "signature"]}
    model.check_columns(columns)
    model.check_columns(columns)
    model(["p", "p"], ["a", "b"], {**columns, "completion_ids": [[1], [1, 2]]}, num_generations=2)
    ((prompts, completions, seen),) = counted.seen
    assert (prompts, completions, seen.pop("completion_ids")) == (["p", "p"], ["a", "b"], [[1], [1, 2]])
    assert seen == {name: columns[name] for name in columns if name not in ("self", *RESERVED_COLUMNS)}
    taken = {"exact_answer": ["self", *RESERVED_COLUMNS], "kimi_length": ["correct", *RESERVED_COLUMNS]}
    assert sorted(text.split(", whose")[0] for text in said) == sorted(
        f"the dataset's column {column!r} does not reach the reward function {name!r}"
        for name, columns in taken.items() for column in columns
    )  # fmt: skip


def test_rendered_prompts_go_to_the_functions_that_take_them():
    seen = {}

    def strict(prompts, completions, completion_ids, answer):
        return [0.0]

    def named(prompts, completions, completion_ids, answer, rendered_prompts):
        seen["named"] = rendered_prompts
        return [0.0]

    def open_ended(prompts, completions, **columns):
        seen["open-ended"] = columns["rendered_prompts"]
        return [0.0]

    model = RewardModel(["exact_answer", "final_number", "boxed_answer"], None)
    model.functions = [strict, named, open_ended]
    model.check_columns(["answer"])
    model(["p"], ["c"], {"answer": ["1"], "completion_ids": [[1]], "rendered_prompts": ["<s>p"]})
    assert seen == {"named": ["<s>p"], "open-ended": ["<s>p"]}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("exact_answer", {"answer": None}),
        ("countdown_equation", {"nums": [1], "target": None}),
        ("math_answer", {}),
        ("final_number", {"answer": math.nan}),
    ],
)
def test_a_missing_answer_is_named_before_anything_is_sampled(name, row):
    column = "target" if "nums" in row else "answer"
    rows = [
        {"prompt": "p", "nums": [1], column: "1"},
        {"prompt": [{"role": "user", "content": "How?"}], "nums": [1], **row},
    ]
    message = f"the row with the prompt 'How.' has no {column!r}, which the reward function {name!r} needs; add it"
    with pytest.raises(UserError, match=message):
        RewardModel([name], None).check_rows(rows, "data")
    own = RewardModel([name], None)
    own.functions = [lambda prompts, completions, answer=None, **columns: [None]]
    own.check_rows(rows, "data")


class Opaque:
    """What is neither JSON nor immutable, such as an image."""

    def __init__(self, pixels):
        self.pixels = pixels


COLUMNS = {
    "a list": [1, 2],
    "a dictionary": {"inputs": 1},
    "lists in lists": [[1, 2], [3, [4, [5]]]],
    "lists in dictionaries": {"inputs": [1, {"value": [2]}], "outputs": {"first": {"second": [3]}}},
    "a set in a tuple": ({1, 2}, [3]),
    "a dictionary of a kind of its own": OrderedDict(cases=[1]),
    "an array": numpy.arange(3),
    "an object": Opaque([[1, 2]]),
}


def spoil(value):
    """Change everything in `value`, from the inside out."""
    if isinstance(value, dict):
        for part in value.values():
            spoil(part)
        value["spoilt"] = True
    elif isinstance(value, (list, tuple)):
        for part in value:
            spoil(part)
        if isinstance(value, list):
            value.append("spoilt")
    elif isinstance(value, set):
        value.add("spoilt")
    elif isinstance(value, numpy.ndarray):
        value += 1
    elif isinstance(value, Opaque):
        spoil(value.pixels)


@pytest.mark.parametrize("value", COLUMNS.values(), ids=COLUMNS)
def test_reward_functions_get_copies_at_any_depth(value):
    """Neither another function, nor another sample of the group, nor the next batch sees what a function changes."""
    seen = []

    def spoiling(prompts, completions, column, completion_ids, **columns):
        for index, given in enumerate(column):
            seen.append(pickle.dumps((given, prompts[index], completions[index], completion_ids[index])))
            for part in (given, prompts[index], completions[index], completion_ids[index]):
                spoil(part)
        prompts.clear()
        return [1.0] * len(column)

    model = RewardModel(["exact_answer", "final_number"], None)
    model.functions = [spoiling, spoiling]
    prompts = [[{"role": "user", "content": [{"type": "text", "text": "q"}]}]] * 2
    arguments = prompts, ["a", "b"], {"column": [value] * 2, "completion_ids": [[1, 2]] * 2}
    before = pickle.dumps(arguments)
    for _ in range(2):
        assert model(*arguments).total.tolist() == [2, 2]
    assert len(seen) == 8
    assert len(set(seen)) == 2  # those of the two samples
    assert pickle.dumps(arguments) == before


def test_a_column_that_cannot_be_copied_is_named():
    model = RewardModel(["exact_answer"], None)
    model.functions = [lambda prompts, **columns: [1.0] * len(prompts)]
    with pytest.raises(UserError, match="'exact_answer' could not be given a copy of column 'file': cannot pickle"):
        model(["q"], ["a"], {"file": [sys.stdout]})


def test_all_none_is_no_reward():
    model = RewardModel(["exact_answer"], None)
    model.functions = [lambda prompts, completions, **columns: [None, 0.5]]
    scored = model(["a", "b"], ["c", "d"], {})
    assert scored.total.isnan().tolist() == [True, False]


def test_dotted_path():
    assert load_reward("grpo_fast.rewards.final_number") is final_number


def test_unknown_metric_is_named():
    with pytest.raises(UserError, match="eval_metric='accuracy' is not one of reward_funcs: exact_answer"):
        RewardModel(["exact_answer"], None).index("accuracy")


def scored(function, completion, prompt="q", **columns):
    return function([prompt], [completion], **{name: [value] for name, value in columns.items()})[0]


@pytest.mark.parametrize(
    ("completion", "strict", "soft", "think"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1, 1),
        ("<think>a\nb</think>\n \n<answer>b</answer>\n", 1, 1, 1),
        ("First: <think>a</think> <answer>b</answer>", 1, 1, 0),
        ("<think>a</think> so <answer>b</answer>", 0, 1, 1),
        ("<think>a</think> <answer>b</answer> and more", 0, 1, 1),
        ("<think></think> <answer>b</answer>", 0, 1, 1),
        ("<think>a</think> <answer> </answer>", 0, 1, 1),
        ("a</think> <answer>b</answer>", 0, 1, 0),
        ("<think>a<think>b</think> <answer>b</answer>", 0, 1, 0),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", 0, 1, 1),
        ("<answer>b</answer> <think>a</think>", 0, 0, 0),
        ("<think>a</think> <answer>b", 0, 0, 1),
        ("<think>a", 0, 0, 0),
        ("b", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_formats(completion, strict, soft, think):
    assert scored(answer_format, completion) == strict
    assert scored(soft_answer_format, completion) == soft
    assert scored(think_format, completion) == think


def test_a_prompt_may_open_the_thoughts():
    prompt = "What is 3 + 4?\nAssistant: <think>"
    assert scored(answer_format, "a</think> <answer>7</answer>", prompt) == 1
    assert scored(think_format, "a</think> 7", prompt) == 1
    assert scored(answer_format, "<think>a</think> <answer>7</answer>", prompt) == 0


@pytest.mark.parametrize(
    ("equation", "right"),
    [
        ("(3 + 5) * 4 - 8", True),
        ("4*(5+3)-8", True),
        ("3 * 4 * (8 - 5) - 12", False),  # a number that was not given
        ("3 * 8", False),  # not all of them
        ("(3 + 5) * 4 - 8 + 3 - 3", False),  # one of them three times
        ("3 + 5 + 4 + 8", False),  # 20
        ("24", False),
        ("(3 + 5) * 4 - 8 = 24", False),
        ("3 ** 5 - 4 * 8", False),
        ("3 // 5 + 4 * 8", False),
        ("-3 + 5 * 4 + 8", False),
        ("__import__('os').getpid()", False),
        ("(3 + 5) * 4 - 8 # 24", False),
        ("3 / (5 - 5)", False),
        ("(3 + 5", False),
        ("(" * 140 + "3" + ")" * 140, False),
        ("9**9**9**9", False),
        ("", False),
    ],
)
def test_countdown(equation, right):
    text = f"<think>3 + 5</think> <answer> {equation} </answer>"
    assert scored(countdown_equation, text, nums=[3, 5, 4, 8], target=24) == right


def test_countdown_is_exact_and_needs_the_tags():
    assert scored(countdown_equation, "<answer>8 / (3 - 8 / 3)</answer>", nums=[3, 3, 8, 8], target=24) == 1
    assert scored(countdown_equation, "<answer>1 / 3 * 3</answer>", nums=[1, 3, 3], target=1) == 1
    assert scored(countdown_equation, "8 / (3 - 8 / 3)", nums=[3, 3, 8, 8], target=24) == 0
    assert scored(countdown_equation, "<answer>1+2</answer> <answer>2+2</answer>", nums=[1, 2], target=3) == 0


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"so \boxed{\dfrac{1} {2}}.", r"the half, \boxed{\frac{1}{2}}", True),
        (r"\boxed{1} then \boxed{2}", "2", True),
        (r"\boxed{1} then \boxed{2}", "1", False),
        (r"\boxed{1} then \boxed{2", "1", True),
        (r"\boxed{\left(1,\,2\right)}", "(1, 2)", True),
        ("2", "2", False),
        ("", "2", False),
        (r"\boxed 5", "5", True),
        (r"$\boxed 5$.", "5", True),
        (r"\boxed 15", "5", False),
        (r"\fbox{5}", "5", True),
        (r"\boxed{7.0}", "7", True),
        (r"\boxed{7}", "7.0", True),
        (r"\boxed{7.1}", "7", False),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{.5}", "0.5", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}", True),
        (r"\boxed{[0, 1\}}", r"[0,1\}", True),
        (r"\boxed{[0, 1\}}", "[0,1", False),
        (r"\boxed{\leftarrow}", "arrow", False),
        (r"\boxed{\rightarrow}", "arrow", False),
        (r"\boxed{arrow}", "arrow", True),
        (r"\boxed{\leftarrow}", r"\leftarrow", True),
        (r"\boxed{3,4}", "34", False),
        (r"\boxed{10-3}", "-3", False),
        (r"\boxed{123456789012345678901}", "123456789012345678902", False),
        (r"\boxedfoo{5}", "5", False),
        (r"\boxed{\text{even}}", r"\text{even}", True),
    ],
)
def test_boxed_answer(completion, answer, right):
    assert scored(boxed_answer, completion, answer=answer) == right


def test_gsm8k_answer_needs_the_mark():
    assert scored(gsm8k_answer, "it is #### 1,072", answer="so #### 1072") == 1
    assert scored(gsm8k_answer, "it is 1072", answer="so #### 1072") == 0
    assert scored(gsm8k_answer, "it is #### 72", answer="so #### 1072") == 0


def test_kimi_length():
    """By hand: lengths 2, 4, 10 make 0.5, 0.25, -0.5; the third group's lengths are equal."""
    model = RewardModel(["exact_answer", "kimi_length(exact_answer)"], [1.0, 0.5])
    model.check_columns(["answer"])
    ids = [[0] * length for length in (2, 4, 10, 2, 4, 10, 5, 5, 5)]
    completions = ["1", "1", "1", "2", "2", "2", "1", "2", "1"]
    prompts = ["q"] * 3 + ["r"] * 3 + ["s"] * 3
    got = model(prompts, completions, {"answer": ["1"] * 9, "completion_ids": ids}, 3)
    assert got.each[:, 1].tolist() == [0.5, 0.25, -0.5, 0, 0, -0.5, 0, 0, 0]
    assert got.total.tolist() == [1.25, 1.125, 0.75, 0, 0, -0.25, 1, 0, 1]


def test_kimi_length_keeps_neighbouring_groups_of_one_prompt_apart():
    """A prompt that comes twice in a batch, as it does at the end of a pass over the data."""
    model = RewardModel(["exact_answer", "kimi_length(exact_answer)"], None)
    ids = [[0] * length for length in (2, 4, 20, 40)]
    got = model(["q"] * 4, ["1"] * 4, {"answer": ["1"] * 4, "completion_ids": ids}, 2)
    assert got.each[:, 1].tolist() == [0.5, -0.5, 0.5, -0.5]


def test_kimi_length_needs_its_judge():
    with pytest.raises(UserError, match="needs 'final_number' among the functions"):
        RewardModel(["exact_answer", "kimi_length(final_number)"], None)


def test_kimi_length_has_no_value_where_its_judge_has_none():
    model = RewardModel(["exact_answer", "kimi_length(exact_answer)"], None)
    model.functions[0] = lambda prompts, completions, **columns: [None, 1.0]
    got = model(["q", "q"], ["a", "b"], {"completion_ids": [[1], [1, 2, 3]]}, 2)
    assert got.each[:, 1].tolist() == pytest.approx([math.nan, -0.5], nan_ok=True)


def test_soft_overlong():
    """By hand: nothing up to 6 tokens, then a quarter for each, and no more than 1."""
    reward = load_reward("soft_overlong(10, 4)")
    ids = [[0] * length for length in (0, 6, 7, 8, 9, 10, 11)]
    assert reward(ids, ids, completion_ids=ids) == [0, 0, -0.25, -0.5, -0.75, -1, -1]
