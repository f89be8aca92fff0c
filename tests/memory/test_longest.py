"""``grpo-fast plan --longest``: the search for the longest answers, the shapes of models, and the estimate of time."""

import importlib.util
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from grpo_fast.cli import main
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory import longest
from grpo_fast.memory.longest import CHOICES, HOST, TRAINED, best, longest_answers
from grpo_fast.memory.plan import GIB, longest_answer, plan_memory
from grpo_fast.memory.shapes import SHAPES, known_config, known_shape
from grpo_fast.memory.step_time import GPUS, estimate_step, find_gpu
from grpo_fast.memory.switches import possible_changes
from grpo_fast.memory.trace import Tracer
from support.plans import ROOT

MODEL = "Qwen/Qwen2.5-0.5B"
VRAM = 6 * GIB


@pytest.fixture(scope="module")
def tracer():
    return Tracer(known_config(MODEL))


@pytest.fixture
def few(monkeypatch):
    """A search of few settings, which takes few traces; the long tests search all of them."""
    monkeypatch.setattr(longest, "TRAINED", {"LoRA": TRAINED["LoRA"], "QLoRA (4-bit)": TRAINED["QLoRA (4-bit)"]})
    monkeypatch.setattr(longest, "HOST", {})
    monkeypatch.setattr(longest, "CHOICES", (({"gradient_checkpointing": True}, {}),))


@pytest.fixture
def traced(few, tracer, monkeypatch):
    """The command reuses the traces of the other tests."""
    monkeypatch.setattr("grpo_fast.memory.longest_report.Tracer", lambda model_config: tracer)


@pytest.fixture(scope="module")
def config():
    return GRPOConfig(model_name_or_path=MODEL, dataset_name="any", reward_funcs=["any"])


@pytest.fixture(scope="module")
def found(config, tracer):
    return longest_answers(config, tracer, VRAM, 512)


# Numbers of parameters as the models' own pages give them; tied weights count once.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_built_in_shape_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_built_in_shape_makes_a_configuration(name):
    config = known_config(name)
    assert config.dtype == torch.bfloat16
    assert config.max_position_embeddings == SHAPES[name].positions


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("unsloth/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-4B-Thinking-2507", "Qwen/Qwen3-4B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-pt"),
        ("somebody/Qwen3-8B", None),
        ("Qwen/Qwen3-9B", None),
    ],
)
def test_known_shape(name, key):
    assert known_shape(name) == key


def check_longest(config, tracer, each):
    """Every number is checked by the plan itself; one percent more does not fit."""
    plan = plan_memory(each.config, tracer.model_config, 512, tracer)
    assert plan.fits(VRAM)
    assert plan == each.plan
    assert each.config.max_completion_length == each.answer <= min(each.by_memory, 32_768 - 512)
    if each.answer < 32_768 - 512:
        more = int(1.01 * each.answer)
        longer = replace(
            each.config, max_completion_length=more, max_tokens_per_microbatch=512 + more,
            max_tokens_per_generation_batch=512 + more,
        )  # fmt: skip
        assert not plan_memory(longer, tracer.model_config, 512, tracer).fits(VRAM)


def test_longest_answers_of_few_settings_fit_and_longer_ones_do_not(few, config, tracer):
    found = longest_answers(config, tracer, VRAM, 512)
    assert [each.trained for each in found] == ["LoRA", "QLoRA (4-bit)"]
    for each in found:
        check_longest(config, tracer, each)
    assert 0 < found[0].by_memory < found[1].by_memory
    assert best(found).trained == ("LoRA" if found[0].answer >= 0.98 * found[1].answer else "QLoRA (4-bit)")


@pytest.mark.long
def test_longest_answers_fit_and_longer_ones_do_not(config, tracer, found):
    assert [each.trained for each in found] == [*TRAINED, *HOST]
    for each in found:
        check_longest(config, tracer, each)
    memory = {each.trained: each.by_memory for each in found}
    assert memory["all weights"] < memory["LoRA"] < memory["QLoRA (4-bit)"] <= memory["QLoRA, layers on host"]


@pytest.mark.long
def test_longest_answers_are_at_least_those_of_any_single_switch(config, tracer, found):
    """The search finds no less than the one-switch-at-a-time table of ``grpo-fast plan``."""
    start = replace(config, dtype="bfloat16", max_completion_length=512, max_tokens_per_microbatch=1024)
    for changes in possible_changes(start, 512).values():
        changed = replace(start, **changes)
        alone = longest_answer(changed, tracer, VRAM, 512)
        assert best(found).by_memory >= 0.98 * alone, changes


@pytest.mark.long
def test_longest_answers_take_no_switch_that_is_not_needed(config, tracer):
    """With plenty of memory, no switch is set; the choices' last settings are the defaults."""
    found = longest_answers(config, tracer, 2000 * GIB, 512)
    assert all(each.answer == 32_768 - 512 for each in found)
    assert all(each.switches == {} for each in found if each.trained in TRAINED)
    # A quarter of the layers, the fewest that are tried.
    assert found[-1].switches == {"layers_on_host": 6, "gradient_checkpointing": True}
    assert best(found).trained == "all weights"
    assert all(choice[-1] == {} for choice in CHOICES)


@pytest.mark.long
def test_longest_answers_of_a_device_without_room(config, tracer):
    found = longest_answers(config, tracer, 2 * GIB, 512)
    assert found[0].answer == 0
    assert found[0].plan is None


@pytest.mark.long
def test_best_takes_layers_on_host_only_if_nothing_else_fits(found):
    assert best(found).trained in TRAINED
    nothing = [replace(each, answer=0) if each.trained in TRAINED else each for each in found]
    assert best(nothing).trained in HOST


def test_longest_command_writes_a_recipe_that_fits(traced, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["plan", "--longest", "--vram=6GiB", "--model", MODEL]
    assert main(command) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "assumed, not measured" in output
    recipe = tmp_path / "Qwen2.5-0.5B-6GiB.yaml"
    fields = yaml.safe_load(recipe.read_text())
    assert "dataset_name" not in fields
    assert f"answers of up to {fields['max_completion_length']:,} tokens" in recipe.read_text()
    assert (tmp_path / "Qwen2.5-0.5B-6GiB.png").stat().st_size > 10_000
    assert main(["plan", str(recipe), "--vram=6GiB"]) == 0
    line = f"Longest answer that fits with these settings: {fields['max_completion_length']:,} tokens"
    assert line in " ".join(capsys.readouterr().out.split())
    assert main(command) == 2
    assert "already exists; choose another file with --output" in capsys.readouterr().err


def test_longest_command_keeps_the_fields_of_a_complete_configuration(traced, capsys, tmp_path):
    given = ["--dataset_name=rows.jsonl", "--reward_funcs=[accuracy]", "--learning_rate=3e-6"]
    written = tmp_path / "mine.yaml"
    assert main(["plan", "--longest", "--vram=6GiB", "--model", MODEL, *given, "--output", str(written)]) == 0
    fields = yaml.safe_load(written.read_text())
    assert fields["dataset_name"] == "rows.jsonl"
    assert fields["reward_funcs"] == ["accuracy"]
    assert fields["learning_rate"] == 3e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu=H100"], "--output and --gpu belong to --longest"),
        (["--longest", "--output=chart.png"], "--output='chart.png' is not allowed: it must end in .yaml or .yml"),
        (["--longest", "--output=nowhere/x.yaml"], "--output='nowhere/x.yaml': the folder 'nowhere' does not exist"),
        (
            ["--longest", "--model=random-llama"],
            "--prompt_tokens=512 leaves no room for an answer in the 64 positions of random-llama; set it lower",
        ),
        (["--longest", "--gpu=H1"], "--gpu='H1' is not allowed: it must be one of T4, L4"),
    ],
)
def test_longest_command_refuses_wrong_options(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--vram=6GiB", "--model", MODEL, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_step_time_of_a_training_bound_by_arithmetic(config, tracer):
    """By hand: products of 2 flops a parameter and token, one forward and a backward of twice that."""
    plain = replace(config, dtype="bfloat16", max_completion_length=3584, max_tokens_per_microbatch=4096)
    text, plan = known_config(MODEL), plan_memory(plain, tracer.model_config, 512, tracer)
    time = estimate_step(plain, text, plan, 512, "H100")
    sequence, rate = 4096, 0.4 * GPUS["H100"].tflops * 1e12
    products = 3 * 2 * plan.parameters * sequence
    attention = 3.5 * 2 * sequence**2 * text.num_attention_heads * 64 * text.num_hidden_layers
    assert time.training == pytest.approx(plain.generation_batch_size * (products + attention) / rate)
    slower = estimate_step(plain, text, plan, 512, "T4")
    assert slower.training == pytest.approx(time.training * GPUS["H100"].tflops / GPUS["T4"].tflops)


def test_find_gpu():
    assert find_gpu(80 * 10**9) == "H100"
    assert find_gpu(24 * GIB) == "RTX 4090"
    assert find_gpu(24 * GIB, "l4") == "L4"
    with pytest.raises(UserError, match="must be one of"):
        find_gpu(GIB, "H1000")


def test_plan_extrapolates_to_long_answers(config, tracer):
    """Traces of at most 65,536 tokens say what a trace of 200,000 says."""
    answer = 200_000
    long = replace(
        config, dtype="bfloat16", gradient_checkpointing=True, max_completion_length=answer,
        max_tokens_per_microbatch=512 + answer, max_tokens_per_generation_batch=512 + answer,
    )  # fmt: skip
    plans = [plan_memory(long, tracer.model_config, 512, tracer, interpolated) for interpolated in (False, True)]
    assert plans[0].peak <= plans[1].peak <= 1.01 * plans[0].peak


@pytest.mark.long
def test_longest_table_of_the_documents_is_the_planners(tracer):
    spec = importlib.util.spec_from_file_location("fill_longest", ROOT / "docs" / "fill_longest.py")
    filler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(filler)
    page = filler.PAGE.read_text()
    lines = page.partition(filler.START)[2].partition(filler.END)[0].split("\n")
    row = next(line for line in lines if line.startswith(f"| {MODEL} "))
    assert row.split(" | ")[1 + filler.SIZES.index(16)] == filler.cell(MODEL, 16, tracer)
