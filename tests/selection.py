"""What `make test-quick` runs: every room that compiles little, and one test of each that does.

The one idea: a mistake that breaks a room should show in a minute and a half; the whole suite says
where it is.
"""

from collections.abc import Iterable

import pytest

# Files and folders as a whole, and single tests, each with all or one of its cases.
QUICK = (
    "calibration",
    "cost/test_chips.py",
    "cost/test_energy.py",
    "data",
    "experiments/test_bars.py",
    "pretrained/test_table.py",
    "pretrained/test_tokenizer.py",
    "report/test_tokens.py",
    "runs/test_metrics.py",
    "runs/test_progress.py",
    "settings",
    "storage",
    "test_architecture.py",
    "test_policy.py",
    "test_profiles.py",
    "test_selection.py",
    "test_tree.py",
    "training/test_schedule.py",
    "backbones/test_decoder.py::test_no_position_sees_a_later_one",
    "backbones/test_rotary.py",
    "classifying/test_classify.py::test_answers_come_in_the_order_of_the_rows",
    "decoding/test_decode.py::test_every_combination_equals_the_slow_decoder[lossy-norm-0-max_prob]",
    "evaluation/test_exits.py::test_summary_has_a_row_per_exit_and_counts_shares",
    "exits/test_multi_exit.py::test_copied_weights_are_the_backbones_bit_for_bit",
    "launch/test_commands.py::test_calibrate_prints_what_it_saves",
    "launch/test_commands.py::test_generate_at_full_depth",
    "training/test_step.py::test_the_loss_is_the_weighted_sum_of_masked_means[mlp-kl]",
)


def is_quick(nodeid: str) -> bool:
    """Whether a test, as pytest names it, is one of these or in one of their folders."""
    name = nodeid.removeprefix("tests/")
    return any(
        name == part or name.startswith((f"{part}/", f"{part}::", f"{part}[")) for part in QUICK
    )


def mark_quick(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if is_quick(item.nodeid):
            item.add_marker(pytest.mark.quick)
