"""Options are taken or refused by name, and classes that are put together wrongly say so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_dlion import DLionArgumentsMixin, DLionTrainer, DLionTrainerMixin, DLionTrainingArguments
from hf_dlion.trainer.methods import METHODS
from tests.harness import what_is_logged
from tests.trainer import tiny


def optimizer(folder: Path, **options: Any) -> Any:
    trainer = DLionTrainer(model=tiny.model(), args=tiny.arguments(folder, **options), train_dataset=tiny.rows())
    return trainer.create_optimizer()


@pytest.mark.parametrize(
    ("optim", "optim_args", "expected"),
    [
        ("dlion_mavo", "betas=(0.5, 0.6),tie=alternate", {"betas": (0.5, 0.6), "tie": "alternate"}),
        ("dlion_avg", "exchange='gather'", {"exchange": "gather"}),
        ("dlion_avg", "overlap=True", {"overlap": True}),
        ("dsignum_mavo", "momentum=0.5", {"betas": (0.5, 0.5)}),
        ("dmuon_mavo", "hidden_betas=(0.5,0.6)", {"hidden_betas": (0.5, 0.6)}),
        ("gadamw", "eps=1e-6", {"eps": 1e-6}),
        ("dgc", "drop=0.5,clip=0", {"drop": 0.5, "clip": 0}),
    ],
)
def test_optim_args_are_the_optimizer_s(optim: str, optim_args: str, expected: dict[str, Any], tmp_path: Path) -> None:
    made = optimizer(tmp_path, optim=optim, optim_args=optim_args)
    for name, value in expected.items():
        assert getattr(made, name, made.defaults.get(name)) == value


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("nonsense=3", "optim_args has nonsense=3; optim='dlion_mavo' takes betas=.*tie='zero'"),
        ("betas=0.5", r"optim_args has betas=0.5; .*betas=\(0.9, 0.99\)"),
        ("betas=(0.5,high)", "cannot be read.*betas="),
        ("lr=1", "optim_args has lr=1"),
        ("aggregation=avg", "optim_args has aggregation='avg'"),
        ("betas", "cannot be read"),
    ],
)
def test_other_optim_args_are_refused(optim_args: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, optim_args=optim_args)


@pytest.mark.parametrize("rest", ["vote", "average"])
def test_what_becomes_of_the_rest_is_no_optim_arg(rest: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim_args has rest='average': .* Use muon_rest"):
        tiny.arguments(tmp_path, optim="dmuon_avg", muon_rest=rest, optim_args="rest=average")
    options: dict[str, Any] = {"optim_args": "betas=(0.8,0.7)", "muon_rest": rest}
    assert optimizer(tmp_path, optim="dmuon_avg", **options).defaults["betas"] == (0.8, 0.7)


@pytest.mark.parametrize("optim", METHODS)
def test_what_others_take_is_taken_or_refused(optim: str, tmp_path: Path) -> None:
    for name, value in {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3}.items():
        if optim in ("gadamw", "gmuon"):
            made = optimizer(tmp_path, optim=optim, **{name: value})
            assert value in (*made.defaults["betas"], made.defaults["eps"])
            continue
        with pytest.raises(ValueError, match=f"{name}={value} would change nothing: optim='{optim}' takes"):
            tiny.arguments(tmp_path, optim=optim, **{name: value})
    if optim in ("terngrad", "graddrop", "dgc"):
        made = optimizer(tmp_path, optim=optim, base_rule="adamw", adam_beta1=0.5)
        assert made.defaults["betas"] == (0.5, 0.999)
    with pytest.raises(ValueError, match="optim_target_modules=.*would change nothing"):
        tiny.arguments(tmp_path, optim=optim, optim_target_modules=["q_proj"])


def test_what_adamw_takes_is_dmuon_s_where_the_rest_is_averaged(tmp_path: Path) -> None:
    said = what_is_logged()
    adam = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3}
    made = optimizer(tmp_path, optim="dmuon_mavo", muon_rest="average", lion_beta1=0.7, **adam)
    found = {group["orthogonal"]: (group["betas"], group["eps"]) for group in made.param_groups}
    assert found == {True: ((0.7, 0.95), 1e-3), False: ((0.5, 0.6), 1e-3)}
    tiny.arguments(tmp_path, optim="dmuon_mavo", muon_rest="average", lion_beta2=0.9)
    assert [message.partition(" would be")[0] for message in said] == ["lion_beta2=0.9"]
    with pytest.raises(ValueError, match="muon_rest='mean' is not known; it is one of 'vote', 'average'"):
        tiny.arguments(tmp_path, optim="dmuon_mavo", muon_rest="mean")


def test_orthogonalisation_may_have_three_steps(tmp_path: Path) -> None:
    assert optimizer(tmp_path, optim="dmuon_mavo").ns_steps == 5
    assert optimizer(tmp_path, optim="dmuon_avg", muon_ns_steps=3).ns_steps == 3
    with pytest.raises(ValueError, match="muon_ns_steps=4 is not known; it is one of 5, 3"):
        tiny.arguments(tmp_path, optim="dmuon_mavo", muon_ns_steps=4)


def test_options_of_another_method_are_named(tmp_path: Path) -> None:
    said = what_is_logged()
    tiny.arguments(tmp_path, optim="dsignum_mavo", lion_beta1=0.5, drop_share=0.5, vote_tie="zero")
    assert said == [
        "lion_beta1=0.5, drop_share=0.5 would be for other methods, and changes nothing: optim='dsignum_mavo' takes "
        "norm_gradients, overlap_votes, signum_momentum, vote_exchange, vote_tie."
    ]
    tiny.arguments(tmp_path, optim="dlion_mavo", lion_beta1=0.5)
    tiny.arguments(tmp_path, optim="adamw_torch", adam_beta1=0.5, optim_target_modules=["q_proj"])
    assert len(said) == 1
    tiny.arguments(tmp_path, optim="glion", norm_gradients=True)
    assert said[1].startswith("norm_gradients=True would be for other methods, and changes nothing: optim='glion'")
    foreign: dict[str, Any] = {"optim": "adamw_torch", "norm_gradients": True, "vote_tie": "zero"}
    tiny.arguments(tmp_path, **foreign, gradient_votes="avg")
    tiny.arguments(tmp_path, **foreign, local_steps=4)
    assert [message.partition(" would be")[0] for message in said[2:]] == [
        "vote_tie='zero', norm_gradients=True",
        "norm_gradients=True",
    ]
    tiny.arguments(tmp_path, optim="adamw_torch", gradient_votes="mavo", vote_exchange="gather")
    assert len(said) == 4


def test_set_optimizer(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, optim="adamw_torch")
    assert args.set_optimizer("dlion_avg", learning_rate=1e-3, weight_decay=0.5) is args
    assert (args.optim, args.learning_rate, args.weight_decay) == ("dlion_avg", 1e-3, 0.5)
    assert not args.average_tokens_across_devices
    assert DLionTrainer(model=tiny.model(), args=args).create_optimizer().aggregation == "avg"  # type: ignore[attr-defined]
    args.set_optimizer("adamw_torch")
    assert args.optim == "adamw_torch"
    with pytest.raises(ValueError, match="Did you mean 'dlion_avg'"):
        args.set_optimizer("dlion_avrg")
    with pytest.raises(ValueError, match="adam_beta1=0.5 would change nothing: .*lion_beta1"):
        args.set_optimizer("dlion_avg", beta1=0.5)


def test_a_name_that_is_assigned_counts(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, optim="adamw_torch", adam_beta1=0.5)
    args.optim = "dlion_avg"
    with pytest.raises(ValueError, match="adam_beta1=0.5 would change nothing"):
        DLionTrainer(model=tiny.model(), args=args)
    args.adam_beta1 = 0.9
    assert DLionTrainer(model=tiny.model(), args=args).create_optimizer().aggregation == "avg"  # type: ignore[attr-defined]
    assert not args.average_tokens_across_devices


def test_plain_arguments_have_none_of_the_options(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.optim = "dlion_mavo"
    with pytest.raises(TypeError, match="args is a TrainingArguments whose optim was set to 'dlion_mavo'.*DLionTrain"):
        DLionTrainer(model=tiny.model(), args=args)


def test_arguments_that_are_put_together_wrongly(tmp_path: Path) -> None:
    class NoDataclass(DLionArgumentsMixin, Seq2SeqTrainingArguments):
        pass

    with pytest.raises(TypeError, match="NoDataclass is not a dataclass .* of Seq2SeqTrainingArguments. Write @data"):
        NoDataclass(str(tmp_path), optim="dlion_mavo")
    with pytest.raises(TypeError, match=r"class Last\(DLionArgumentsMixin, Seq2SeqTrainingArguments\)"):

        class Last(Seq2SeqTrainingArguments, DLionArgumentsMixin):
            pass

    with pytest.raises(TypeError, match="has Seq2SeqTrainingArguments before DLionArgumentsMixin"):

        class Between(Seq2SeqTrainingArguments, DLionTrainingArguments):
            pass

    class Further(DLionTrainingArguments):  # adds no field, so it needs no decorator
        pass

    args = Further(str(tmp_path), optim="dlion_mavo", use_cpu=True)
    assert dataclasses.replace(args).optim == "dlion_mavo"


def test_trainers_that_are_put_together_wrongly() -> None:
    class Other(Trainer):
        pass

    with pytest.raises(TypeError, match=r"has Other before DLionTrainerMixin.*class Last\(DLionTrainerMixin, Other\)"):

        class Last(Other, DLionTrainerMixin):
            pass
