# SPDX-License-Identifier: Apache-2.0
"""Every layout trains as one process does, and as megatron-core's own optimizer does; checkpoints move between them.

Float32 on CPU. The scores of these runs keep gaps at the edges of their selections: no key swaps place in any of them.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from programs import finish, read_results, start_program
from torch.utils.cpp_extension import get_default_build_root

WORKER = str(Path(__file__).with_name("parallel_worker.py"))
STEPS = 20
SAVED = 10
TENSOR = ("--tensor-model-parallel-size", "2")
CONTEXT = ("--context-parallel-size", "2")
SHORT = 4  # steps of the layouts that combine what others have for all of them
ALONE = ("--micro-batch-size", "2")  # of one data-parallel rank: two micro-batches a step, as of two ranks

# Two minutes of compiling: done once by the first run with --offload-optimizer on a machine, and not by these tests.
OFFLOAD = Path(get_default_build_root(), f"py{sys.version_info.major}{sys.version_info.minor}_cpu").joinpath(
    "cpu_adam", "cpu_adam.so"
).is_file()  # fmt: skip
COMPILED = pytest.mark.skipif(not OFFLOAD, reason="DeepSpeedCPUAdam has not been compiled on this machine")


def run_worker(launches: list[tuple[int, dict]]) -> dict:
    """Results of the cases of all launches, (ranks, cases) each, one after another."""
    return read_results(finish(start_program(WORKER, json.dumps(launches)), seconds=500))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def results(prepared, folder) -> dict:
    def case(name: str, *flags: str, load: str | None = None, **more) -> dict:
        argv = [
            *prepared.flags(folder / name), "--global-batch-size", "4", "--train-iters", str(STEPS),
            "--load", str(folder / (load or name)), "--save-interval", str(SAVED), "--eval-interval", "1000",
            "--eval-iters", "1", "--lr", "1e-3", "--clip-grad", "0.5", "--log-interval", "1000",
            "--hang-timeout-seconds", "120", "--micro-batch-size", "1", *flags,
        ]  # fmt: skip
        (folder / name).mkdir(exist_ok=True)
        return {"argv": argv, **more}

    def stage(number: int) -> tuple[str, str]:
        return "--zero-stage", str(number)

    def moved(name: str, load: str, *flags: str) -> dict:
        # A run that began at the checkpoint of step 10 of another layout's run.
        return case(name, *flags, load=load, start_at=SAVED, dump=str(folder / f"{name}.pt"))

    def short(name: str, *flags: str, steps: int = SHORT, **more) -> dict:
        return case(name, "--exit-interval", str(steps), *flags, **more)

    one = {"one": case("one", *ALONE), "one_again": moved("one_again", "one", *ALONE)}
    one |= {
        "left_after_nan": short("left_after_nan", *ALONE, steps=3, nan_at=[0, 3, 3], resume_at=3),
        "nan_on_the_way": short("nan_on_the_way", *ALONE, steps=6, nan_at=[0, 3, 3]),
        "put_off": short("put_off", *ALONE, "--save-interval", "3", steps=6, nan_at=[0, 3, 4]),
        "huge": short("huge", *ALONE, "--lr", "1e30", "--save-interval", "1", steps=3, nan_at=[0, 0, 0]),
        "nan_weights": short("nan_weights", *ALONE, "--save-interval", "2", steps=3, nan_at=["weights", 3, 3]),
        "huge_at_the_end": case(
            "huge_at_the_end", *ALONE, "--lr", "1e30", "--save-interval", "1", "--train-iters", "3", nan_at=[0, 0, 0]
        ),
    }  # fmt: skip
    two = {f"zero{n}": case(f"zero{n}", *stage(n), resume_at=SAVED) for n in (0, 1, 2, 3)}
    two |= {
        "tp": case("tp", *TENSOR, *ALONE),
        "cp": case("cp", *CONTEXT, *ALONE),
        "one_to_dp2": moved("one_to_dp2", "one", *stage(2)),
    }
    two |= {f"cp_zero{n}": short(f"cp_zero{n}", *CONTEXT, *ALONE, *stage(n)) for n in (0, 2, 3)}
    two |= {f"nan_zero{n}": short(f"nan_zero{n}", *stage(n), steps=4, nan_at=[1, 2, 2]) for n in (0, 2, 3)}
    if OFFLOAD:
        two |= {f"offload_zero{n}": short(f"offload_zero{n}", *stage(n), "--offload-optimizer") for n in (1, 2, 3)}
        two["nan_offload"] = short("nan_offload", "--offload-optimizer", steps=4, nan_at=[1, 2, 2])
    parallel = (*TENSOR, "--sequence-parallel")
    four = {f"sp_zero{n}": case(f"sp_zero{n}", *parallel, *stage(n)) for n in (0, 1, 2, 3)}
    four |= {
        "mcore": case("mcore", *parallel, by="mcore"),
        "sp_cp": case("sp_cp", *parallel, *CONTEXT, *ALONE),
        "sp_cp_zero2": short("sp_cp_zero2", *parallel, *CONTEXT, *ALONE, *stage(2)),
        "sp_cp_zero3": short("sp_cp_zero3", *parallel, *CONTEXT, *ALONE, *stage(3)),
        "sp_again": moved("sp_again", "sp_zero2", *parallel, *stage(2)),
        "one_to_sp": moved("one_to_sp", "one", *parallel, *stage(1)),
    }
    last = {"sp_to_one": moved("sp_to_one", "sp_zero2", *stage(1), *ALONE)}
    done = run_worker([(1, one), (2, two), (4, four), (1, last)])
    print({name: round(result["seconds"], 1) for name, result in done.items()})
    return done


def steps_of(results, layout) -> list[list[float]]:
    """[loss, gradient norm] of the run's steps, without its validations at the start and the end."""
    records = results[layout]["records"]
    records = records[: records.index("resumed")] if "resumed" in records else records
    return [record for record in records if record[1] != 0.0]


LAYOUTS = ["zero0", "zero1", "zero2", "zero3", "tp", "sp_zero0", "sp_zero1", "sp_zero2", "sp_zero3", "mcore"]
LAYOUTS += ["cp", "sp_cp"]
SHORT_LAYOUTS = ["cp_zero0", "cp_zero2", "cp_zero3", "sp_cp_zero2", "sp_cp_zero3"]


@pytest.mark.parametrize(
    ("layout", "steps"), [(n, STEPS) for n in LAYOUTS] + [(n, SHORT) for n in SHORT_LAYOUTS]
    + [pytest.param(f"offload_zero{n}", SHORT, marks=COMPILED) for n in (1, 2, 3)],
)  # fmt: skip
def test_losses_and_gradient_norms_are_those_of_one_process(results, layout, steps):
    found, wanted = steps_of(results, layout), steps_of(results, "one")[:steps]
    assert len(found) == len(wanted) == steps
    for (loss, norm), (want_loss, want_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(want_loss, abs=1e-5)
        assert norm == pytest.approx(want_norm, rel=1e-5, abs=1e-5)
    assert max(norm for _, norm in found) > 0.5, "the clipping must be in force to be compared"
    assert all(math.isfinite(norm) for _, norm in found)


@pytest.mark.parametrize(
    "layout",
    ["tp", "sp_zero0", "sp_zero1", "sp_zero2", "sp_zero3", "sp_cp", "sp_cp_zero2", "sp_cp_zero3"],
)
def test_norm_and_scorer_weights_stay_bitwise_equal_over_tensor_parallel_ranks(results, layout):
    assert results[layout]["shared_weights_are_equal"]


@pytest.mark.parametrize("layout", ["one", "zero0", "zero1", "zero2", "zero3", "sp_zero1", "sp_zero3"])
def test_the_buffers_of_every_save_are_there_after_the_first_step(results, layout):
    assert results[layout]["reserved"] == results[layout]["buffers"] > 10


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_resumes_bitwise(results, stage):
    records = results[f"zero{stage}"]["records"]
    split = records.index("resumed")
    straight, resumed = records[:split], records[split + 1 :]
    assert len(resumed) == STEPS - SAVED + 1  # and the validation at the end
    assert straight[-len(resumed) :] == resumed


@pytest.mark.parametrize("layout", ["zero0", "zero1", "zero2", "zero3", "one_to_dp2", "one_to_sp", "sp_to_one"])
def test_the_flags_of_the_run_that_resumes_hold_and_not_the_checkpoints(results, layout):
    flags = {"betas": [0.8, 0.9], "eps": 1e-6}
    kinds = [(0.0, 1.0), (0.0, 2.0), (0.3, 1.0), (0.3, 2.0)]  # norms, slopes, weights, the scorer's weights
    wanted = [flags | {"weight_decay": decay, "lr_mult": rate} for decay, rate in kinds]
    assert results[layout]["hyperparameters"] == wanted and results[layout]["clip_grad"] == 0.25


def whole(name: str, shards: list[torch.Tensor]) -> torch.Tensor:
    """A parameter from its shards, by what Megatron's layers compute with them."""
    parameter = name.split(":")[0]
    if "linear_fc1" in parameter:  # each shard is [gate; up] of its own columns
        gates, ups = zip(*(shard.tensor_split(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    if "linear_proj" in parameter or "linear_fc2" in parameter:
        return torch.cat(shards, dim=1)
    if "linear_qkv" in parameter or "embedding" in parameter:
        return torch.cat(shards)
    for shard in shards[1:]:
        assert torch.equal(shard, shards[0])
    return shards[0]


@pytest.mark.parametrize(("moved", "source"), [("one_to_dp2", "one_again"), ("one_to_sp", "one_again"),
                                               ("sp_to_one", "sp_again")])  # fmt: skip
def test_a_checkpoint_moves_to_another_layout_bit_by_bit(results, folder, moved, source):
    there, here = torch.load(folder / f"{source}.pt"), torch.load(folder / f"{moved}.pt")
    assert there["steps"] == here["steps"] == [SAVED] * len(here["steps"])
    assert there["shards"].keys() == here["shards"].keys() and any(
        "exp_avg_sq" in name for name in here["shards"]
    )
    for name, shards in here["shards"].items():
        assert torch.equal(whole(name, shards), whole(name, there["shards"][name])), name


@pytest.mark.parametrize(
    ("moved", "straight"),
    [("one_to_dp2", "one"), ("one_to_sp", "one"), ("sp_to_one", "sp_zero2"), ("one_again", "one"),
     ("sp_again", "sp_zero2")],
)  # fmt: skip
def test_a_run_goes_on_in_another_layout(results, moved, straight):
    found, wanted = steps_of(results, moved), steps_of(results, straight)[SAVED:]
    assert len(found) == STEPS - SAVED
    tolerance = 0.0 if moved.endswith("again") else 1e-5
    for (loss, norm), (want_loss, want_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(want_loss, rel=0, abs=tolerance)
        assert norm == pytest.approx(want_norm, rel=0, abs=tolerance)


@pytest.mark.parametrize(
    "layout", ["nan_zero0", "nan_zero2", "nan_zero3", pytest.param("nan_offload", marks=COMPILED)]
)
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_on_any_stage(results, layout):
    result = results[layout]
    assert [math.isfinite(norm) for _, norm in steps_of(results, layout)] == [True, False, True, True]
    first, skipped, third, fourth = result["digests"]
    assert first == skipped and len({first, third, fourth}) == 3
    assert any("step 2: skipped, its gradient is not finite (the loss of rank 1" in line for line in result["lines"])
    wanted = steps_of(results, "nan_zero2")
    for (loss, norm), (want_loss, want_norm) in zip(steps_of(results, layout)[2:], wanted[2:], strict=True):
        assert loss == pytest.approx(want_loss, abs=1e-5) and norm == pytest.approx(want_norm, rel=1e-5)


def test_a_run_that_ends_at_a_skipped_step_is_saved_there(results, folder):
    left = results["left_after_nan"]
    assert not any("no checkpoint" in line for line in left["lines"]) and left["error"] is None
    resumed = left["records"][left["records"].index("resumed") + 1 :]
    assert len(resumed) == 3 and resumed == steps_of(results, "nan_on_the_way")[3:]


def test_a_checkpoint_that_a_skipped_step_puts_off_is_taken_after_it(results, folder):
    (line,) = (line for line in results["put_off"]["lines"] if "no checkpoint" in line)
    assert line == "step 3: no checkpoint after a skipped step: the next good step takes it"
    assert sorted(path.name for path in (folder / "put_off").glob("step_*")) == ["step_00000005", "step_00000006"]


@pytest.mark.parametrize(
    ("name", "why", "saved"),
    [("huge", "every loss was finite", 1), ("huge_at_the_end", "every loss was finite", 1),
     ("nan_weights", "the validation loss is nan too", 2)],
)  # fmt: skip
def test_weights_that_may_be_the_cause_are_not_saved_at_the_end(results, folder, name, why, saved):
    said = [line for line in results[name]["lines"] if "step 3: no checkpoint" in line]
    wanted = f"step 3: no checkpoint after a skipped step: {why}, the weights may be the cause; the newest is of step"
    assert said == [f"{wanted} {saved}"]
    assert (folder / name / "latest").read_text() == f"step_0000000{saved}"
    error = results[name]["error"]
    if name.endswith("at_the_end"):
        assert error.startswith("step 3: the last step was skipped") and "(step 1) after you lower --lr" in error
    else:
        assert error is None
