# SPDX-License-Identifier: Apache-2.0
"""Every layout trains as one process does, and as megatron-core's own optimizer does; checkpoints move between them.

Float32 on CPU. The scores of these runs keep gaps at the edges of their selections: no key swaps place in any of them.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from programs import finish, start_program

WORKER = str(Path(__file__).with_name("parallel_worker.py"))
STEPS = 20
SAVED = 10
TENSOR = ("--tensor-model-parallel-size", "2")
CONTEXT = ("--context-parallel-size", "2")
ALONE = ("--micro-batch-size", "2")  # of one data-parallel rank: two micro-batches a step, as of two ranks


def run_worker(launches: list[tuple[int, dict]]) -> dict:
    """Results of the cases of all launches, (ranks, cases) each, one after another."""
    output = finish(start_program(WORKER, json.dumps(launches)), seconds=500)
    lines = [line.removeprefix("RESULTS ") for line in output.splitlines() if line.startswith("RESULTS ")]
    return {name: result for line in lines for name, result in json.loads(line).items()}


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

    one = {"one": case("one", *ALONE), "one_again": moved("one_again", "one", *ALONE)}
    two = {f"zero{n}": case(f"zero{n}", *stage(n), resume_at=SAVED) for n in (0, 1, 2, 3)}
    two |= {
        "tp": case("tp", *TENSOR, *ALONE),
        "cp": case("cp", *CONTEXT, *ALONE),
        "one_to_dp2": moved("one_to_dp2", "one", *stage(2)),
    }
    parallel = (*TENSOR, "--sequence-parallel")
    four = {f"sp_zero{n}": case(f"sp_zero{n}", *parallel, *stage(n)) for n in (0, 1, 2, 3)}
    four |= {
        "mcore": case("mcore", *parallel, by="mcore"),
        "sp_cp": case("sp_cp", *parallel, *CONTEXT, *ALONE),
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_process(results, layout):
    found, wanted = steps_of(results, layout), steps_of(results, "one")
    assert len(found) == len(wanted) == STEPS
    for (loss, norm), (want_loss, want_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(want_loss, abs=1e-5)
        assert norm == pytest.approx(want_norm, rel=1e-5, abs=1e-5)
    assert max(norm for _, norm in found) > 0.5, "the clipping must be in force to be compared"
    assert all(math.isfinite(norm) for _, norm in found)


@pytest.mark.parametrize("layout", ["tp", "sp_zero0", "sp_zero1", "sp_zero2"])
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
    assert results[layout]["hyperparameters"] == wanted


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
