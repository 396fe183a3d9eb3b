# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's configuration: "auto" filled from the run, contradictions and unsafe settings refused."""

import dataclasses
import json

import pytest
from programs import REPOSITORY

from sparsek_megatron.errors import UserError
from sparsek_megatron.training.arguments import TrainingConfig
from sparsek_megatron.training.ds_config import build_ds_config
from sparsek_megatron.training.engine import require_readable

CONFIG = TrainingConfig(micro_batch_size=2, global_batch_size=16, clip_grad=0.7, zero_stage=2)


def build(tmp_path, settings, config=CONFIG, bf16=False):
    path = tmp_path / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    config = dataclasses.replace(config, deepspeed_config=str(path))
    return build_ds_config(config, data_parallel=4, bf16=bf16, overlap=False)


def test_auto_is_filled_from_the_run_and_the_rest_is_passed_on(tmp_path):
    settings = {
        "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 12345},
        "comms_logger": {"enabled": True}, "timers": {"throughput": {"synchronized": False}},
    }  # fmt: skip
    built = build(tmp_path, settings, bf16=True)
    assert built["train_batch_size"] == 16 and built["gradient_accumulation_steps"] == 2
    assert built["gradient_clipping"] == 0.7 and built["bf16"]["enabled"] is True
    assert built["zero_optimization"]["stage"] == 2 and built["zero_optimization"]["reduce_bucket_size"] == 12345
    assert built["comms_logger"] == {"enabled": True}
    assert built["timers"]["throughput"] == {"enabled": False, "synchronized": False}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_several_micro_batches_of_bf16_weights_add_up_in_fp32(stage):
    def built(batch, bf16):
        config = dataclasses.replace(CONFIG, global_batch_size=batch, zero_stage=stage)
        return build_ds_config(config, data_parallel=4, bf16=bf16, overlap=False)

    settings = {"data_types", "communication_data_type"}
    several = built(16, True)
    assert several["data_types"] == {"grad_accum_dtype": "fp32"} and several["communication_data_type"] == "fp32"
    assert not settings & built(8, True).keys(), "one micro-batch adds nothing up"
    assert not settings & built(16, False).keys()


def test_one_rank_adds_up_in_the_one_partition_that_zero_2_has():
    config = dataclasses.replace(CONFIG, zero_stage=1)

    def stage(config=config, data_parallel=1, bf16=True):
        built = build_ds_config(config, data_parallel=data_parallel, bf16=bf16, overlap=False)
        return built["zero_optimization"]["stage"]

    assert stage() == 2 and stage(data_parallel=2) == 1
    assert stage(bf16=False) == 1 and stage(dataclasses.replace(config, global_batch_size=2)) == 1
    assert stage(dataclasses.replace(config, context_parallel_size=2)) == 1
    assert stage(dataclasses.replace(config, zero_stage=3)) == 3


def test_zero_0_would_add_up_in_bf16():
    config = dataclasses.replace(CONFIG, zero_stage=0)
    with pytest.raises(UserError, match=r"--zero-stage 0: the gradients of 2 micro-batches .* use --zero-stage 1"):
        build_ds_config(config, data_parallel=4, bf16=True, overlap=False)
    assert build_ds_config(config, data_parallel=8, bf16=True, overlap=False)["gradient_accumulation_steps"] == 1
    assert build_ds_config(config, data_parallel=4, bf16=False, overlap=False)["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples" / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_example_fits_a_run_of_its_stage(path):
    stage = int(path.stem.split("zero")[1][0])
    config = dataclasses.replace(
        CONFIG, zero_stage=stage, offload_optimizer="offload" in path.stem, deepspeed_config=str(path)
    )
    built = build_ds_config(config, data_parallel=4, bf16=True, overlap=True)
    assert "auto" not in json.dumps(built)
    assert built["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, r'stage: 3, but this run has 2; write "auto".*--zero-stage'),
        ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0, but this run has 0.7"),
        ({"train_micro_batch_size_per_gpu": 1}, "change --micro-batch-size"),
        ({"sequence_parallel_size": 2}, "Ulysses"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: this program builds"),
        ({"pipeline": {}}, "pipeline engine refuses ZeRO 2 and 3"),
        ({"fp16": {"enabled": True}}, "use --bf16"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": False}, r"zero_optimization: False is no object; write \{...\} or leave it out"),
        ({"zero_optimization": None}, "zero_optimization: None is no object"),
        ({"zero_optimization": [{"stage": 2}]}, "zero_optimization: .* is no object"),
        ({"bf16": False}, "bf16: False is no object"),
        ({"timers": {"throughput": False}}, "timers.throughput: False is no object"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer: 'cpu' is no object"),
        ({"zero_optimisation": {"stage": 2}}, r"zero_optimisation: unknown; did you mean zero_optimization\?"),
        ({"gradient_cliping": 0.7}, r"gradient_cliping: unknown; did you mean gradient_clipping\?"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload: an old name; use --offload-optimizer"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm: a step whose gradient is not finite"),
        ({"bf16": {"enabled": "auto", "check_grad_overflow": False}}, "check_grad_overflow: a step whose gradient"),
        ({"communication_data_type": "bf16"}, "communication_data_type: gradients are averaged in the type"),
        ({"prescale_gradients": True}, "prescale_gradients: gradients are averaged in the type"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: gradients are averaged in the type"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: gradients are averaged in the type"),
        ({"managed_gradient_accumulation": True}, "the training loop says where a batch ends"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types: gradients .* add up in float32"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast: .* use --bf16"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint: checkpoints are this program's own"),
        ({"comms_logger": "auto"}, 'no value for "auto"'),
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
    ],
)  # fmt: skip
def test_what_would_train_otherwise_than_the_flags_say_is_refused(tmp_path, settings, said):
    with pytest.raises(UserError, match=rf"--deepspeed-config .*{said}"):
        build(tmp_path, settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com: "),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size: "),
        ({"comms_logger": {"enabled": 3}}, "enabled: "),
        ({"activation_checkpointing": 3}, "'int' object"),
    ],
)  # fmt: skip
def test_what_deepspeed_does_not_take_is_one_line(tmp_path, settings, said):
    built = build(tmp_path, settings)
    with pytest.raises(UserError, match=rf"--deepspeed-config .*ds.json: DeepSpeed does not take it \({said}"):
        require_readable(str(tmp_path / "ds.json"), built)


def test_an_absent_file_is_named():
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        build_ds_config(
            dataclasses.replace(CONFIG, deepspeed_config="absent.json"), data_parallel=4, bf16=False, overlap=False
        )
