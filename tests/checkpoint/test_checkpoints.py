"""Checkpoints with every worker's state: exact, whole or nothing, and for other numbers of workers."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from hf_dlion import (
    DistributedLion,
    DistributedMuon,
    DLionTrainer,
    DLionTrainingArguments,
    keep_gradients_local,
    last_complete_checkpoint,
    load_workers,
    save_workers,
)
from hf_dlion.checkpoint.manifest import MANIFEST, CheckpointError, Manifest
from tests.harness import run_workers, what_is_logged
from tests.trainer import tiny
from tests.trainer.test_trainer import weights

State = dict[str, torch.Tensor]


def trainer(rank: int, folder: str | Path, dropout: float = 0.0, lora: bool = False, **options: Any) -> DLionTrainer:
    if dist.is_initialized():
        tiny.act_as_launched(rank)
    args = tiny.arguments(folder, **options)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    model: Any = GPT2LMHeadModel(GPT2Config(**shape, **rates, bos_token_id=None, eos_token_id=None))
    model.loss_type = "ForCausalLM"
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    return DLionTrainer(model=model, args=args, train_dataset=tiny.rows(), eval_dataset=tiny.rows(8))


def state_of(run: DLionTrainer) -> list[State]:
    optimizer = run.optimizer.optimizer
    members = getattr(optimizer, "members", [optimizer])
    return [{f"{i}.{k}": t for i, s in enumerate(m.state.values()) for k, t in s.items()} for m in members]


def stop_and_go_on(rank: int, folder: str, options: dict[str, Any]) -> tuple[torch.Tensor, State, torch.Tensor, State]:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(rank, f"{folder}/whole", **options)
    whole.train()
    trainer(rank, folder, **{**options, "max_steps": 3, **saving}).train()
    again = trainer(rank, folder, **options)
    again.train(resume_from_checkpoint=True)
    return weights(whole.model), state_of(whole)[0], weights(again.model), state_of(again)[0]


SCHEDULE = {"max_steps": 6, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (3, {"optim": "dlion_mavo", "dropout": 0.1, "gradient_accumulation_steps": 2, "vote_tie": "alternate"}),
        (2, {"optim": "dlion_avg", "dropout": 0.1, "lora": True}),
        (2, {"optim": "dmuon_mavo", "dropout": 0.1}),
        (2, {"optim": "dmuon_mavo", "muon_rest": "average", "adam_beta2": 0.95}),
        (2, {"optim": "dmuon_avg", "lora": True}),
        (2, {"optim": "dgc", "learning_rate": 0.05, "dgc_warmup_steps": 5}),
        (2, {"optim": "terngrad", "base_rule": "adamw"}),
    ],
)
def test_resumed_is_as_never_stopped(workers: int, options: dict[str, Any], tmp_path: Path) -> None:
    outcomes = run_workers(stop_and_go_on, workers, str(tmp_path), SCHEDULE | options)
    for whole, own, resumed, again in outcomes:
        assert torch.equal(whole, resumed)
        assert own.keys() == again.keys()
        assert all(torch.equal(own[key], again[key]) for key in own)
    local = "0.residual" if options["optim"] == "dgc" else "0.momentum"
    if local in outcomes[0][1]:
        assert not torch.equal(outcomes[0][1][local], outcomes[1][1][local])


def scaled(rank: int, folder: str, checkpoint: bool, steps: int) -> tuple[torch.Tensor, dict[str, Any], State]:
    """With a gradient scaler, as fp16 has on a GPU: that of rank 1 is so large that the loss overflows at first."""
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "steps", "save_steps": 3}
    run = trainer(rank, folder, max_steps=steps, **options)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (127 if rank else 8), growth_interval=2)
    run.train(resume_from_checkpoint=checkpoint)
    return weights(run.model), run.accelerator.scaler.state_dict(), state_of(run)[0]


def test_gradient_scalers_are_each_worker_s_own(tmp_path: Path) -> None:
    whole = run_workers(scaled, 2, str(tmp_path / "whole"), False, 7)
    run_workers(scaled, 2, str(tmp_path), False, 3)
    again = run_workers(scaled, 2, str(tmp_path), True, 7)
    for (parameters, scaler, own), (resumed, its_scaler, its_own) in zip(whole, again, strict=True):
        assert torch.equal(parameters, resumed)
        assert scaler == its_scaler
        assert all(torch.equal(own[key], its_own[key]) for key in own)
    assert whole[0][1]["scale"] < whole[1][1]["scale"] < 2.0**127
    assert not (tmp_path / "checkpoint-3" / "scaler.pt").exists()
    # Rank 0's has lasted one good step of the two after which it doubles: now they all do.
    for _, scaler, _ in run_workers(scaled, 3, str(tmp_path), True, 8):
        assert scaler["scale"] == 2 * whole[0][1]["scale"]


def write(rank: int, folder: str, options: dict[str, Any]) -> None:
    trainer(rank, folder, **{"max_steps": 2, "save_strategy": "steps", "save_steps": 2, **options}).train()


def resume(rank: int, folder: str, checkpoint: str | bool, options: dict[str, Any]) -> tuple[torch.Tensor, list[State]]:
    run = trainer(rank, folder, **options)
    run.train(resume_from_checkpoint=checkpoint)
    return weights(run.model), state_of(run)


def test_processes_go_on_where_virtual_workers_stopped(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "constant", "max_steps": 4}
    expected, states = resume(0, str(tmp_path / "whole"), False, {**options, "virtual_workers": 3})
    write(0, str(tmp_path), {**options, "max_steps": 2, "virtual_workers": 3})
    for rank, (found, [own]) in enumerate(run_workers(resume, 3, str(tmp_path), True, options)):
        assert torch.equal(found, expected)
        assert all(torch.equal(own[key], states[rank][key]) for key in own)


@pytest.mark.parametrize("optim", ["dlion_mavo", "dmuon_avg", "graddrop"])
def test_another_number_of_workers(optim: str, tmp_path: Path) -> None:
    write(0, str(tmp_path), {"optim": optim, "virtual_workers": 3})
    checkpoint = str(tmp_path / "checkpoint-2")

    def loaded(**options: Any) -> list[State]:
        run = trainer(0, tmp_path, optim=optim, **options)
        run.create_optimizer()
        load_workers(checkpoint, run.optimizer, resume_world_size_policy=run.args.resume_world_size_policy)
        optimizer = run.optimizer
        return [
            {f"{i}.{k}": t for i, s in enumerate(m.state.values()) for k, t in s.items()}
            for m in getattr(optimizer, "members", [optimizer])
        ]

    old = loaded(virtual_workers=3)
    local = "residual" if optim == "graddrop" else "momentum"
    for policy in ("mean", "reset"):
        for own in loaded(virtual_workers=2, resume_world_size_policy=policy):
            for key, tensor in own.items():
                if not key.endswith(f".{local}"):
                    assert torch.equal(tensor, old[0][key])
                elif policy == "reset":
                    assert not tensor.any()
                else:
                    torch.testing.assert_close(tensor, sum(one[key] for one in old) / 3)
    with pytest.raises(CheckpointError, match=r"of 3 workers, and here are 2.*mean or reset"):
        loaded(virtual_workers=2, resume_world_size_policy="error")


def losses(rank: int, folder: str, checkpoint: bool, options: dict[str, Any]) -> list[float]:
    run = trainer(rank, folder, **{"logging_steps": 1, "lr_scheduler_type": "constant", **options})
    run.train(resume_from_checkpoint=checkpoint)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_the_loss_goes_on_with_other_workers(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 20, "max_steps": 20}
    before = run_workers(losses, 3, str(tmp_path), False, saving)[0]
    after = run_workers(losses, 2, str(tmp_path), True, {"max_steps": 30})[0]
    assert after[:20] == before
    assert max(after[20:]) < min(before[:5])
    assert after[20] < before[-1] + 0.15 * (before[0] - before[-1])


def outcome(rank: int, folder: str, checkpoint: str | bool, options: dict[str, Any]) -> str:
    try:
        resume(rank, folder, checkpoint, options)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_missing_part_is_named_on_every_rank(tmp_path: Path) -> None:
    run_workers(write, 3, str(tmp_path), {})
    part = tmp_path / "checkpoint-2" / "worker_00001_of_00003.safetensors"
    part.unlink()
    for workers, culprit in ((3, "rank 1 cannot resume"), (2, "rank 0 cannot resume")):
        for message in run_workers(outcome, workers, str(tmp_path), str(part.parent), {"max_steps": 3}):
            for text in (culprit, f"{part} is missing", "resume_world_size_policy reset", "another checkpoint"):
                assert text in message


def spoil(checkpoint: Path, how: str) -> None:
    if how == "no manifest":
        (checkpoint / MANIFEST).unlink()
    elif how == "a lost part":
        (checkpoint / "worker_00001_of_00002.safetensors").unlink()
    elif how == "a truncated model":
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path = checkpoint / "worker_00001_of_00002.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)


def resume_newest(rank: int, folder: str) -> tuple[int, str]:
    records = what_is_logged()
    found = last_complete_checkpoint(folder)
    run = trainer(rank, folder, max_steps=6)
    run.train(resume_from_checkpoint=True)
    assert found is not None
    return int(found.rpartition("-")[2]), " ".join(records)


@pytest.mark.parametrize("how", ["no manifest", "a truncated model", "a flipped bit", "a lost part"])
def test_what_is_not_whole_is_passed_over(how: str, tmp_path: Path) -> None:
    run_workers(write, 2, str(tmp_path), {"max_steps": 4})
    newest = tmp_path / "checkpoint-4"
    spoil(newest, how)
    (step, said), (other, _) = run_workers(resume_newest, 2, str(tmp_path))
    assert step == other == 2
    assert "passed over" in said
    assert str(newest) in said
    for message in run_workers(outcome, 2, str(tmp_path), str(newest), {"max_steps": 5}):
        assert str(newest) in message
        assert "esume from another checkpoint" in message


def newest_on_each_node(rank: int, folder: str) -> tuple[str | None, str]:
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    records = what_is_logged()
    return last_complete_checkpoint(Path(folder, str(rank))), " ".join(records)


def test_a_node_that_went_on_alone_has_another_checkpoint_of_the_name(tmp_path: Path) -> None:
    """Its manifest has one part, that of the node that comes back has two."""
    for rank, workers in enumerate((1, 2)):
        write(0, str(tmp_path / str(rank)), {"max_steps": 2, "virtual_workers": workers})
    (none, said), (nor, _) = run_workers(newest_on_each_node, 2, str(tmp_path))
    assert none is nor is None
    assert "is not of one run on all ranks" in said


def test_without_a_process_group_every_rank_looks_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(0, str(tmp_path), {"max_steps": 4, "virtual_workers": 2})
    spoil(tmp_path / "checkpoint-4", "a truncated model")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_nothing_whole_is_an_error_or_none(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="absent is no folder"):
        load_workers(tmp_path / "absent", DistributedLion([torch.nn.Parameter(torch.zeros(3))]))
    write(0, str(tmp_path), {})
    spoil(tmp_path / "checkpoint-2", "no manifest")
    assert last_complete_checkpoint(tmp_path) is None
    assert "no complete checkpoint" in outcome(0, str(tmp_path), True, {"max_steps": 3})


def test_another_method_or_model_is_refused(tmp_path: Path) -> None:
    write(0, str(tmp_path), {"virtual_workers": 2})
    checkpoint = str(tmp_path / "checkpoint-2")
    message = outcome(0, str(tmp_path), checkpoint, {"virtual_workers": 2, "optim": "dsignum_mavo", "max_steps": 3})
    assert "written by DistributedLion, whose state is not that of DistributedSignum" in message
    for parameters, text in (
        ([torch.nn.Parameter(torch.zeros(3))], "parameters in its groups"),
        ([torch.nn.Parameter(torch.zeros(3)) for _ in range(99)], "parameters in its groups"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load_workers(checkpoint, DistributedLion(parameters))
    with pytest.raises(TypeError, match="SGD has no workers"):
        save_workers(tmp_path, torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))]))
    with pytest.raises(ValueError, match="'sum' is not known.*mean, reset, error"):
        load_workers(checkpoint, DistributedLion([torch.nn.Parameter(torch.zeros(3))]), resume_world_size_policy="sum")


def test_options_that_differ_are_named(tmp_path: Path) -> None:
    said = what_is_logged()

    def made(**options: Any) -> DistributedMuon:
        parameter = torch.nn.Parameter(torch.ones(8, 8))
        parameter.grad = torch.ones(8, 8)
        optimizer = DistributedMuon([{"params": [parameter], "orthogonal": True}], **options)
        optimizer.step()
        return optimizer

    save_workers(tmp_path, made(tie="zero"))
    load_workers(tmp_path, made(ns_steps=3))
    assert [message.partition(" was written with ")[2] for message in said] == [
        "tie='zero', no ns_steps; here it is otherwise."
    ]


def test_reset_needs_none_of_the_others_state(tmp_path: Path) -> None:
    write(0, str(tmp_path), {"virtual_workers": 3})
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "worker_00000_of_00003.safetensors").unlink()
    optimizer = trainer(0, tmp_path, virtual_workers=2).create_optimizer()
    load_workers(checkpoint, optimizer, resume_world_size_policy="reset")
    assert optimizer.param_groups[0]["step"] == 2


def test_links_to_files_are_files(tmp_path: Path) -> None:
    write(0, str(tmp_path), {})
    links = tmp_path / "links" / "checkpoint-2"
    links.mkdir(parents=True)
    for path in (tmp_path / "checkpoint-2").iterdir():
        (links / path.name).symlink_to(path)
    assert last_complete_checkpoint(links.parent) == str(links)
    resume(0, str(tmp_path), str(links), {"max_steps": 3})


def on_a_machine_of_its_own(rank: int, folder: str, each: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    said = what_is_logged()
    DLionTrainingArguments.local_process_index = property(lambda _: 0)  # type: ignore[assignment, method-assign]

    def run(name: str, **options: Any) -> DLionTrainer:
        own = trainer(rank, f"{folder}/{name}_{rank}", lr_scheduler_type="constant", **options)
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        return own

    saving = {"save_strategy": "steps", "save_steps": 2, "save_on_each_node": each}
    whole = run("whole", max_steps=4)
    whole.train()
    run("run", max_steps=2, **saving).train()
    again = run("run", max_steps=4)
    again.train(resume_from_checkpoint=each)
    return weights(whole.model), weights(again.model), said


@pytest.mark.parametrize("each", [True, False])
def test_machines_with_folders_of_their_own(each: bool, tmp_path: Path) -> None:
    outcomes = run_workers(on_a_machine_of_its_own, 2, str(tmp_path), each)
    for whole, again, _ in outcomes:
        assert torch.equal(whole, again)
    warned = ["has no manifest on the machine" in " ".join(said) for _, _, said in outcomes]
    assert warned == [False, not each]
    assert (tmp_path / "run_1" / "checkpoint-2" / MANIFEST).exists() == each


def of_two_runs(rank: int, folder: str) -> str:
    for seed in range(2):
        write(rank, f"{folder}/seed_{seed}", {"seed": seed})
    return outcome(rank, folder, f"{folder}/seed_{rank}/checkpoint-2", {"max_steps": 3})


def test_checkpoints_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    for message in run_workers(of_two_runs, 2, str(tmp_path)):
        assert "is not of one run on all ranks" in message


def unwritable(rank: int, folder: str) -> tuple[str, str]:
    optimizer = DistributedLion([torch.nn.Parameter(torch.ones(8))])
    optimizer.param_groups[0]["note"] = object()
    said = []
    for call in (save_workers, load_workers):
        with pytest.raises(CheckpointError) as error:
            call(folder, optimizer)
        said.append(str(error.value))
    return said[0], said[1]


def test_what_is_no_json_stops_all_ranks(tmp_path: Path) -> None:
    for message, of_loading in run_workers(unwritable, 2, str(tmp_path)):
        assert "rank 0 could not write the manifest" in message
        assert "TypeError" in message
        assert of_loading.startswith("rank 0 cannot resume: ")
        assert of_loading.endswith(" Rank 1 failed, too.")


def test_a_checkpoint_is_pushed_when_it_counts(tmp_path: Path) -> None:
    pushed = []

    class Pushing(DLionTrainer):
        def init_hf_repo(self, token: str | None = None) -> None:
            pass

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            pushed.append(Path(checkpoint_folder, MANIFEST).exists())

    args = tiny.arguments(tmp_path, push_to_hub=True, save_strategy="steps", save_steps=2, save_total_limit=1)
    Pushing(model=tiny.model(), args=args, train_dataset=tiny.rows()).train()
    assert pushed == [True, True]
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert (saved.push_to_hub, saved.save_total_limit) == (True, 1)


def test_the_trainer_s_own_options_do_what_they_say(tmp_path: Path) -> None:
    common = {"virtual_workers": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer(0, tmp_path / "few", **common, save_total_limit=2).train()
    assert sorted(path.name for path in (tmp_path / "few").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    trainer(0, tmp_path / "model", **common, save_only_model=True).train()
    files = {path.name for path in (tmp_path / "model" / "checkpoint-4").iterdir()}
    assert "model.safetensors" in files
    assert not {name for name in files if "worker" in name or name in (MANIFEST, "optimizer.pt", "scheduler.pt")}
    best = trainer(
        0, tmp_path / "best", **common, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        learning_rate=0.3, save_total_limit=1,
    )  # fmt: skip
    best.train()
    kept = best.state.best_model_checkpoint
    assert kept is not None
    assert last_complete_checkpoint(tmp_path / "best") == str(tmp_path / "best" / "checkpoint-4")
    from safetensors.torch import load_file

    assert torch.equal(
        load_file(f"{kept}/model.safetensors")["transformer.wpe.weight"], best.model.transformer.wpe.weight
    )
    ordinary = trainer(0, tmp_path / "adamw", optim="adamw_torch", save_strategy="steps", save_steps=4)
    ordinary.train()
    files = {path.name for path in (tmp_path / "adamw" / "checkpoint-4").iterdir()}
    assert "optimizer.pt" in files
    assert MANIFEST not in files


def test_the_manifest_names_everything(tmp_path: Path) -> None:
    write(0, str(tmp_path), {"virtual_workers": 2})
    folder = tmp_path / "checkpoint-2"
    manifest = Manifest.read(folder)
    assert (manifest.method, manifest.workers, manifest.step) == ("DistributedLion", 2, 2)
    assert manifest.options["aggregation"] == "mavo"
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert not list(folder.glob("*.pt.*")) + list(folder.glob(".*"))
    assert (
        json.loads((folder / MANIFEST).read_text())["files"]["model.safetensors"]["size"]
        == (folder / "model.safetensors").stat().st_size
    )


def full_disk(rank: int, folder: str) -> str:
    write(rank, folder, {})
    run = trainer(rank, folder, max_steps=4, save_strategy="steps", save_steps=2)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # less than its part, more than its RNG state
    try:
        run.train(resume_from_checkpoint=True)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_full_disk_stops_all_ranks_and_leaves_the_last_one(tmp_path: Path) -> None:
    for message in run_workers(full_disk, 3, str(tmp_path)):
        assert "rank 1 could not write into" in message
        assert "File too large" in message
    assert not (tmp_path / "checkpoint-4" / MANIFEST).exists()
    assert not list((tmp_path / "checkpoint-4").glob(".hf_dlion_part*"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def plain_loop(rank: int, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    tiny.act_as_launched(rank)
    accelerator = Accelerator(cpu=True)
    keep_gradients_local(accelerator)

    def build() -> tuple[Any, Any, Any]:
        model = tiny.model()
        optimizer = DistributedLion(model.parameters(), lr=1e-3)
        loader = DataLoader(tiny.rows(), batch_size=4)  # type: ignore[arg-type]
        return accelerator.prepare(model, optimizer, loader)

    def steps(model: Any, optimizer: Any, loader: Any, first: int, last: int) -> torch.Tensor:
        for batch in list(loader)[first:last]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model).clone()

    model, optimizer, loader = build()
    steps(model, optimizer, loader, 0, 3)
    accelerator.save_state(folder)
    save_workers(folder, optimizer)
    whole = steps(model, optimizer, loader, 3, 6)
    accelerator.free_memory()
    model, optimizer, loader = build()
    accelerator.load_state(folder)
    load_workers(folder, optimizer)
    return whole, steps(model, optimizer, loader, 3, 6)


def test_a_plain_accelerate_loop(tmp_path: Path) -> None:
    for whole, again in run_workers(plain_loop, 2, str(tmp_path)):
        assert torch.equal(whole, again)
