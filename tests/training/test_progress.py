"""What a manifest says of a run's progress."""

import pytest

from stacey_dist.training.progress import check_progress


@pytest.mark.parametrize(
    "extra",
    [
        {"step": "3"},
        {"position": -1},
        {"skipped_steps": True},
        {"config": 1},
        {"step": 1.5},
        {"step": None},
        {"config": None},
        {"config": {"checkpoint": []}},
        {"config": {"checkpoint": {"resume_from": 7}}},
        {"evaluated_step": None},
        {"best_step": "x"},
        {"best_score": "x"},
        {"trackers": [1]},
        {"scaler": 7},
        {"scaler": {"scale": 2.0}},
        {"scaler": {"scale": "2", "applied": 0}},
        {"scaler": {"scale": 2.0, "applied": -1}},
        {"scaler": {"scale": 0.0, "applied": 0}},
        {"scaler": {"scale": 1e-60, "applied": 0}},
        {"scaler": {"scale": 1e300, "applied": 0}},
        {"scaler": {"scale": 10**400, "applied": 0}},
        {"scaler": {"scale": True, "applied": 0}},
        {"scaler": {"scale": 2.0, "applied": 0, "hysteresis": "x"}},
    ],
)
def test_progress_that_is_no_count_is_named(extra):
    with pytest.raises(ValueError, match=f"extra.{next(iter(extra))}"):
        check_progress(extra)


def test_progress_of_a_run_is_let_through():
    check_progress({})
    check_progress({"step": 3, "best_step": None, "best_score": None, "evaluated_step": 2, "scaler": None})
    check_progress({"config": {"checkpoint": {"resume_from": None}}, "best_score": 0.5, "trackers": {"wandb": "a"}})
    check_progress({"scaler": {"scale": 65536.0, "applied": 7, "hysteresis": None}})
